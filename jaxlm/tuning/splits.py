"""Labelled files as records, and records as features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from jaxlm import program as programs
from jaxlm.data import demos
from jaxlm.data.column_names import ROLES
from jaxlm.data.columns import Columns, as_role_records, choose_columns, choose_roles
from jaxlm.data.examples import Examples
from jaxlm.data.records import Problem, Record, format_problems, read_records
from jaxlm.data.splits import split_train_dev

log = logging.getLogger("jaxlm")


DEMO = "demo:"  # what a data source begins with that is made of the standard library


# What a label is, by the task's `problem` or name; elsewhere it is one class.
LABEL_KINDS = {
    "multi_label": "multilabel",
    "regression": "number",
    "multiple_choice": "choice",
    "embedding": "number",
}


@dataclass
class Split:
    """The records of one file, in their order, and their features.

    spans: for each record the numbers of its features. truncated: records that were cut. is_labelled: all can be scored.
    """

    name: str
    records: list[Record]
    spans: list[range]
    examples: Examples
    truncated: int
    is_labelled: bool


def has_label(record: Record) -> bool:
    """Whether a record can be scored; a task that knows better has a method `is_labelled`."""
    return any(record.fields.get(key) is not None for key in ("label", "labels", "answers"))


def read_file(
    path: str,
    config: ConfigDict,
    columns: Columns | None = None,
) -> tuple[list[Record], list[Problem], Columns]:
    """The records of a labelled file, or of 'demo:NAME:SPLIT', with fields named by their roles in the task.

    columns: those of the training file, of which later ones may lack the labels; None: this is the training file.
    Returns (records, rows that cannot be read, columns).
    """
    data, task = config.data, config.task.name
    if path.startswith(DEMO):
        name, _, split = path.removeprefix(DEMO).partition(":")
        return demos.demo_records(name, split or "train"), [], {}
    records, problems = read_records(
        path,
        data.format,
        header=data.header,
        delimiter=data.delimiter,
        cache_dir=data.cache_dir,
    )
    if not records:
        raise ValueError(f"{path} has no row that can be read:\n{format_problems(problems)}")
    programs.pick(ROLES, task, "task")
    given = columns or {
        key.removesuffix("_column"): value
        for key, value in data.items()
        if key.endswith("_column") and value
    }
    roles = choose_roles(records, task, given)
    given = {role: column for role, column in given.items() if role in sum(roles, ())}
    chosen = choose_columns(records, roles, given, labelled=columns is None)
    kind = LABEL_KINDS.get(config.task.get("problem") or task, "class")
    named, more = as_role_records(records, chosen, kind, data.label_separator)
    return named, [*problems, *more], chosen


def read_whole(path: str, config: ConfigDict, columns: Columns) -> list[Record]:
    """A file to evaluate on, every row of it: one that cannot be read is an error."""
    records, problems, _ = read_file(path, config, columns)
    if problems:
        raise ValueError(
            f"{path} has {len(problems)} rows that cannot be read, and evaluation leaves none out:\n"
            f"{format_problems(problems)}"
        )
    return records


def hold_out(records: Sequence[Record], config: ConfigDict) -> tuple[list[Record], list[Record]]:
    """(training, development) records where there is no development file; says so in the log."""
    labels = [record.fields.get("label") for record in records]
    is_class = all(isinstance(label, str) for label in labels)
    fraction = config.data.dev_fraction
    return split_train_dev(records, fraction, config.seed, labels if is_class else None)


def make_split(name: str, task: Any, records: Sequence[Record]) -> Split:
    """A split's records with their features; says in the log how many were cut."""
    features: list[Any] = []
    spans, truncated = [], 0
    for record in records:
        try:
            made, was_cut = task.features(record)
        except ValueError as error:
            raise ValueError(f"{record.source}:{record.line}: {error}") from error
        spans.append(range(len(features), len(features) + len(made)))
        features += made
        truncated += was_cut
    if truncated:
        log.info(
            "%s: %d of %d records (%.1f%%) truncated",
            name,
            truncated,
            len(records),
            100 * truncated / len(records),
        )
    labelled = sum(map(getattr(task, "is_labelled", has_label), records))
    if 0 < labelled < len(records):
        log.warning(
            "%s: %d of %d records have no label, so it is not scored",
            name,
            len(records) - labelled,
            len(records),
        )
    is_labelled = labelled == len(records)
    return Split(name, list(records), spans, Examples(features), truncated, is_labelled)
