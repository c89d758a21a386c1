"""Rows of many lengths as batches of a few shapes, so that a handful of programs serve any file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

LEAST = 16
Result = TypeVar("Result")


def next_power(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def round_up(length: int, most: int) -> int:
    """The next power of two, at least 16 and at most `most`."""
    return min(most, max(LEAST, next_power(length)))


class Batch(NamedTuple):
    """Which rows go together (n,), and the shape that holds them: `rows` >= n rows of `length` tokens."""

    indices: np.ndarray
    rows: int
    length: int


def plan_batches(lengths: Sequence[int], max_len: int, max_rows: int) -> list[Batch]:
    """Every row once, the longest first.

    Neighbours in length share a batch. All batches have `max_rows` rows but the last one, which has a power of two.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    parts = [order[start : start + max_rows] for start in range(0, len(order), max_rows)]
    return [
        Batch(
            part,
            min(max_rows, next_power(len(part))),
            round_up(int(lengths[part[0]]), max_len),
        )
        for part in parts
    ]


def pad_batch(rows: Sequence[np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
    """A model's batch of the rows at `batch.indices`: tokens, segment_ids and positions (rows, length), int32.

    Padding, whole rows of it too, has the segment 0.
    """
    tokens = np.zeros((batch.rows, batch.length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for place, index in enumerate(batch.indices):
        row = rows[index]
        tokens[place, : len(row)], segment_ids[place, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(batch.length, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}


def in_batches(
    run: Callable[[list[int]], Sequence[Result]],
    lengths: Sequence[int],
    max_len: int,
    max_rows: int,
) -> list[Result]:
    """What `run` gives for each row. It gets the indices of a batch at a time, the last one again where rows are left."""
    found: dict[int, Result] = {}
    for batch in plan_batches(lengths, max_len, max_rows):
        indices = batch.indices.tolist()
        indices += indices[-1:] * (batch.rows - len(indices))
        found |= dict(zip(indices, run(indices), strict=True))
    return [found[i] for i in range(len(lengths))]
