"""The files of a workdir as a page reads them: each when it is asked for, once, and none larger than it may be."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from jaxlm.sealed import read_object
from jaxlm.training.goodput import read_lives
from jaxlm.training.metrics import read_metrics
from jaxlm.training.plots import MOST_LINES

MAX_BYTES = 64 << 20  # of a file that is read whole
Flat = dict[str, Any]


class Files:
    """A run's files; those that are not there are None or empty."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        if not self.has("config.json"):
            raise FileNotFoundError(
                f"found: no config.json in {workdir}; expected: the workdir of a run; change: name its --workdir"
            )

    def has(self, name: str) -> bool:
        """Whether the run has such a file."""
        return (self.workdir / name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object; {} if there is no such file. Raises Damaged."""
        return read_object(self.workdir / name, MAX_BYTES) if self.has(name) else {}

    def lines(self, name: str) -> Iterator[Any]:
        """The values of a JSON-lines file, one at a time, but not a last one that is still written."""
        if self.has(name):
            with (self.workdir / name).open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.endswith("\n"))

    def first_lines(self, name: str, most: int) -> list[Any]:
        """The first lines of a file of JSON lines, at most so many."""
        return list(itertools.islice(self.lines(name), most))

    def count_lines(self, name: str) -> int:
        """How many whole lines a file has; 0 if it is not there."""
        if not self.has(name):
            return 0
        with (self.workdir / name).open("rb") as lines:
            return sum(line.endswith(b"\n") for line in lines)

    def glob(self, pattern: str) -> list[Path]:
        """The files of a pattern, sorted."""
        return sorted(self.workdir.glob(pattern))

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The run's config.json."""
        return self.read("config.json")

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl, thinned to what a curve shows."""
        return read_metrics(self.workdir, most=MOST_LINES) if self.has("metrics.jsonl") else []

    @functools.cached_property
    def lives(self) -> list[dict[str, Any]]:
        """The starts of the run, as `goodput.read_lives` gives them."""
        path = self.workdir / "goodput.jsonl"
        return read_lives(path) if path.is_file() else []

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are of evaluations."""
        return [line for line in self.metrics if line["split"] == "eval"]


def flat(content: dict[str, Any]) -> Flat:
    """{'optimizer.learning_rate': 0.001, …}"""
    return flatten_dict(content, sep=".")
