"""The documentation site is built without a warning, and has a page for each objective and a place for each module."""

import html
import inspect
import re
from pathlib import Path

import pytest
import yaml

from jaxlm.config_files import read_config
from jaxlm.objectives import OBJECTIVES
from tests.docs.walk import blocks_of, build_site
from tests.tiny import ROOT
from tools import build_docs

DOCS = ROOT / "docs"
CONFIG = re.compile(r"--config=(\S+)")
LAW = re.compile(r"\[`(tests/\S+\.py)`\]\(\S+\) holds it to:\n\n((?:- `\w+`\n?)+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build_site(tmp_path_factory.mktemp("docs") / "site")


def drawing_of(docstring: str) -> list[str]:
    """The lines of a docstring that are columns, and so drawn."""
    return [line.strip() for line in docstring.split("\n") if re.search(r"\S {3,}\S", line)]


def options_of(kind: type) -> set[str]:
    """The arguments of an objective that a config's group can set."""
    return set(inspect.signature(kind).parameters) - {"tokenizer"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_a_page_with_its_picture_and_its_options(site, name):
    page = (site / "objectives" / name / "index.html").read_text("utf-8")
    drawn = html.unescape(
        re.sub(r"<[^>]+>", "", "".join(re.findall(r"<pre>.*?</pre>", page, re.S)))
    )
    lines = drawing_of(OBJECTIVES[name].__doc__)
    assert lines and [line for line in lines if line not in drawn] == []
    table = "".join(re.findall(r"<table>.*?</table>", page, re.S))
    assert {option for option in options_of(OBJECTIVES[name]) if option not in table} == set()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objectives_page_has_a_command_that_takes_it_and_laws_that_are_there(name):
    page = (DOCS / "objectives" / f"{name}.md").read_text("utf-8")
    commands = "".join(block.text for block in blocks_of(page) if block.language == "bash")
    assert [read_config(spec, {}).objective.name for spec in CONFIG.findall(commands)] == [name]
    ((path, laws),) = LAW.findall(page)
    tests = (ROOT / path).read_text("utf-8")
    assert [law for law in re.findall(r"\w+", laws) if f"def {law}(" not in tests] == []


def is_documented(path: Path) -> bool:
    """Modules of jaxlm, and recipes."""
    return path.is_relative_to(ROOT / "jaxlm") or "def get_config" in path.read_text("utf-8")


def test_every_module_and_recipe_is_in_the_reference(site):
    pages = "".join(p.read_text("utf-8") for p in (site / "reference").rglob("index.html"))
    files = [*(ROOT / "jaxlm").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]
    named = [path.relative_to(ROOT).with_suffix("") for path in files if is_documented(path)]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in named} - {"jaxlm"}
    assert {module for module in modules if f'id="{module}"' not in pages} == set()


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))

    def pages_of(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            page
            for part in (entry.values() if isinstance(entry, dict) else entry)
            for page in pages_of(part)
        ]

    found = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert set(pages_of(settings["nav"])) == {"readme.md", *found}


def test_links_lead_to_the_site_where_it_has_the_file_and_else_to_the_repository():
    mend = lambda link, page: build_docs.mended(link, ROOT / page, ROOT, "https://host/repo")
    assert mend("planning.md", "docs/guide/scaling.md") == "planning.md"
    assert mend("../../README.md", "docs/guide/scaling.md") == "../readme.md"
    assert mend("docs/guide/scaling.md", "README.md") == "guide/scaling.md"
    assert mend("configs/gpt.py", "README.md") == "https://host/repo/blob/main/configs/gpt.py"
    assert mend("https://example.org/a", "README.md") == "https://example.org/a"
