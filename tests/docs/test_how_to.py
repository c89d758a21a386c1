"""The pages of how to add something are followed to the letter, in a copy of the repository."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from tests.docs import walk
from tests.tiny import ROOT

PAGES = sorted((ROOT / "docs" / "how_to").glob("add_*.md"))
TREE = ("jaxlm", "configs", "tests", "docs", "mkdocs.yml", "pyproject.toml", "README.md")
# One device, and the programs that earlier runs of the tests have compiled.
CACHE = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}


@pytest.fixture
def copy(tmp_path):
    """The repository, without what it is not made of."""
    for name in TREE:
        source, ignore = ROOT / name, shutil.ignore_patterns("__pycache__", "data")
        target = tmp_path / "jaxlm" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore if name == "tests" else None)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return tmp_path / "jaxlm"


def follow(page: Path, root: Path) -> str:
    """All that a page says to do, in its order; what its commands print."""
    printed = ""
    for block in walk.blocks_of(page.read_text("utf-8")):
        if block.title:
            walk.write(block, root)
        elif block.language == "bash":
            printed += walk.run(block.text, root, XLA_FLAGS="", **CACHE)
    return printed


def losses(workdir: Path, key: str) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_change_of_a_page_fits_the_code(page, copy):
    for block in walk.blocks_of(page.read_text("utf-8")):
        if block.title:
            walk.write(block, copy)


def test_an_objective_is_added_by_following_the_page(copy):
    printed = follow(ROOT / "docs" / "how_to" / "add_an_objective.md", copy)
    assert "5 passed" in printed
    found = losses(copy / "W", "loss")
    assert found[-1] < found[0] - 1, found


@pytest.mark.slow
@pytest.mark.smoke
def test_a_task_is_added_by_following_the_page(copy):
    printed = follow(ROOT / "docs" / "how_to" / "add_a_task.md", copy)
    assert "4 passed" in printed
    found = losses(copy / "F", "loss")
    assert found[-1] < found[0] / 2, found
    report = json.loads((copy / "F" / "report.json").read_text("utf-8"))
    assert report["dev"]["accuracy"] > 0.8
