"""Batches by number: batch k is a pure function of (seed, k), and of nothing else.

    k * batch_size + row = draw ──mixture──▶ (source, its n-th draw) ──permutation──▶ example
    ──corrupt──▶ row ──stack──▶ batch

Every arrow is arithmetic, so any batch of any run arrives at once, on any process or worker.
"""

import dataclasses
import functools
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.packing import Examples, permute

# The draws of a period hold each source's share exactly; a share below 1 / PERIOD is refused.
PERIOD = 10_000

# First words of the seed sequences, so that no two uses share random numbers.
_ORDER, _MIXTURE, _CORRUPTION, _STATIC, _EVALUATION = range(5)

Batch = dict[str, np.ndarray]


class TrainBatches:
    """An endless permuted mixture of stores, cut into numbered batches.

    Each source is read in a new order every epoch, all of its examples before any comes again.
    `batches[k]` is a dict of arrays (rows, ...), as the objective's `corrupt` makes them.

    stores: name -> TokenStore. The names are part of the randomness, their order is not.
    weights: name -> share of the rows; or step -> such a dict, from that step on (one for step 0).
    objective: gives window(seq_len), corrupt(rng, example, seq_len), and `static`: True draws an
      example's noise from its index, alike in every epoch, False from the draw's number. If it has
      `of_draw(draw, step)`, that gives the objective which makes the row of a draw.
    batch_size: rows of the global batch. rows: the global rows of this process; None = all.
    """

    def __init__(
        self,
        stores: Mapping[str, Any],
        weights: Mapping,
        objective: Any,
        seq_len: int,
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
    ):
        self.objective, self.seq_len, self.batch_size = objective, seq_len, batch_size
        self.seed = seed
        self.rows = _checked_rows(rows, batch_size)
        self.sources = {
            name: Source(name, store, objective.window(seq_len)) for name, store in stores.items()
        }
        self.mixture = Mixture.of(weights, list(stores), batch_size, seed)

    def __getitem__(self, k: int) -> Batch:
        return self._rows(k, self.rows)

    def whole(self, k: int) -> Batch:
        """Batch k with the rows of all processes."""
        return self._rows(k, np.arange(self.batch_size))

    def documents(self, k: int) -> list[dict[str, Any]]:
        """Where the rows of batch k come from, as JSON has it: the store, and for each example in a row (a pair has two) its
        tokens [start, stop) and its first and last document, as `TokenStore` numbers both."""
        return [
            {"row": row, **self._draw(k * self.batch_size + row).says()}
            for row in range(self.batch_size)
        ]

    def epochs_seen(self, k: int) -> dict[str, float]:
        """How often each source has been read after k batches."""
        draws = self.mixture.draws(k * self.batch_size)
        return {name: n / self.sources[name].num_examples for name, n in draws.items()}

    def _rows(self, k: int, rows: np.ndarray) -> Batch:
        return _stack([self._row(k * self.batch_size + int(row)) for row in rows])

    def _row(self, number: int) -> Batch:
        draw = self._draw(number)
        objective = self.objective
        if hasattr(objective, "of_draw"):  # a mixture has one for each row
            objective = objective.of_draw(number, number // self.batch_size)
        return objective.corrupt(draw.rng, draw.source.example(draw.indices), self.seq_len)

    def _draw(self, number: int) -> "Draw":
        name, nth = self.mixture.locate(number)
        source = self.sources[name]
        epoch, index = divmod(nth, source.num_examples)
        index = permute(index, source.num_examples, _order_key(self.seed, source.tag, epoch))
        noise = (_STATIC, source.tag, index) if self.objective.static else (_CORRUPTION, number)
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, *noise]))
        return Draw(source, source.choose(index, rng), rng)


class EvalBatches:
    """A fixed set of batches over one store: every example once, in order, always the same noise.

    The last batch is filled up with rows of zeros: segment 0, weight 0.

    max_batches: 0 = the whole store; otherwise that many batches of examples from all over it.
    rows: the global rows of this process; None = all.
    """

    def __init__(
        self,
        store: Any,
        objective: Any,
        seq_len: int,
        batch_size: int,
        seed: int,
        max_batches: int = 0,
        rows: np.ndarray | None = None,
    ):
        self.objective, self.seq_len, self.batch_size = objective, seq_len, batch_size
        self.seed = seed
        self.rows = _checked_rows(rows, batch_size)
        self.source = Source("evaluation", store, objective.window(seq_len))
        batches = -(-self.source.num_examples // batch_size)
        self.num_batches = min(batches, max_batches) if max_batches else batches
        self.is_whole = self.num_batches == batches

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, k: int) -> Batch:
        if not 0 <= k < len(self):
            raise IndexError(f"found batch {k}; expected 0 <= k < {len(self)}")
        return _stack([self._row(k * self.batch_size + int(row)) for row in self.rows])

    def _row(self, index: int) -> Batch:
        size = self.source.num_examples
        empty = index >= size
        index = 0 if empty else index
        if not self.is_whole:
            index = permute(index, size, _order_key(self.seed, self.source.tag, 0))
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, _EVALUATION, index]))
        example = self.source.example(self.source.choose(index, rng))
        row = self.objective.corrupt(rng, example, self.seq_len)
        return {key: np.zeros_like(value) for key, value in row.items()} if empty else row


class Source:
    """The examples of one store, as an objective's window asks for them."""

    def __init__(self, name: str, store: Any, window: Any):
        self.name, self.window = name, window
        self.tag = zlib.crc32(name.encode())
        self.examples = Examples(
            store, window.length, window.stride, window.within_document, window.sentences
        )
        self.num_examples = len(self.examples)
        if not self.num_examples:
            raise ValueError(
                f"source {name!r}: found {store.num_tokens} tokens; expected more than "
                f"{window.length - window.stride}; change: prepare it from more text"
            )
        if window.pair and self.examples.same_document(0) == (0, self.num_examples):
            raise ValueError(
                f"source {name!r}: found one document; expected two or more, for the random halves "
                "of pairs; change: prepare it from more documents, or choose objective mlm or "
                "mlm_sop"
            )

    def choose(self, index: int, rng: np.random.Generator) -> list[int]:
        """The examples of a row: `index`; for pairs also a random example of another document."""
        if not self.window.pair:
            return [index]
        first, last = self.examples.same_document(index)
        other = int(rng.integers(self.num_examples - (last - first)))
        return [index, other + (last - first) * (other >= first)]

    def example(self, indices: list[int]) -> dict[str, Any]:
        """The first of these examples; for pairs with `other`, the second."""
        example, *others = (self.examples[index] for index in indices)
        return {**example, "other": others[0]} if others else example


class Draw(NamedTuple):
    """What a row is made of: the chosen examples of a source, and the noise that is left."""

    source: Source
    indices: list[int]
    rng: np.random.Generator

    def says(self) -> dict[str, Any]:
        """Where the draw's tokens and documents are, as `TrainBatches.documents` gives it."""
        examples, store = self.source.examples, self.source.examples.store
        parts = []
        for start, stop in map(examples.span, self.indices):
            documents = [store.document_of(start), store.document_of(stop - 1)]
            parts.append({"tokens": [start, stop], "documents": documents})
        place = {"store": str(store.path), "split": store.split}
        return {"source": self.source.name, **place, "examples": parts}


class Phase(NamedTuple):
    """A stretch of draws with fixed shares.

    start: its first draw. drawn: (sources,) draws of each source before it.
    order: (PERIOD,) the source of each draw of a period.
    rank: (PERIOD,) how many draws of that source come before it in the period.
    counts: (sources,) draws of each source in a period.
    """

    start: int
    drawn: np.ndarray
    order: np.ndarray
    rank: np.ndarray
    counts: np.ndarray

    def draws(self, draw: int) -> np.ndarray:
        """(sources,) draws of each source before `draw`, which is not before the start."""
        periods, rest = divmod(draw - self.start, len(self.order))
        within = np.bincount(self.order[:rest], minlength=len(self.counts))
        return self.drawn + periods * self.counts + within


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Which source a draw comes from, and the how-manieth of that source it is; O(1) by draw.

    Draws come in periods of PERIOD, in one seeded order; counts are the shares rounded by largest
    remainders, so no source is ever off its share by more than a period's rounding.
    """

    names: list[str]
    phases: list[Phase]

    @classmethod
    def of(cls, weights: Mapping, names: list[str], batch_size: int, seed: int) -> "Mixture":
        """From {name: weight} or {step: {name: weight}}."""
        names = sorted(names)
        schedule = _checked_schedule(weights, names)
        phases: list[Phase] = []
        for step, shares in sorted(schedule.items()):
            start = step * batch_size
            drawn = phases[-1].draws(start) if phases else np.zeros(len(names), np.int64)
            counts = _largest_remainders(np.array([shares.get(name, 0.0) for name in names]))
            rng = np.random.default_rng(np.random.SeedSequence([seed, _MIXTURE, step]))
            order = rng.permutation(np.repeat(np.arange(len(names)), counts))
            rank = np.empty(PERIOD, np.int64)
            for source, count in enumerate(counts):
                rank[order == source] = np.arange(count)
            phases.append(Phase(start, drawn, order, rank, counts))
        return cls(names, phases)

    def locate(self, draw: int) -> tuple[str, int]:
        """(source name, n): draw number `draw` is the n-th, from 0, of that source."""
        phase = self._phase(draw)
        periods, rest = divmod(draw - phase.start, PERIOD)
        source = phase.order[rest]
        nth = phase.drawn[source] + periods * phase.counts[source] + phase.rank[rest]
        return self.names[source], int(nth)

    def draws(self, draw: int) -> dict[str, int]:
        """Draws of each source among the first `draw` ones."""
        return dict(zip(self.names, self._phase(draw).draws(draw).tolist(), strict=True))

    def _phase(self, draw: int) -> Phase:
        return next(phase for phase in reversed(self.phases) if phase.start <= draw)


def make_iterator(
    batches: Any, start_step: int = 0, num_workers: int = 0, prefetch: int = 2
) -> Iterator[Batch]:
    """Batches from `start_step` to the end, read ahead by Grain.

    num_workers: processes that make batches (about 190 MB each); 0 = a thread of this process.
    prefetch: batches made ahead (by each worker).
    """
    import grain  # brings jax along, which the rest of jaxlm.data does without

    dataset = grain.MapDataset.source(batches)[start_step:]
    if num_workers == 0:
        options = grain.ReadOptions(num_threads=min(1, prefetch), prefetch_buffer_size=prefetch)
        return iter(dataset.to_iter_dataset(options))
    from absl import flags

    if not flags.FLAGS.is_parsed():  # notebooks and tests; Grain reads flags to start workers
        flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, prefetch))
    workers = grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=max(1, prefetch)
    )
    return iter(
        dataset.to_iter_dataset(options).mp_prefetch(workers, worker_init_fn=_end_with_parent)
    )


def _end_with_parent(worker: int, count: int) -> None:
    """Has a worker live exactly as long as the run, which needs batches until it has ended well.

    A signal to all processes of a terminal or a job is the run's business; and a run that is killed leaves no workers.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=1024)
def _order_key(seed: int, tag: int, epoch: int) -> int:
    sequence = np.random.SeedSequence([seed, _ORDER, tag, epoch])
    return int(sequence.generate_state(1, np.uint64)[0])


def _stack(rows: list[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _checked_rows(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if rows.size == 0 or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"found rows {rows}; expected one or more, 0 <= row < {batch_size}")
    return rows


def _checked_schedule(weights: Mapping, names: list[str]) -> dict[int, dict[str, float]]:
    """{step: {name: weight}} of either form of weights; raises with everything that is wrong."""
    nested = any(isinstance(value, Mapping) for value in weights.values())
    schedule = {int(step): dict(w) for step, w in weights.items()} if nested else {0: dict(weights)}
    problems = []
    if not schedule or min(schedule) != 0:
        problems.append(f"steps {sorted(schedule)}: expected the first to be 0")
    for step, shares in schedule.items():
        unknown = sorted(set(shares) - set(names))
        if unknown:
            problems.append(f"step {step}: no source is named {unknown}; there are {names}")
        if any(not 0 <= share < float("inf") for share in shares.values()) or not sum(
            shares.values()
        ):
            problems.append(f"step {step}: {shares}: expected weights >= 0, one or more above 0")
            continue
        least = sum(shares.values()) / PERIOD
        small = sorted(name for name, share in shares.items() if 0 < share < least)
        if small:
            problems.append(
                f"step {step}: {small} get less than 1 row in {PERIOD}; raise or drop them"
            )
    if problems:
        raise ValueError("mixture weights:\n  " + "\n  ".join(problems))
    return schedule


def _largest_remainders(shares: np.ndarray) -> np.ndarray:
    """int64 counts that sum to PERIOD, each within 1 of its share of it."""
    exact = shares / shares.sum() * PERIOD
    counts = np.floor(exact).astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]
    counts[most] += 1
    return counts
