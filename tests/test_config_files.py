"""Where configs are found, and that every way to write --config reaches the same reader."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from jaxlm import config_files
from jaxlm.flags import config_spec, through_reader
from tests import tiny


@pytest.mark.parametrize("name", ["--config", "-config"])
@pytest.mark.parametrize("is_joined", [True, False])
def test_a_config_is_read_however_its_flag_is_written(name, is_joined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(seed):\n"
        "    return ConfigDict(dict(seed=int(seed)))\n"
    )
    spec = "mine.py:5"
    written = [f"{name}={spec}"] if is_joined else [name, spec]
    monkeypatch.setattr(sys, "argv", [*through_reader(["pretrain", *written])])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    assert values.config.seed == 5
    assert config_spec(values) == spec


def test_fields_of_a_config_and_other_flags_are_left_alone():
    arguments = ["pretrain", "--config.seed=3", "--workdir=W", "--config_other=x", "W", "--configs"]
    assert [*through_reader(arguments)] == arguments


def test_a_recipe_of_the_current_folder_goes_before_jaxlms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = config_files.find_recipe("configs/gpt.py")
    assert ours == tiny.ROOT / "configs" / "gpt.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "gpt.py").touch()
    assert config_files.find_recipe("configs/gpt.py").resolve() == tmp_path / "configs" / "gpt.py"
    assert config_files.whereabouts("configs/gpt.py:tiny") == "configs/gpt.py:tiny"
    assert config_files.whereabouts("configs/bert.py:tiny") == f"{ours.with_name('bert.py')}:tiny"


def test_a_recipes_argument_may_name_a_json_file():
    spec = f"{tiny.ROOT}/configs/finetune/question_answering.py:train=a.json,dev=b.json"
    assert config_files.read_config(spec).data.dev == "b.json"
    assert config_files.whereabouts(spec) == spec


def test_a_recipe_that_is_nowhere_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'configs/gtp\.py'.*expected configs/NAME\.py"):
        config_files.read_config("configs/gtp.py:tiny")
