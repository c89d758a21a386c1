"""Reads a command's flags and config as its program would, in this process, and stops before it does anything."""

import argparse
import math
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

from absl import app, flags
from ml_collections import ConfigDict
from packaging.requirements import Requirement

from jaxlm import config_checks
from tests.readme.markdown import ROOT


class Parsed(Exception):
    """The flags are read: (argparse's, or the words that are no flags; the config, where there is one)."""


class Machine(NamedTuple):
    """What `check_config` asks of a mesh, of more devices than are here."""

    shape: dict[str, int]

    @property
    def size(self) -> int:
        return math.prod(self.shape.values())


def check_fits(config: ConfigDict, devices: int) -> None:
    """Raises what a run would, if the config's mesh is not of so many devices or does not divide its sizes."""
    sizes = config.mesh.to_dict()
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    assert math.prod(shape.values()) == devices, f"a mesh of {sizes} on {devices} devices"
    tokenizer = SimpleNamespace(vocab_size=config.model.vocab_size)
    config_checks.check_config(config, Machine(shape), tokenizer, 0)


@contextmanager
def stopped_after_flags() -> Iterator[None]:
    """absl's and argparse's programs end by `Parsed`; flags that they define are forgotten at the end."""
    known, parse_args = set(flags.FLAGS), argparse.ArgumentParser.parse_args

    def run(main, argv=None, flags_parser=flags.FLAGS):
        rest = flags_parser(argv or sys.argv)[1:]
        raise Parsed(rest, flags.FLAGS.config if "config" in flags.FLAGS else None)

    def parse(parser, args=None, namespace=None):
        raise Parsed(parse_args(parser, args, namespace), None)

    with mock.patch.object(app, "run", run), mock.patch.object(argparse.ArgumentParser, "parse_args", parse):  # fmt: skip
        try:
            yield
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)


def read_python(words: list[str], devices: int = 0) -> None:
    """`python -m MODULE …` or `python FILE …`: raises what the program says of a wrong flag or config.

    devices: of the machine, which a training config must fit, too; 0: any.
    """
    if words[1] == "-m":
        start = lambda: runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        start = lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    arguments = words[2 + (words[1] == "-m") :]
    with mock.patch.object(sys, "argv", [words[1], *arguments]), stopped_after_flags():
        try:
            start()
        except Parsed as parsed:
            found, config = parsed.args
        else:
            raise AssertionError(f"{shlex.join(words)} ended without reading flags")
    if devices and config is not None:
        check_fits(config, devices)
    if isinstance(found, list):
        assert not found, f"{shlex.join(words)}: {found} are no flags"
    elif words[1] == "tools/sweep.py":
        after = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
        first = [f"--config.{grid.split(',')[0]}" for grid in found.grid]
        command = ["python", "-m", found.entrypoint, f"--config={found.config}", "--workdir=S", *first, *after]  # fmt: skip
        read_python(command)


def read_install(words: list[str]) -> None:
    """What follows `pip install`: files are there, extras are pyproject.toml's, other requirements can be read."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for flag, word in zip(["", *words], words, strict=False):
        if word.startswith("-"):
            continue
        if flag == "-r":
            assert (ROOT / word).is_file()
            continue
        named = Requirement(f"jaxlm{word[1:]}" if word.startswith(".") else word)
        unknown = named.extras - set(project["optional-dependencies"])
        assert named.name != "jaxlm" or not unknown, f"{word}: pyproject.toml has no {unknown}"


def within(words: list[str]) -> Iterator[str]:
    """Commands that a command for another machine gives to a shell or a launcher there."""
    for word in words[1:]:
        if " " in word:
            inner = re.sub(r"^--\w+=", "", word)
            yield from (part.strip() for part in inner.split("&&"))
    if "python" in words[1:]:
        yield shlex.join(words[words.index("python") :])


def read_other(text: str, devices: int = 0) -> None:
    """A command of another program: what can be known of it here."""
    words = shlex.split(text)
    parts = [part for part in [text, *within(words)] if not re.match("cd |git clone ", part)]
    for part in parts:
        program, *rest = shlex.split(part)
        program = program.rpartition("/")[2]
        if program == "pip" and rest[0] == "install":
            read_install(rest[1 : rest.index("&&") if "&&" in rest else None])
        elif program == "python" and rest[0] != "-c":
            read_python(shlex.split(part), devices)
        elif program == "pytest":
            missing = [word for word in rest if "/" in word and not (ROOT / word).exists()]
            assert not missing, f"{part}: {missing} are not there"
        elif program == "bash":
            script = (ROOT / rest[0]).read_text(encoding="utf-8")
            assert all(word in script for word in rest[1:] if word.startswith("--")), part
