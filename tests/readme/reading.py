"""Reads a command's flags and config as its program would, in this process, and stops before it does anything."""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from absl import app, flags
from packaging.requirements import Requirement

from tests.readme.markdown import ROOT


class Parsed(Exception):
    """The flags are read; what they are, where they are argparse's."""


@contextmanager
def stopped_after_flags() -> Iterator[None]:
    """absl's and argparse's programs end by `Parsed`; flags that they define are forgotten at the end."""
    known, parse_args = set(flags.FLAGS), argparse.ArgumentParser.parse_args

    def run(main, argv=None):
        rest = flags.FLAGS(argv or sys.argv)[1:]
        raise Parsed(rest)

    def parse(parser, args=None, namespace=None):
        raise Parsed(parse_args(parser, args, namespace))

    with mock.patch.object(app, "run", run), mock.patch.object(argparse.ArgumentParser, "parse_args", parse):  # fmt: skip
        try:
            yield
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)


def read_python(words: list[str]) -> None:
    """`python -m MODULE …` or `python FILE …`: raises what the program says of a wrong flag or config."""
    if words[1] == "-m":
        start = lambda: runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        start = lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    arguments = words[2 + (words[1] == "-m") :]
    with mock.patch.object(sys, "argv", [words[1], *arguments]), stopped_after_flags():
        try:
            start()
        except Parsed as parsed:
            (found,) = parsed.args
        else:
            raise AssertionError(f"{shlex.join(words)} ended without reading flags")
    if isinstance(found, list):
        assert not found, f"{shlex.join(words)}: {found} are no flags"
    elif words[1] == "tools/sweep.py":
        after = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
        first = [f"--config.{grid.split(',')[0]}" for grid in found.grid]
        command = ["python", "-m", found.entrypoint, f"--config={found.config}", "--workdir=S", *first, *after]  # fmt: skip
        read_python(command)


def read_install(text: str) -> None:
    """`pip install …`: files are there, extras are pyproject.toml's, other requirements can be read."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    words = iter(shlex.split(text))
    for word in words:
        if word == "-r":
            assert (ROOT / next(words)).is_file()
        elif not word.startswith("-") and word not in ("pip", "install"):
            named = Requirement(word.replace(".[", "jaxlm[", 1) if word.startswith(".") else word)
            if named.name == "jaxlm":
                assert named.extras <= set(extras), f"{word}: pyproject.toml has {sorted(extras)}"


def within(words: list[str]) -> Iterator[str]:
    """Commands that a command for another machine gives to a shell or a launcher there."""
    for word in words[1:]:
        if " " in word:
            inner = re.sub(r"^--\w+=", "", word)
            yield from (part.strip() for part in inner.split("&&"))
    if "python" in words[1:]:
        yield shlex.join(words[words.index("python") :])


def read_other(text: str) -> None:
    """A command of another program: what can be known of it here."""
    words = shlex.split(text)
    parts = [part for part in [text, *within(words)] if not re.match("cd |git clone ", part)]
    for part in parts:
        program, *rest = shlex.split(part)
        if program == "pip" and rest[0] == "install":
            read_install(part.partition("&&")[0])
        elif program == "python" and rest[0] != "-c":
            read_python(shlex.split(part))
        elif program == "pytest":
            missing = [word for word in rest if "/" in word and not (ROOT / word).exists()]
            assert not missing, f"{part}: {missing} are not there"
        elif program == "bash":
            script = (ROOT / rest[0]).read_text(encoding="utf-8")
            assert all(word in script for word in rest[1:] if word.startswith("--")), part
