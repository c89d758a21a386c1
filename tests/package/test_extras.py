"""pyproject.toml's extras: what messages and pages tell people to install is there, and what jaxlm imports is asked for."""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jaxlm.doctor.versions import read_requirements

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PROJECT["optional-dependencies"].items()
}
OF_DEVELOPERS = {"dev", "laws", "docs", "oracles", "browser"}
OF_USERS = EXTRAS.keys() - OF_DEVELOPERS
# 'jaxlm[eval]', '.[dev,docs]', and the package by its path.
NAMED = re.compile(r"(?:jaxlm|['\" ]\.|\$ROOT)\[([a-z0-9_,-]+)\]")
# What the oracle of a conversion is; who has no torch has no file of it to read.
ONLY_WHERE_PRESENT = {"torch", "transformers"}


def texts() -> dict[str, str]:
    """What people read, and what tells them what to install: code, scripts, pages."""
    patterns = ("jaxlm/**/*.py", "configs/**/*.py", "tools/*.*", "colab/**/*.py", "docs/**/*.md")
    paths = [path for pattern in (*patterns, "*.md") for path in ROOT.glob(pattern)]
    names = {str(path.relative_to(ROOT)): path for path in paths}
    # The history says what extras were called.
    past = ("CHANGELOG.md", "docs/decisions.md")
    return {name: p.read_text(encoding="utf-8") for name, p in names.items() if name not in past}


def unknown_extras(texts: dict[str, str]) -> list[str]:
    return [
        f"{name}: [{extra}]"
        for name, text in texts.items()
        for found in NAMED.finditer(text)
        for extra in found[1].split(",")
        if extra not in EXTRAS
    ]


def test_every_extra_that_is_named_anywhere_is_one():
    assert sum(len(NAMED.findall(text)) for text in texts().values()) > 15
    assert unknown_extras(texts()) == []


def test_an_extra_that_is_none_is_found():
    wrong = {"a.py": "pip install 'jaxlm[harness]'", "b.md": "pip install -e '.[dev,gpus]'"}
    assert unknown_extras(wrong) == ["a.py: [harness]", "b.md: [gpus]"]


def around_extras(texts: dict[str, str]) -> list[str]:
    """Where a text tells people to install, by its own name, what an extra brings."""
    brought = {r.name for extra in OF_USERS for r in EXTRAS[extra]} - {"jax"}
    brought |= {name.replace("-", "_") for name in brought}
    names = "|".join(map(re.escape, sorted(brought, key=len, reverse=True)))
    pattern = re.compile(rf"pip install [^\n]*?\b(?<!\[)({names})\b(?!\])")
    return [
        f"{name}: {found[0]}" for name, text in texts.items() for found in pattern.finditer(text)
    ]


def test_what_an_extra_brings_is_installed_by_the_extra():
    assert around_extras(texts()) == []


def test_a_package_named_beside_its_extra_is_found():
    assert around_extras({"a.py": "pip install 'pyarrow>=17'", "b.py": "pip install wandb"}) == [
        "a.py: pip install 'pyarrow",
        "b.py: pip install wandb",
    ]
    assert around_extras({"a.py": "pip install 'jaxlm[wandb]'"}) == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_of_extras_names_extras(extra):
    for requirement in EXTRAS[extra]:
        if requirement.name == "jaxlm":
            assert requirement.extras <= EXTRAS.keys()


def asked_for() -> set[str]:
    """The distributions that come with jaxlm and the extras of its users: these, and those that they need in turn."""
    found: set[str] = set()
    todo = read_requirements(ROOT / "requirements.txt")
    todo += [requirement for extra in OF_USERS for requirement in EXTRAS[extra]]
    while todo:
        name = canonicalize_name(todo.pop().name)
        if name in found:
            continue
        found.add(name)
        try:
            todo += [r for r in map(Requirement, requires(name) or ()) if not r.marker]
        except PackageNotFoundError:  # of an extra that is not installed here
            pass
    return found


def test_what_jaxlm_imports_is_asked_for():
    own = {"jaxlm", *sys.stdlib_module_names, *ONLY_WHERE_PRESENT}
    found = {
        module.split(".")[0]: str(path.relative_to(ROOT))
        for path in (ROOT / "jaxlm").glob("**/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for module in modules(node)
    }
    asked, distributions = asked_for(), packages_distributions()
    absent = {
        f"{module} ({path})"
        for module, path in found.items()
        if module not in own
        and not asked & set(map(canonicalize_name, distributions.get(module, [module])))
    }
    assert not absent


def modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
