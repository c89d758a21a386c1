"""What a wheel holds, and that recipes are found in it; see test_installed.py for a real installation."""

import configparser
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from jaxlm import config_files
from tests.package.wheels import ROOT, build, copy_of_the_tree

ENTRYPOINTS = ("pretrain", "finetune", "evaluate", "generate")
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").glob("**/*.py")
    if "def get_config(" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_of_the_tree(tmp_path_factory.mktemp("package") / "tree")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return zipfile.ZipFile(build(tree, "wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Where the wheel lies, as `pip install --target` would have it."""
    site = tmp_path_factory.mktemp("site")
    wheel.extractall(site)
    return site


def files_below(*folders: str) -> set[str]:
    found = [path for folder in folders for path in (ROOT / folder).glob("**/*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def test_a_wheel_has_the_package_the_recipes_and_the_tools_and_no_other_top_level(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    shipped = {name for name in names if name.startswith("jaxlm/shipped/")}
    assert names - shipped == files_below("jaxlm")
    recipes = {name for name in files_below("configs") if name.endswith(".py")}
    tools = {name for name in shipped if name.startswith("jaxlm/shipped/tools/")}
    assert shipped - tools == {f"jaxlm/shipped/{name}" for name in recipes | {"requirements.txt"}}
    assert {name.removeprefix("jaxlm/shipped/") for name in tools} <= files_below("tools")
    assert "jaxlm/shipped/tools/convert_checkpoint.py" in tools
    assert {name for name in tools if "demo_page" in name} == {
        f"jaxlm/shipped/{name}" for name in files_below("tools/demo_page")
    }


def test_its_metadata_is_valid_and_says_what_it_needs(wheel):
    (path,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Metadata.from_email(wheel.read(path), validate=True)
    assert str(metadata.requires_python) == ">=3.11"
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert {"tpu", "cuda12", "hf", "eval", "plan", "dev"} <= set(metadata.provides_extra)
    needed = {str(r) for r in metadata.requires_dist if not r.marker}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert len(needed) == len([line for line in lines if line and not line.startswith("#")])


def test_a_tool_of_the_wheel_imports_only_tools_that_are_there(wheel):
    names = [name for name in wheel.namelist() if name.startswith("jaxlm/shipped/tools/")]
    shipped = {Path(name).stem for name in names}
    imported = {
        found[1]
        for name in names
        for found in re.finditer(
            r"^ *(?:from|import) tools\.(\w+)", wheel.read(name).decode(), re.M
        )
    }
    assert imported and imported <= shipped


def test_every_console_script_starts_what_it_names(wheel):
    (path,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(path).decode())
    scripts = dict(parser["console_scripts"])
    assert set(scripts) == {f"jaxlm-{name}" for name in (*ENTRYPOINTS, "tool")}
    for script, target in scripts.items():
        module, _, function = target.partition(":")
        assert module == script.replace("-", ".") and function == "command"
        assert f"def {function}() -> None:" in wheel.read(f"{module.replace('.', '/')}.py").decode()


def test_a_wheel_that_is_made_from_the_source_distribution_is_the_same(tree, wheel, tmp_path):
    sdist = build(tree, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("jaxlm-*")
    again = zipfile.ZipFile(build(unpacked, "wheel", tmp_path / "wheel"))
    assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_an_editable_install_is_the_clone_itself_so_that_configs_and_tools_are_found(
    tree, tmp_path
):
    made = zipfile.ZipFile(build(tree, "editable", tmp_path / "editable"))
    (path,) = [name for name in made.namelist() if ".dist-info/" not in name]
    assert made.read(path).decode().split() == [str(tree)]


def python(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A child that imports jaxlm from the wheel's files, in a folder that is no clone."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


# The clone is on the path of the environment that runs these tests, and must not help.
READ = """
import json, sys
clone, *specs = sys.argv[1:]
sys.path.remove(clone)
from jaxlm import config_files
print(json.dumps([json.loads(config_files.read_config(spec).to_json()) for spec in specs]))
used = [module.__file__ for name, module in sys.modules.items() if name.startswith(("jaxlm.", "configs."))]
assert not [path for path in used if path and path.startswith(clone)], used
"""


def read_outside(installed: Path, folder: Path, *specs: str) -> list:
    done = python(installed, folder, "-c", READ, str(ROOT), *specs)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_recipe_is_found_outside_a_clone_and_is_the_clones(installed, tmp_path):
    ours = [json.loads(config_files.read_config(str(ROOT / spec)).to_json()) for spec in RECIPES]
    assert read_outside(installed, tmp_path, *RECIPES) == ours


def test_a_recipe_of_the_current_folder_goes_first_and_may_use_jaxlms(installed, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("SEED = 7\n")
    (tmp_path / "configs" / "gpt.py").write_text(
        "from configs import bert, mine\n"
        "def get_config(name='tiny'):\n"
        "    config = bert.get_config(name)\n"
        "    config.seed = mine.SEED\n"
        "    return config\n"
    )
    (config,) = read_outside(installed, tmp_path, "configs/gpt.py:tiny")
    assert config["seed"] == 7 and config["objective"]["name"] == "mlm"


def test_a_tool_of_the_wheel_is_started_by_its_name(installed, tmp_path):
    listed = python(installed, tmp_path, "-m", "jaxlm.tool")
    assert listed.returncode == 0 and "convert_checkpoint" in listed.stdout, listed.stderr
    wrong = python(installed, tmp_path, "-m", "jaxlm.tool", "fsk")
    assert wrong.returncode == 1 and "no tool 'fsk'; did you mean fsck?" in wrong.stderr
    done = python(installed, tmp_path, "-m", "jaxlm.tool", "plot_run", "nowhere")
    assert done.returncode == 2 and "expected: the workdirs of runs" in done.stderr
