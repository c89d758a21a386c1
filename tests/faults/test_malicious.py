"""Files that would run code, read elsewhere, or never end, if they were believed: refused, and the code has not run.

Each case writes what an attacker would, with code that touches a marker file, and reads it as a user does.
"""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config_files import read_config
from jaxlm.data.token_store import TokenStore
from jaxlm.exits import Damaged
from jaxlm.inference.search import Index
from jaxlm.interop import convert, source, tokenizer_files
from jaxlm.interop.safetensors_io import INDEX, SINGLE, read_folder
from jaxlm.tasks.chat import ChatTemplate
from jaxlm.tokenizers import load_tokenizer, make_tokenizer
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.state import TrainState
from tests import tiny
from tests.interop import tiny_hf

REFUSED = (ValueError, FileNotFoundError, Damaged)
SECRET = "a secret of the user"


class Touch:
    """Unpickled, it makes the marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def payload(marker: Path) -> bytes:
    return pickle.dumps(Touch(marker))


def model_folder(at: Path, **options) -> Path:
    return tiny_hf.write_recorded(at / "hf", "gpt2", **options)[0]


def pickled_weights(at: Path, marker: Path):
    folder = model_folder(at)
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(payload(marker))
    convert.read_source(str(folder))


def pickled_weights_that_are_allowed(at: Path, marker: Path):
    pytest.importorskip("torch")
    (at / "pytorch_model.bin").write_bytes(payload(marker))
    source.read_pickle(at / "pytorch_model.bin")


def a_store_of_objects(at: Path, marker: Path):
    store = tiny.make_store(at / "store")
    for file in store.glob("train-*.npy"):
        np.save(file, np.array([Touch(marker)] * 10_000, object), allow_pickle=True)
    opened = TokenStore(store, "train")
    opened.documents_in(0, opened.num_tokens)
    opened.tokens(0, 10)


def an_index_of_objects(at: Path, marker: Path):
    np.savez(at / "i.npz", vectors=np.array([[Touch(marker)]], object), ids=np.zeros(1, "u1"))
    Index.load(at / "i.npz")


def a_checkpoint_with_pickles(at: Path, marker: Path):
    step = at / "checkpoints" / "3"
    for name in ("manifest/metadata", "params/_METADATA", "params/checkpoint", "params/a.npy"):
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_bytes(payload(marker))
    Checkpoints(at).restore(TrainState(np.int32(0), {"a": np.zeros(1)}, opt_state={}))


def yaml_for_config_json(at: Path, marker: Path):
    (at / "config.json").write_text(f"!!python/object/apply:os.system ['touch {marker}']\n")
    read_config(str(at / "config.json"))


def python_for_config_json(at: Path, marker: Path):
    (at / "config.json").write_text(f"import pathlib\npathlib.Path('{marker}').touch()\n")
    read_config(str(at / "config.json"))


def a_tokenizer_of_another_kind(at: Path, marker: Path):
    make_tokenizer("bytes").save(at)
    meta = json.loads((at / "jaxlm_tokenizer.json").read_text())
    (at / "evil.py").write_text(f"open('{marker}', 'w')")
    (at / "jaxlm_tokenizer.json").write_text(json.dumps(meta | {"kind": "evil.Tokenizer"}))
    load_tokenizer(at)


ESCAPES = (
    "{{ ().__class__.__base__.__subclasses__()[100].__init__.__globals__['os'].system(CMD) }}",
    "{{ cycler.__init__.__globals__.os.popen(CMD).read() }}",
    "{{ raise_exception.__globals__['os'].system(CMD) }}",
    "{{ strftime_now.__globals__ }}{{ lipsum.__globals__['os'].popen(CMD).read() }}",
    "{{ (messages | attr('__class__')).__mro__[-1] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
    "{% import 'os' as os %}{{ os.system(CMD) }}",
    "{% include '/etc/passwd' %}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system(CMD) }}",
)


def templates_that_climb(at: Path, marker: Path):
    for escape in ESCAPES:
        text = escape.replace("CMD", f"\"touch '{marker}'\"") + "{{ eos_token }}"
        try:
            ChatTemplate(text, make_tokenizer("bytes"))
        except ValueError:
            continue
        raise AssertionError(f"the chat template {escape} was rendered")
    raise ValueError("all were refused")


def a_template_that_never_ends(at: Path, marker: Path):
    loop = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    ChatTemplate(loop + "{{ eos_token }}", make_tokenizer("bytes"))


def a_template_that_fills_the_memory(at: Path, marker: Path):
    ChatTemplate("{{ 'a' * 10 ** 12 }}{{ eos_token }}", make_tokenizer("bytes"))


def an_index_that_names_a_file_elsewhere(at: Path, marker: Path):
    folder = model_folder(at, max_shard_bytes=2000)
    shard = next(folder.glob("model-00001*"))
    elsewhere = shard.rename(at / "elsewhere.safetensors")
    index = (folder / INDEX).read_text().replace(shard.name, f"../{elsewhere.name}")
    (folder / INDEX).write_text(index)
    read_folder(folder)


def an_index_that_names_an_absolute_path(at: Path, marker: Path):
    folder = model_folder(at, max_shard_bytes=2000)
    shard = next(folder.glob("model-00001*"))
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(shard.name, str(shard)))
    read_folder(folder)


def secret_file(at: Path) -> Path:
    (at / "secret").write_text(SECRET)
    return at / "secret"


def weights_that_are_a_link(at: Path, marker: Path):
    folder = model_folder(at)
    (folder / SINGLE).rename(at / SINGLE)
    (folder / SINGLE).symlink_to(at / SINGLE)
    read_folder(folder)


def a_tokenizer_that_is_a_link(at: Path, marker: Path):
    (at / "hf").mkdir()
    (at / "hf" / "any.model").symlink_to(secret_file(at))
    tokenizer_files.read_tokenizer(at / "hf")


def a_chat_template_that_is_a_link(at: Path, marker: Path):
    from jaxlm.tuning.source import Source
    from jaxlm.tuning.writing import find_template

    folder = model_folder(at)
    (folder / "chat_template.jinja").symlink_to(secret_file(at))
    opened = Source.__new__(Source)  # of a source only the places are looked at
    object.__setattr__(opened, "folder", folder)
    object.__setattr__(opened, "step_dir", None)
    assert SECRET not in find_template("", opened)


CASES = (
    pickled_weights,
    pickled_weights_that_are_allowed,
    a_store_of_objects,
    an_index_of_objects,
    a_checkpoint_with_pickles,
    yaml_for_config_json,
    python_for_config_json,
    a_tokenizer_of_another_kind,
    templates_that_climb,
    a_template_that_never_ends,
    a_template_that_fills_the_memory,
    an_index_that_names_a_file_elsewhere,
    an_index_that_names_an_absolute_path,
    weights_that_are_a_link,
    a_tokenizer_that_is_a_link,
    a_chat_template_that_is_a_link,
)


def check_harmless(read, folder: Path) -> None:
    """Refused by a typed error that does not show what it must not, and no code has run."""
    folder.mkdir()
    marker = folder.parent / "marker"
    with pytest.raises(REFUSED) as error:
        read(folder, marker)
    assert not marker.exists(), "the file's code has run"
    assert str(error.value) and SECRET not in str(error.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.replace("_", " "))
def test_what_would_do_harm_is_refused(case, tmp_path):
    check_harmless(case, tmp_path / "theirs")


def test_code_beside_a_model_is_not_run(tmp_path):
    folder, marker = model_folder(tmp_path), tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "config.py", "__init__.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.C", "AutoModel": "modeling_evil.M"}
    (folder / "config.json").write_text(json.dumps(config | {"trust_remote_code": True}))
    assert convert.read_source(str(folder)).vocab_size == config["vocab_size"]
    assert not marker.exists()


def believe_pickles(at: Path, marker: Path):
    (at / "a.npy").write_bytes(payload(marker))
    np.load(at / "a.npy", allow_pickle=True)
    raise ValueError("too late")


def believe_names(at: Path, marker: Path):
    (at / "index.json").write_text(json.dumps({"a": str(secret_file(at))}))
    raise ValueError(Path(json.loads((at / "index.json").read_text())["a"]).read_text())


def believe_templates(at: Path, marker: Path):
    import jinja2

    command = f"\"touch '{marker}'\""
    jinja2.Template(ESCAPES[1].replace("CMD", command)).render()
    raise ValueError("too late")


@pytest.mark.parametrize("wrong", [believe_pickles, believe_names, believe_templates])
def test_a_reader_that_believes_is_caught(wrong, tmp_path):
    with pytest.raises(AssertionError):
        check_harmless(wrong, tmp_path / "theirs")


def test_a_config_is_python_only_where_the_user_names_a_python_file(tmp_path):
    """The counterpart: what the README says of --config=FILE.py."""
    marker = tmp_path / "marker"
    (tmp_path / "mine.py").write_text(
        f"from ml_collections import ConfigDict\nopen({str(marker)!r}, 'w')\n"
        "def get_config():\n    return ConfigDict(dict(seed=0))\n"
    )
    assert read_config(str(tmp_path / "mine.py")).seed == 0
    assert marker.exists()


def test_error_of_an_unreadable_config_names_its_file(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(REFUSED, match=r"config\.json"):
        read_config(str(tmp_path / "config.json"))
