"""Checks every byte of checkpoints and token stores against what was written: `python tools/fsck.py W …`, each a workdir, one
of its checkpoints, or a token store. It needs no accelerator and no model, and changes nothing.

A line for each: ok, or damaged and by what. Exit status 0, or 65 if something is damaged.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from absl import logging as absl_logging

from jaxlm import exits
from jaxlm.build import is_store
from jaxlm.data import store_check
from jaxlm.files import absolute
from jaxlm.training import stored
from jaxlm.training.checkpoints import FOLDER, find_steps


def find(path: Path) -> Iterator[tuple[Path, Callable[[Path], list[str]]]]:
    """What there is to check at a path, each with the function that says what is wrong with it."""
    if is_store(str(path)):
        yield path, store_check.problems
        return
    if (path / "params").is_dir() or (path / "manifest").is_dir():
        yield path, stored.problems
        return
    checkpoints = path / FOLDER if (path / FOLDER).is_dir() else path
    for step in find_steps(checkpoints):
        yield checkpoints / str(step), stored.problems
    stores = sorted((path / "store").iterdir()) if (path / "store").is_dir() else []
    for store in stores:  # whether or not it still has a manifest
        if store.is_dir() and not store.name.endswith(".partial"):
            yield store, store_check.problems


def report(path: Path, problems: list[str]) -> str:
    if problems:
        return "\n    ".join([f"damaged  {path}", *"\n".join(problems).splitlines()])
    old = (path / "manifest").is_dir() and not stored.has_checksums(stored.read_manifest(path))
    return f"ok       {path}" + " (of an older version, without checksums: it can be read)" * old


@exits.with_status
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="W", help="a workdir, a checkpoint or a store")
    args = parser.parse_args(argv)
    absl_logging.set_verbosity(absl_logging.FATAL)  # of Orbax, which says again what is in our line
    status = exits.DONE
    for path in map(absolute, args.paths):
        things = list(find(path))
        if not things:
            print(f"{path}: found neither checkpoints nor a token store", file=sys.stderr)
            status = status or exits.FAILED
        for thing, check in things:
            problems = check(thing)
            print(report(thing, problems), flush=True)
            status = exits.DAMAGED if problems else status
    return status


if __name__ == "__main__":
    sys.exit(main())
