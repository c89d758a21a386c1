"""A page of how to do something, done: its blocks with a title are files or changes to files, its bash blocks are run.

And the site of all pages, built.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r'^(`{3,})(\w+)(?: title="([^"]+)")?\n(.*?)^\1$', re.M | re.S)


class Block(NamedTuple):
    """language: of the fence. title: the file that it is about, or ''. text: what it holds."""

    language: str
    title: str
    text: str


def build_site(output: Path) -> Path:
    """The documentation as a folder of HTML; a warning fails."""
    run(f"python tools/build_docs.py --output={output}", ROOT)
    return output


def blocks_of(page: str) -> list[Block]:
    return [Block(match[2], match[3] or "", match[4]) for match in FENCE.finditer(page)]


def write(block: Block, root: Path) -> None:
    """Makes the file that a block is, or the change that it says."""
    path = root / block.title
    if block.language != "diff":
        assert not path.exists(), f"{block.title} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, "utf-8")
        return
    before, after = sides(block.text)
    text = path.read_text("utf-8")
    assert text.count(before) == 1, f"{block.title} has this {text.count(before)} times:\n{before}"
    path.write_text(text.replace(before, after), "utf-8")


def sides(diff: str) -> tuple[str, str]:
    """(before, after) of the lines of a diff."""
    lines = diff.splitlines(keepends=True)
    before, after = ([line[1:] for line in lines if line[0] in kind] for kind in (" -", " +"))
    return "".join(before), "".join(after)


def run(command: str, root: Path, **environment: str) -> str:
    """What a bash block prints; it must end well, and `python` is this one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=root,
        env={**os.environ, **environment, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
