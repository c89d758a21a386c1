"""Where hidden spans lie: exact counts for a row, shared over its documents, at random places; numpy, a row at a time."""

from typing import NamedTuple

import numpy as np

from jaxlm.objectives.tables import TokenTables


class Spans(NamedTuple):
    """Stretches of a row, in order; none overlaps another. start, length: int64 (spans,)."""

    start: np.ndarray
    length: np.ndarray

    def mask(self, size: int) -> np.ndarray:
        """bool (size,): the tokens that are in a span."""
        edges = np.zeros(size + 1, np.int64)
        np.add.at(edges, self.start, 1)
        np.add.at(edges, self.start + self.length, -1)
        return edges.cumsum()[:size] > 0


class Runs(NamedTuple):
    """The text of each document of a row, without its [bos] and [eos]. start, size: int64 (runs,)."""

    start: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, segment_ids: np.ndarray, tables: TokenTables) -> "Runs":
        """The runs of a row; tokens, segment_ids: int (n,)."""
        is_text = (tokens != tables.bos_id) & (tokens != tables.eos_id)
        number = np.where(is_text, segment_ids, 0)
        edges = np.flatnonzero(np.diff(number, prepend=0, append=0))
        start, end = edges, np.append(edges[1:], len(tokens))
        keep = number[np.minimum(start, len(tokens) - 1)] * (start < len(tokens)) > 0
        return cls(start[keep], (end - start)[keep])

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(place in the row, number of the run) of every token of the text, int64 (sum of sizes,)."""
        run = np.repeat(np.arange(len(self.start)), self.size)
        before = self.start - (self.size.cumsum() - self.size)
        return np.arange(len(run)) + before[run], run


def share(
    rng: np.random.Generator, total: int, weights: np.ndarray, most: np.ndarray
) -> np.ndarray:
    """`total` as integers (n,) that are within 1 of their part by `weights`, but for what `most` forbids.

    What one cannot take, the others do; the sum is smaller than `total` only if all are full. Which ones are rounded up
    is random, so that a small one gets its part in the mean.
    """
    whole = weights.sum()
    if whole == 0 or total <= 0:
        return np.zeros(len(weights), np.int64)
    ends = np.floor(np.cumsum(weights) * (total / whole) + rng.random()).astype(np.int64)
    ends[-1] = total
    parts = np.minimum(np.diff(np.minimum(ends, total), prepend=0), most)
    room = most - parts
    left = total - parts.sum()
    return parts + np.clip(left - (room.cumsum() - room), 0, room)


def cut(rng: np.random.Generator, totals: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Each total cut into its number of parts of 1 or more, all cuts being equally likely: int64 (sum of parts,).

    totals, parts: (n,), parts <= totals, and 0 parts only of 0. (T5's random segmentation, for many at once.)
    """
    group = np.repeat(np.arange(len(totals)), totals)
    first = totals.cumsum() - totals
    key = rng.random(len(group))
    key[first[totals > 0]] = -1.0  # a part starts at the beginning of each
    order = np.lexsort((key, group))
    rank = np.arange(len(group)) - first[group]
    starts = np.sort(order[rank < parts[group]])
    return np.diff(starts, append=len(group))


def place(runs: Runs, gaps: np.ndarray, lengths: np.ndarray, spans: np.ndarray) -> Spans:
    """Spans between gaps: in each run gap, span, gap, …, span, gap.

    gaps: (sum of spans + 1,), lengths: (sum of spans,), both run after run; together they are the runs' sizes.
    spans: (runs,), how many of a run.
    """
    run_of_gap = np.repeat(np.arange(len(spans)), spans + 1)
    run_of_span = np.repeat(np.arange(len(spans)), spans)
    at = 2 * np.arange(len(lengths)) + run_of_span + 1  # of the spans, among gaps and spans
    sizes = np.empty(len(gaps) + len(lengths), np.int64)
    sizes[2 * np.arange(len(gaps)) - run_of_gap] = gaps
    sizes[at] = lengths
    within = (sizes.cumsum() - sizes)[at] - (runs.size.cumsum() - runs.size)[run_of_span]
    return Spans(runs.start[run_of_span] + within, lengths)


def draw_gaps(
    rng: np.random.Generator, kept: np.ndarray, spans: np.ndarray, apart: int
) -> np.ndarray:
    """The gaps of `place` at random, (sum of spans + 1,): a run's `kept` tokens in its spans + 1 gaps, all equally likely.

    apart: the least gap between two spans, 0 or 1; before the first and after the last there may be none.
    """
    inner = np.maximum(spans - 1, 0)
    extra = spans + 1 - apart * inner  # one for each gap that may be empty
    gaps = cut(rng, kept + extra, spans + 1)
    last = (spans + 1).cumsum() - 1
    ends = np.zeros(len(gaps), bool)
    ends[last] = ends[last - spans] = True
    return gaps - (ends if apart else 1)
