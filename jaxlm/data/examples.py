"""Batches of labelled examples by number: batch k is a pure function of (seed, k), and of nothing else.

    k * batch_size + i = draw ──permutation of its epoch──▶ example ──features──▶ tokens and labels ──pack or pad──▶ rows

A batch has `batch_size` examples, however they are laid into rows:

    packed   tokens       a a a b b b b c c .        padded   a a a .
             segment_ids  1 1 1 2 2 2 2 3 3 0                 b b b b
             positions    0 1 2 0 1 2 3 0 1 0                 c c . .
             example_ids  7 4 9                               7 / 4 / 9

What a feature holds is said in `Feature`; a feature with several segments (the choices of a question) has as many slots.
One of an encoder-decoder has a second stream, encoder_tokens, in rows of a length of their own; an example's row and segment
are the same in both:

    encoder_tokens       s s s s u u w w w .        tokens       a a b c c .
    encoder_segment_ids  1 1 1 1 2 2 3 3 3 0        segment_ids  1 1 2 3 3 0

Rows come in a fixed few shapes, so that a fixed few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data.packing import permute

Batch = dict[str, np.ndarray]

# tokens (n,) int32; segments (n,) 1..m, if m > 1; per token also token_types, labels, weights (n,); of an encoder-decoder
# also encoder_tokens (s,); per slot
# example_labels, example_weights and other example_* (m, ...), of which those that end in _positions are places in the
# feature. Every feature of a task has the same keys.
Feature = dict[str, np.ndarray]

LENGTHS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
ENCODER_KEYS = ("encoder_tokens", "encoder_segment_ids", "encoder_positions")
_ORDER, _REDRAW = range(2)  # first words of the seed sequences after the seed


class Place(NamedTuple):
    """Where a feature lies in a batch: its row, the place of its first token and the number of its first slot; and the place
    of the first token that an encoder reads."""

    row: int
    start: int
    slot: int
    encoder_start: int = 0


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes that batches may have: the smallest that holds one is taken.

    packed: several features in a row. lengths: of rows (packed: only one). rows: how many, ascending; the last is
    enough for any batch. slots: of a row. encoder_lengths: as lengths, of the encoder's rows; (0,) without an encoder.
    """

    packed: bool
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    slots: int
    encoder_lengths: tuple[int, ...] = (0,)


class Examples:
    """Features in a fixed order, with their sizes.

    lengths, slots, encoder_lengths: int (n,), tokens, segments and the encoder's tokens (or 0) of each.
    """

    def __init__(self, features: Sequence[Feature]):
        if not features:
            raise ValueError("found no example that can be used")
        self.features = features
        self.lengths = np.array([len(f["tokens"]) for f in features])
        self.slots = np.array([num_slots(f) for f in features])
        self.encoder_lengths = np.array([len(f.get("encoder_tokens", ())) for f in features])

    def __len__(self) -> int:
        return len(self.features)

    def sizes(self, ids: Sequence[int]) -> np.ndarray:
        """(n, 3): tokens, slots and the encoder's tokens of these examples, as `pack` takes them."""
        return np.stack([self.lengths, self.slots, self.encoder_lengths], axis=1)[ids]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over all tokens and labels, in order."""
        digest = hashlib.sha256()
        for feature in self.features:
            for key in sorted(feature):
                digest.update(key.encode() + np.ascontiguousarray(feature[key]).tobytes())
        return digest.hexdigest()


def num_slots(feature: Feature) -> int:
    """How many slots a feature has: one for each of its segments."""
    return int(feature["segments"].max()) if "segments" in feature else 1


class TrainExamples:
    """Endless epochs over the examples, each in a new order, all of them before any comes again.

    `batches[k]` is a dict of arrays (rows, …), as `lay_out` makes them; examples k * batch_size … + batch_size - 1.

    local_rows: for each number of rows that a batch may have those of this process; None = all.
    redraw: (number, rng) -> that example's feature, made anew for this draw and no larger; None = always the same.
    """

    def __init__(
        self,
        examples: Examples,
        shapes: Shapes,
        batch_size: int,
        seed: int,
        local_rows: Mapping[int, np.ndarray] | None = None,
        redraw: Callable[[int, np.random.Generator], Feature] | None = None,
    ):
        self.examples, self.shapes, self.batch_size = examples, shapes, batch_size
        self.seed, self.local_rows = seed, local_rows
        self.redraw = redraw

    def __getitem__(self, k: int) -> Batch:
        return self._laid_out(k, self.local_rows)[0]

    def whole(self, k: int) -> Batch:
        """Batch k with the rows of all processes."""
        return self._laid_out(k, None)[0]

    def documents(self, k: int) -> list[dict[str, int]]:
        """Which examples batch k is made of, by their numbers, and in which row each is."""
        _, places = self._laid_out(k, None)
        return [{"row": place.row, "example": number} for number, place in places.items()]

    def _laid_out(
        self, k: int, local_rows: Mapping[int, np.ndarray] | None
    ) -> tuple[Batch, dict[int, Place]]:
        ids, features = self.ids(k), None
        if self.redraw:
            draws = range(k * self.batch_size, (k + 1) * self.batch_size)
            features = [self.redraw(i, self._rng(n)) for i, n in zip(ids, draws, strict=True)]
        return lay_out(self.examples, ids, self.shapes, local_rows, features)

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, _REDRAW, number]))

    def ids(self, k: int) -> list[int]:
        """The numbers of the examples of batch k."""
        return draw(len(self.examples), self.batch_size, self.seed, k)

    def epochs_seen(self, k: int) -> dict[str, float]:
        """How often the examples have been read after k batches."""
        return {"train": k * self.batch_size / len(self.examples)}


class EvalExamples:
    """Every example once; where they are padded, those of one length together. The last batch has fewer."""

    def __init__(
        self,
        examples: Examples,
        shapes: Shapes,
        batch_size: int,
        local_rows: Mapping[int, np.ndarray] | None = None,
    ):
        self.examples, self.shapes, self.batch_size = examples, shapes, batch_size
        self.local_rows = local_rows
        by_length = np.lexsort((examples.lengths, examples.encoder_lengths))
        self.order = np.arange(len(examples)) if shapes.packed else by_length

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        return self.laid_out(k)[0]

    def laid_out(self, k: int) -> tuple[Batch, dict[int, Place]]:
        """Batch k, and where each of its examples is."""
        ids = self.order[k * self.batch_size : (k + 1) * self.batch_size].tolist()
        return lay_out(self.examples, ids, self.shapes, self.local_rows)

    def taken_apart(
        self, places: Mapping[int, Place], outputs: dict[str, np.ndarray]
    ) -> dict[int, dict[str, np.ndarray]]:
        """What a model says about each example of a batch, from the global arrays slot_* (B, E, …) and token_* (B, T, …).

        places: as `laid_out` gives them with the batch. Returns {number: {slot_*: (m, …), token_*: (n, …)}}.
        """
        result = {}
        for number, (row, start, slot, _) in places.items():
            slots = slice(slot, slot + self.examples.slots[number])
            tokens = slice(start, start + self.examples.lengths[number])
            result[number] = {
                key: value[row, slots if key.startswith("slot_") else tokens]
                for key, value in outputs.items()
            }
        return result


def draw(size: int, batch_size: int, seed: int, k: int) -> list[int]:
    """Which of `size` examples are in batch k: an epoch's permutation, read on over the end of the epoch."""
    ids = []
    for number in range(k * batch_size, (k + 1) * batch_size):
        epoch, index = divmod(number, size)
        ids.append(permute(index, size, _order_key(seed, epoch)))
    return ids


@functools.lru_cache(maxsize=64)
def _order_key(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, _ORDER, epoch]).generate_state(1, np.uint64)[0])


def lay_out(
    examples: Examples,
    ids: Sequence[int],
    shapes: Shapes,
    local_rows: Mapping[int, np.ndarray] | None = None,
    features: Sequence[Feature] | None = None,
) -> tuple[Batch, dict[int, Place]]:
    """The batch of these examples in the smallest shape that holds it, and the place of each.

    features: of the examples `ids`, where they are others than the plain ones; rows are planned for the plain ones.
    """
    sizes = examples.sizes(ids)
    longest, _, encoder_longest = sizes.max(axis=0).tolist()
    length = _smallest(shapes.lengths, longest, "row length")
    encoder_length = _smallest(shapes.encoder_lengths, encoder_longest, "encoder row length")
    row_sizes = (length, shapes.slots, encoder_length)
    if shapes.packed:
        places = pack(sizes, row_sizes)
    else:
        places = [Place(row, 0, 0) for row in range(len(ids))]
    rows = _smallest(shapes.rows, 1 + max(place.row for place in places), "number of rows")
    kept = np.arange(rows) if local_rows is None else local_rows[rows]
    features = features or [examples.features[i] for i in ids]
    batch = fill(features, ids, places, rows, row_sizes)
    return {key: value[kept] for key, value in batch.items()}, dict(zip(ids, places, strict=True))


def pack(sizes: np.ndarray, row_sizes: Sequence[int]) -> list[Place]:
    """Each feature into the first row with room for it, the longest first (first fit decreasing).

    sizes: (n, 3), tokens, slots and the encoder's tokens of each feature. row_sizes: those of a row.
    """
    used = np.zeros((len(sizes), len(row_sizes)), int)  # of each row
    places: list[Place] = [Place(0, 0, 0)] * len(sizes)
    for index in np.argsort(-sizes.sum(axis=1) + sizes[:, 1], kind="stable"):
        row = int(np.argmax((used + sizes[index] <= row_sizes).all(axis=1)))
        places[index] = Place(row, *used[row].tolist())
        used[row] += sizes[index]
    return places


def fill(
    features: Sequence[Feature],
    ids: Sequence[int],
    places: Sequence[Place],
    rows: int,
    row_sizes: tuple[int, int, int],
) -> Batch:
    """The arrays of a batch of rows of (tokens, slots, encoder's tokens); what no feature fills is 0, and -1 in
    example_ids."""
    length, slots, encoder_length = row_sizes
    batch: Batch = {
        "segment_ids": np.zeros((rows, length), np.int32),
        "positions": np.zeros((rows, length), np.int32),
        "example_ids": np.full((rows, slots), -1, np.int32),
        "example_weights": np.zeros((rows, slots), np.float32),
    }
    if encoder_length:
        for key in ENCODER_KEYS:
            batch[key] = np.zeros((rows, encoder_length), np.int32)
    for key, value in features[0].items():
        if key != "segments" and key not in batch:
            size = (rows, slots) if key.startswith("example_") else (rows, length)
            batch[key] = np.zeros((*size, *value.shape[1:]), _dtype(value))
    for number, feature, (row, start, slot, encoder_start) in zip(
        ids, features, places, strict=True
    ):
        n, m = len(feature["tokens"]), num_slots(feature)
        segments = feature.get("segments", np.ones(n, np.int32))
        here, these = (row, slice(start, start + n)), (row, slice(slot, slot + m))
        batch["segment_ids"][here] = segments + slot
        batch["positions"][here] = places_in_segments(segments)
        batch["example_ids"][these] = number
        batch["example_weights"][these] = 1
        for key, value in feature.items():
            if key == "encoder_tokens":
                read = (row, slice(encoder_start, encoder_start + len(value)))
                of_segment = np.full(len(value), slot + 1), np.arange(len(value))
                for name, part in zip(ENCODER_KEYS, (value, *of_segment), strict=True):
                    batch[name][read] = part
            elif key.startswith("example_"):
                batch[key][these] = value + start if key.endswith("_positions") else value
            elif key != "segments":
                batch[key][here] = value
    return batch


def places_in_segments(segments: np.ndarray) -> np.ndarray:
    """(n,) 1 1 1 2 2 -> 0 1 2 0 1."""
    index = np.arange(len(segments))
    begins = np.r_[True, segments[1:] != segments[:-1]]
    return index - np.maximum.accumulate(np.where(begins, index, 0))


def _dtype(value: np.ndarray) -> type:
    return np.float32 if value.dtype.kind == "f" else np.int32


def _smallest(sizes: Sequence[int], needed: int, what: str) -> int:
    for size in sizes:
        if size >= needed:
            return size
    raise ValueError(f"{what} {needed}: the largest shape of this run has {sizes[-1]}")


def plan_shapes(
    examples: Examples,
    batch_size: int,
    seed: int,
    *,
    packed: bool,
    seq_len: int,
    encoder_len: int = 0,
    row_multiple: int = 1,
    num_batches: int = 200,
) -> Shapes:
    """The shapes for training batches of these examples.

    Packed, rows are as long as the longest example's bucket, and their number is that which half of the first
    `num_batches` batches need, that which nine tenths need, that which all need, or enough for any batch.
    Padded, a row is one example, and a batch as long as the bucket of its longest.

    seq_len, encoder_len: the longest that a feature's streams can be. row_multiple: devices that share the rows.
    """
    plan = _plan([examples], batch_size, packed, seq_len, encoder_len, row_multiple)
    if not packed:
        return plan
    batches = min(num_batches, -(-len(examples) // batch_size))
    chosen = (draw(len(examples), batch_size, seed, k) for k in range(batches))
    needed = [rows_needed(examples, ids, plan) for ids in chosen]
    rows = {*np.quantile(needed, (0.5, 0.9, 1.0), method="higher").tolist(), batch_size}
    return dataclasses.replace(plan, rows=_multiples(rows, row_multiple))


def plan_eval_shapes(
    splits: Sequence[Examples],
    batch_size: int,
    *,
    packed: bool,
    seq_len: int,
    encoder_len: int = 0,
    row_multiple: int = 1,
) -> Shapes:
    """The shapes for evaluating these splits. Packed, that is one: their batches are known in advance."""
    plan = _plan(splits, batch_size, packed, seq_len, encoder_len, row_multiple)
    if not packed:
        return plan
    needed = {
        rows_needed(split, range(first, min(first + batch_size, len(split))), plan)
        for split in splits
        for first in range(0, len(split), batch_size)
    }
    return dataclasses.replace(plan, rows=_multiples({max(needed)}, row_multiple))


def _plan(
    splits: Sequence[Examples],
    batch_size: int,
    packed: bool,
    seq_len: int,
    encoder_len: int,
    row_multiple: int,
) -> Shapes:
    """Shapes with the rows that any batch needs; packed, both streams of a row are filled about equally."""
    sizes = np.concatenate([s.sizes(range(len(s))) for s in splits])
    longest, most, encoder_longest = sizes.max(axis=0).tolist()
    tokens, slots, encoder_tokens = sizes.sum(axis=0).tolist()
    buckets, encoder_buckets = _buckets(seq_len), _buckets(encoder_len)
    rows = _multiples({batch_size}, row_multiple)
    length = _smallest(buckets, longest, "example of length")
    encoder_length = _smallest(encoder_buckets, encoder_longest, "source of length")
    if not packed:
        upto = lambda sizes, largest: tuple(size for size in sizes if size <= largest)
        return Shapes(
            False, upto(buckets, length), rows, most, upto(encoder_buckets, encoder_length)
        )
    if encoder_tokens:
        share = tokens / encoder_tokens
        length = _next(length, encoder_length * share)
        encoder_length = _next(encoder_length, length / share)
    row_slots = max(most, round(2 * length * slots / tokens))
    return Shapes(True, (length,), rows, row_slots, (encoder_length,))


def _buckets(longest: int) -> list[int]:
    return sorted({min(size, longest) for size in LENGTHS} | {longest})


def _next(length: int, wanted: float) -> int:
    """The row length, or the largest bucket that is at most what is wanted if that is longer."""
    return max(length, *(size for size in LENGTHS if size <= wanted), 0)


def rows_needed(examples: Examples, ids: Sequence[int], shapes: Shapes) -> int:
    """How many rows these examples take, packed in this order into rows of the first shape."""
    row_sizes = (shapes.lengths[0], shapes.slots, shapes.encoder_lengths[0])
    places = pack(examples.sizes(ids), row_sizes)
    return 1 + max(place.row for place in places)


def _multiples(sizes: Iterable[float], of: int) -> tuple[int, ...]:
    """The sizes, each raised to the next multiple, ascending."""
    return tuple(sorted({-(-int(size) // of) * of for size in sizes}))
