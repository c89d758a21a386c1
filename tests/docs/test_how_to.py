"""The pages of how to add something are followed to the letter, in a copy of the repository."""

import json
import shlex
import shutil
from pathlib import Path

import jax
import pytest

from tests.docs import walk
from tests.readme.reading import read_python
from tests.tiny import ROOT

HOW_TO = ROOT / "docs" / "how_to"
TREE = ("jaxlm", "configs", "tests", "docs", "mkdocs.yml", "pyproject.toml", "README.md")
# One device, and the programs that earlier runs of the tests have compiled.
CACHE = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}


@pytest.fixture
def copy(tmp_path):
    """The repository, without what it is not made of."""
    target = tmp_path / "jaxlm"
    target.mkdir()
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target / name, ignore=ignore)
        else:
            shutil.copy(source, target)
    return target


def follow(page: str, root: Path, *, with_commands: bool = True) -> str:
    """All that a page says to do, in its order; what its commands print."""
    printed = ""
    for block in walk.blocks_of((HOW_TO / page).read_text("utf-8")):
        if block.title:
            walk.write(block, root)
        elif block.language == "bash" and with_commands:
            printed += walk.run(block.text, root, XLA_FLAGS="", **CACHE)
    return printed


def check_style(page: str, root: Path) -> None:
    """The Python files that a page makes are formatted and linted as all others are."""
    made = [b.title for b in walk.blocks_of((HOW_TO / page).read_text("utf-8")) if b.title]
    files = " ".join(sorted({name for name in made if name.endswith(".py")}))
    walk.run(f"python -m ruff check {files} && python -m ruff format --check {files}", root)


def losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_an_objective_is_added_by_following_the_page(copy):
    printed = follow("add_an_objective.md", copy)
    check_style("add_an_objective.md", copy)
    assert "5 passed" in printed
    found = losses(copy / "W")
    assert found[-1] < found[0] - 1, found


@pytest.mark.slow
@pytest.mark.smoke
def test_a_task_is_added_by_following_the_page(copy):
    printed = follow("add_a_task.md", copy)
    assert "4 passed" in printed
    found = losses(copy / "F")
    assert found[-1] < found[0] / 2, found
    report = json.loads((copy / "F" / "report.json").read_text("utf-8"))
    assert report["dev"]["accuracy"] > 0.8


def test_the_changes_that_add_a_task_fit_the_code(copy):
    follow("add_a_task.md", copy, with_commands=False)
    check_style("add_a_task.md", copy)


def test_mixing_text_takes_flags_and_fields_that_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = walk.blocks_of((HOW_TO / "add_a_dataset.md").read_text("utf-8"))
    (command,) = [block.text for block in blocks if block.language == "bash"]
    read_python(shlex.split(command.replace("\\\n", " ")))


def test_a_change_of_lines_that_are_not_there_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    walk.write(walk.Block("diff", "a.py", " x = 1\n+z = 3\n"), tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 1\nz = 3\ny = 2\n"
    with pytest.raises(AssertionError, match="0 times"):
        walk.write(walk.Block("diff", "a.py", "-x = 2\n+x = 3\n"), tmp_path)
