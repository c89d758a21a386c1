"""The README's troubleshooting names messages as the code says them."""

import ast
import re

from tests import tiny

# What others say: XLA's sentence is held by tests/parallel/test_xla_flags.py, the name of a group of seconds by goodput's tests.
OF_OTHERS = {"Unknown flag in XLA_FLAGS"}


def table_of(markdown):
    """The first cells of the section's rows."""
    section = markdown.split("\n## Troubleshooting\n")[1].split("\n## ")[0]
    rows = [
        line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if "| " in line
    ]
    return rows[2:]


def texts_of_the_code():
    """All that a string in jaxlm holds between the places that are filled in."""
    for path in (tiny.ROOT / "jaxlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def unsaid(rows, texts):
    """The messages in backticks that no text holds."""
    said = "\n".join(texts)
    named = {message for row in rows for message in re.findall("`([^`]+)`", row)}
    return sorted(message for message in named - OF_OTHERS if message not in said)


def test_every_message_of_the_troubleshooting_is_one_that_the_code_has():
    rows = table_of((tiny.ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(rows) >= 10
    assert not unsaid(rows, texts_of_the_code())


def test_the_law_fails_for_a_message_that_nobody_says():
    assert unsaid(["`the moon is full`, `holds another run`"], ["W holds another run"]) == [
        "the moon is full"
    ]
