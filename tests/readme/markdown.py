"""The commands of the pages for users: fenced bash, and code in the text that begins with a program or with flags."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "guide").glob("*.md")),
    *sorted((ROOT / "docs" / "objectives").glob("*.md")),
)

# What a command in the running text begins with.
PROGRAMS = ("python", "pip", "bash", "pytest", "jaxlm-")
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMENT = re.compile(r"\s+# .*$")
ASSIGNED = re.compile(r"[A-Z]\w*=")


class Command(NamedTuple):
    """One command as a page has it, on one line."""

    page: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def read_commands(page: Path) -> list[Command]:
    """All commands of a page, in its order."""
    name = page.relative_to(ROOT).as_posix()
    return [Command(name, line, text) for line, text in find_commands(page.read_text("utf-8"))]


def find_commands(markdown: str) -> Iterator[tuple[int, str]]:
    """(line, command) of each; lines count from 1."""
    for first, language, lines in _parts(markdown):
        if language in ("", "bash"):
            yield from (_of_block if language else _of_text)(lines, first)


def find_python(markdown: str) -> Iterator[tuple[int, str]]:
    """(line, code) of each fenced block of Python."""
    for first, language, lines in _parts(markdown):
        if language == "python":
            yield first, "\n".join(lines)


def _parts(markdown: str) -> Iterator[tuple[int, str, list[str]]]:
    """(first line, language, lines) of fenced blocks, and with language '' of paragraphs and rows of tables."""
    language, lines = "", list[str]()
    for number, line in enumerate([*markdown.splitlines(), ""], 1):
        is_fence, is_row = line.lstrip().startswith("```"), line.startswith("|")
        if not is_fence and (language or (line.strip() and not is_row)):
            lines.append(line)
            continue
        yield number - len(lines), language, lines
        if is_row:
            yield number, "", [line]
        if is_fence:
            language = "" if language else line.strip().removeprefix("```") or "text"
        lines = []


def _of_text(lines: list[str], first: int) -> Iterator[tuple[int, str]]:
    text = "\n".join(lines)
    for found in CODE.finditer(text):
        code = " ".join(found[1].split())
        is_flags = code.startswith("--") and ("=" in code or " " in code)
        if is_flags or code.startswith(("… ", "…:")) or (code.startswith(PROGRAMS) and " " in code):
            yield first + text[: found.start()].count("\n"), code


def _of_block(lines: list[str], first: int) -> Iterator[tuple[int, str]]:
    """What ends in a backslash or within quotes goes on; a line of assignments is put into what follows."""
    variables, begun, start = dict[str, str](), "", first
    for number, line in enumerate(lines, first):
        start = start if begun else number
        text = begun + line.removesuffix("\\")
        try:
            words = shlex.split(text, comments=True)
        except ValueError:  # no closing quotation
            words = []
            line += "\\"
        begun = text + " " if line.endswith("\\") else ""
        if begun or not words:
            continue
        if all(ASSIGNED.match(word) for word in words):
            variables |= dict(word.split("=", 1) for word in words)
            continue
        for name, value in variables.items():
            text = text.replace(f"${name}", value)
        yield start, COMMENT.sub("", " ".join(text.split()))
