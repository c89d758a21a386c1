"""Commands of the objectives' pages, and of those that nobody follows to the letter, have flags and fields that are there."""

import shlex

import pytest

from tests.docs.test_how_to import FOLLOWED
from tests.readme.markdown import read_commands
from tests.readme.reading import read_python
from tests.tiny import ROOT

PAGES = [*(ROOT / "docs" / "objectives").glob("*.md"), *(ROOT / "docs" / "how_to").glob("*.md")]
COMMANDS = [
    command.text
    for page in sorted(PAGES)
    if page.name not in FOLLOWED
    for command in read_commands(page)
    if command.text.startswith("python -m jaxlm")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_flags_and_its_config_are_known(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    read_python(shlex.split(command))
