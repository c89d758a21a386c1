"""What a program ends with: one status for each kind of error, a message without a traceback, and a meaning that is written down."""

import subprocess
import sys

import pytest

from jaxlm import exits
from tests import tiny

ERRORS = [
    error
    for error in vars(exits).values()
    if isinstance(error, type) and issubclass(error, exits.RunError)
]
PROGRAM = """
import sys
from jaxlm import exits

@exits.with_status
def main(name):
    arguments = ([],) if name == "Diverged" else ()
    raise getattr(exits, name)("what was found", *arguments)

main(sys.argv[1])
"""


def end_of(name):
    command = [sys.executable, "-c", PROGRAM, name]
    result = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stderr


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_of_a_run_is_its_message_and_its_status(error):
    assert end_of(error.__name__) == (error.status, "what was found\n")


def test_every_status_has_a_meaning_and_every_kind_of_error_its_own_status():
    own = [error.status for error in ERRORS if error is not exits.RunError]
    assert len(set(own)) == len(own) and exits.FAILED not in own
    assert {*own, exits.DONE, exits.FAILED, exits.PEER_LOST, exits.HUNG} == set(exits.MEANINGS)


def test_the_readme_has_the_statuses():
    readme = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("### How a run ends")[1].split("### ")[0]
    for status, meaning in exits.MEANINGS.items():
        assert f"\n| {status} | {meaning}" in table, status
