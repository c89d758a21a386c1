"""Log-probabilities of given tokens: after a context, over long texts in strided windows, and under masks.

Everything goes through `Scorer`, which compiles once for each shape: lengths are powers of two up to the context, and of
each length there are a full batch and a few smaller ones. Results come back in the order in which they were asked for.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.inference.batches import Batch, next_power, pad_batch, round_up
from jaxlm.inference.logits import unembed
from jaxlm.models import BERT
from jaxlm.models.heads import gather_positions
from jaxlm.parallel import mesh as meshes

LOGITS = 2**25  # float32 logits that a batch may hold at a time (128 MB)
BATCH_TOKENS = 8192
COPIES = 64  # batches of masked copies that are made at a time
AHEAD = 4  # batches that wait on the device, so that it never waits for the host

Params = Any
# (context (c,), continuation (n,)): int32 ids, c and n at least 1
Pair = tuple[np.ndarray, np.ndarray]


class Scored(NamedTuple):
    """What a model says of n given tokens.

    logprobs: (n,) float32, natural logarithms. likeliest: (n,) bool, whether no other token was likelier.
    """

    logprobs: np.ndarray
    likeliest: np.ndarray

    @property
    def total(self) -> float:
        """The log-probability of all tokens together, summed in float64."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have given these tokens."""
        return bool(self.likeliest.all())


# (pairs) -> what is said of each continuation; `Scorer.score_pairs` with its parameters is one
ScorePairs = Callable[[Sequence[Pair]], list[Scored]]


class Row(NamedTuple):
    """Tokens (t,) that the model reads, and for M places in them the ids that are asked for there."""

    tokens: np.ndarray
    places: np.ndarray
    labels: np.ndarray


class Window(NamedTuple):
    """Reads tokens [start, stop - 1), and counts what it says of tokens [first, stop)."""

    start: int
    first: int
    stop: int


@functools.lru_cache(maxsize=16)
def make_scorer(model: Any, num_ids: int | None = None) -> Scorer:
    """The scorer of a Linen model. One model gives one scorer, so that jit knows its function again.

    num_ids: probabilities are over the first that many ids; None = over all rows of the vocabulary, as in training.
    """
    return Scorer(model, num_ids)


class Scorer:
    """Scores rows in batches of few shapes; see `make_scorer`."""

    def __init__(self, model: Any, num_ids: int | None):
        self.model, self.num_ids = model, num_ids
        self.score_batch = jax.jit(self._score_batch)

    def score(
        self,
        params: Params,
        rows: Sequence[Row],
        *,
        max_len: int,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[Scored]:
        """What the model says at each row's places.

        max_len: the longest row that the model takes. batch_tokens: a batch has about that many, padding included.

        Raises:
          ValueError: for rows without tokens or places, or longer than max_len; if a log-probability is not a number.
        """
        check_rows(rows, max_len)
        launched = (
            (batch, self.score_batch(params, *lay_out(rows, batch, is_encoder(self.model))))
            for batch in plan(rows, max_len, batch_tokens)
        )
        scored: dict[int, Scored] = {}
        for batch, results in some_behind(launched, AHEAD):
            arrays = jax.device_get(results)
            for i, logprobs, likeliest in zip(batch.indices, *arrays, strict=False):
                size = len(rows[i].places)  # the rest, and whole rows past the batch's, is padding
                scored[int(i)] = Scored(logprobs[:size], likeliest[:size])
        if any(np.isnan(s.logprobs).any() for s in scored.values()):
            raise ValueError(
                "found a log-probability that is NaN; expected numbers: either the parameters have NaN in them, or a "
                "token is outside the model's vocabulary"
            )
        return [scored[i] for i in range(len(rows))]

    def _score_batch(self, params, batch, places_BM, labels_BM, num_slots):
        """(log-probabilities, likeliest), each (B, M): at `places` of `labels`; slots from `num_slots` on are not read.

        The vocabulary is met in chunks of slots, so (B, M, V) logits never exist, and only as many chunks run as are
        needed: a continuation of three tokens costs three rows of logits, however long its context is.
        """
        if is_encoder(self.model):  # it gathers before its head
            batch = {**batch, "masked_positions": places_BM}
            slots = jnp.arange(places_BM.shape[1], dtype=jnp.int32)
            places_BM = jnp.broadcast_to(slots[None], places_BM.shape)
        outputs = self.model.apply({"params": params}, batch, deterministic=True)
        rows, slots = labels_BM.shape
        vocab_size = self.num_ids or outputs.unembed.shape[0]
        length = min(slots, max(1, LOGITS // (rows * vocab_size)))

        def add_chunk(chunk, results):
            start = chunk * length  # past the end, slices move back and repeat what they overlap
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)
            found = self._ask(outputs, cut(places_BM), cut(labels_BM))
            update = jax.lax.dynamic_update_slice_in_dim
            return tuple(update(x, y, start, axis=1) for x, y in zip(results, found, strict=True))

        empty = jnp.zeros(labels_BM.shape, jnp.float32), jnp.zeros(labels_BM.shape, bool)
        return jax.lax.fori_loop(0, -(-num_slots // length), add_chunk, empty)

    def _ask(self, outputs, places_BM, labels_BM):
        hidden_BMD = gather_positions(outputs.hidden, places_BM)
        logits_BMV = unembed(outputs, hidden_BMD, self.num_ids)
        label_BM = jnp.take_along_axis(logits_BMV, labels_BM[:, :, None], axis=-1)[:, :, 0]
        logprobs_BM = label_BM - jax.nn.logsumexp(logits_BMV, axis=-1)
        return logprobs_BM, label_BM == logits_BMV.max(-1)


def is_encoder(model: Any) -> bool:
    """Whether a model sees both sides, and so predicts masks and not what follows."""
    return isinstance(model, BERT)


# --- what is asked for ------------------------------------------------------------------------------------------------


def token_logprobs(
    scorer: Scorer,
    params: Params,
    pairs: Sequence[Pair],
    *,
    max_len: int,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Scored]:
    """What a decoder says of each continuation after its context.

        context        [bos]  the   cat         continuation    sat  down
        tokens         [bos]  the   cat   sat                   the last id is never read
        places                       2     3
        labels                      sat  down

    max_len: context and continuation may be max_len + 1 ids together.

    Raises:
      ValueError: for an empty context or continuation (a text's first token needs bos before it), or too long ones.
    """
    wrong = [
        f"pair {i} has {len(context)} ids of context and {len(continuation)} of continuation"
        for i, (context, continuation) in enumerate(pairs)
        if not len(context) or not len(continuation)
    ]
    if wrong:
        raise ValueError("expected 1 id or more of each:\n  " + "\n  ".join(wrong))
    # Continuations that differ in their last id only, the choices of a question, are asked for in one row.
    rows: dict[bytes, list[int]] = {}
    read = [np.concatenate([c, new[:-1]]).astype(np.int32) for c, new in pairs]
    for number, tokens in enumerate(read):
        rows.setdefault(tokens.tobytes(), []).append(number)
    asked = [join_rows(read, pairs, numbers) for numbers in rows.values()]
    scored: dict[int, Scored] = {}
    found = scorer.score(params, asked, max_len=max_len, batch_tokens=batch_tokens)
    for numbers, joined in zip(rows.values(), found, strict=True):
        sizes = [len(pairs[i][1]) for i in numbers]
        scored |= zip(numbers, cut_into(joined, sizes), strict=True)
    return [scored[i] for i in range(len(pairs))]


def join_rows(read: Sequence[np.ndarray], pairs: Sequence[Pair], numbers: Sequence[int]) -> Row:
    """The row of pairs that read the same tokens, int (n,), with the places and labels of each."""
    tokens = read[numbers[0]]
    places = [np.arange(len(pairs[i][0]) - 1, len(tokens)) for i in numbers]
    return Row(tokens, np.concatenate(places), np.concatenate([pairs[i][1] for i in numbers]))


def make_windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows of at most `window` read tokens, `stride` apart, that count every token after the first exactly once.

        window 4, stride 2      . predicted from    # counted
        x0  x1  x2  x3  x4  x5  x6
        .   #   #   #   #                           the first window counts all that it predicts,
                .   .   .   #   #                   the others what is new: each token has window - stride before it

    With stride = window no token is read twice, as in training.

    Raises:
      ValueError: unless 1 <= stride <= window.
    """
    if not 1 <= stride <= window:
        raise ValueError(
            f"found stride {stride} and window {window}; expected 1 <= stride <= window, or tokens would be left out"
        )
    first = 1
    for start in itertools.count(0, stride):
        if first >= num_tokens:
            return
        stop = min(start + window + 1, num_tokens)
        yield Window(start, first, stop)
        first = stop


def rolling(
    score_pairs: ScorePairs, texts: Sequence[np.ndarray], *, window: int, stride: int
) -> list[Scored]:
    """What a decoder says of all ids of each text but its first (bos), in windows; see `make_windows`."""
    windows = [list(make_windows(len(ids), window, stride)) for ids in texts]
    pairs = [
        (ids[w.start : w.first], ids[w.first : w.stop])
        for ids, spans in zip(texts, windows, strict=True)
        for w in spans
    ]
    scored = iter(score_pairs(pairs))
    return [join(list(itertools.islice(scored, len(spans)))) for spans in windows]


def pseudo_logprobs(
    scorer: Scorer,
    params: Params,
    texts: Sequence[np.ndarray],
    *,
    mask_id: int,
    special_ids: Iterable[int],
    max_len: int,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Scored]:
    """What an encoder says of each ordinary token of a text when it alone is masked (arXiv:1910.14659, section 2).

    texts: ids with cls before and sep after them; special ids are not asked for. A text costs a row for each token.
    """
    special = np.array(sorted(special_ids), np.int32)
    places = [np.flatnonzero(~np.isin(ids, special)) for ids in texts]

    def masked_copies(ids: np.ndarray, where: np.ndarray) -> Iterator[Row]:
        for place in where:
            tokens = ids.copy()
            tokens[place] = mask_id
            yield Row(tokens, np.array([place]), ids[[place]])

    scored: dict[int, Scored] = {}
    for length, numbers in by_rounded_length(texts, max_len).items():
        copies = itertools.chain.from_iterable(
            masked_copies(np.asarray(texts[i], np.int32), places[i]) for i in numbers
        )
        # Full batches at a time, so that their shapes are those of all copies at once.
        most, parts = COPIES * full_batch(length, batch_tokens), []
        while rows := list(itertools.islice(copies, most)):
            found = scorer.score(params, rows, max_len=max_len, batch_tokens=batch_tokens)
            parts.append(join(found))
        sizes = [len(places[i]) for i in numbers]
        scored |= zip(numbers, cut_into(join(parts), sizes), strict=True)
    return [scored[i] for i in range(len(texts))]


def join(parts: Sequence[Scored]) -> Scored:
    """What is said of several stretches of tokens, as one."""
    if not parts:
        return Scored(np.empty(0, np.float32), np.empty(0, bool))
    return Scored(*map(np.concatenate, zip(*parts, strict=True)))


def cut_into(joined: Scored, sizes: Sequence[int]) -> Iterator[Scored]:
    """What is said of stretches of so many tokens, which `join` would put together again."""
    ends = np.cumsum(sizes)[:-1]
    return map(Scored, np.split(joined.logprobs, ends), np.split(joined.likeliest, ends))


# --- batches ----------------------------------------------------------------------------------------------------------


def plan(rows: Sequence[Row], max_len: int, batch_tokens: int) -> Iterator[Batch]:
    """Every row once, the longest first. All batches of one length are equally large but the last one, which may be a
    quarter, a sixteenth, … of them."""
    by_length = by_rounded_length([row.tokens for row in rows], max_len)
    for length, numbers in by_length.items():
        numbers.sort(key=lambda i: len(rows[i].places))  # neighbours need equally many chunks
        most = full_batch(length, batch_tokens)
        for start in range(0, len(numbers), most):
            indices, size = np.array(numbers[start : start + most]), most
            while size // 4 >= len(indices):
                size //= 4
            yield Batch(indices, max(size, batch_devices()), length)


def by_rounded_length(texts: Sequence[np.ndarray], max_len: int) -> dict[int, list[int]]:
    """The length to which texts, (t,) each, are padded -> their numbers; the longest first."""
    by_length: dict[int, list[int]] = {}
    for number, tokens in enumerate(texts):
        by_length.setdefault(round_up(len(tokens), max_len), []).append(number)
    return dict(sorted(by_length.items(), reverse=True))


def full_batch(length: int, batch_tokens: int) -> int:
    """Rows of a batch that is full: a power of two."""
    return 1 << (max(1, batch_tokens // length).bit_length() - 1)


def lay_out(
    rows: Sequence[Row], batch: Batch, few_slots: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """(a model's batch, places (B, M), labels (B, M), slots in use ()).

    few_slots: M is the next power of two of what is needed; else it is the length, as long as that is enough, so that it
      is no shape of its own.
    """
    chosen = [rows[i] for i in batch.indices]
    num_slots = max(len(row.places) for row in chosen)
    slots = next_power(num_slots)
    if not few_slots:
        slots = max(batch.length, slots)
    places, labels = np.zeros((2, batch.rows, slots), np.int32)
    for i, row in enumerate(chosen):
        places[i, : len(row.places)] = row.places
        labels[i, : len(row.labels)] = row.labels
    return (
        pad_batch([r.tokens for r in chosen], batch._replace(indices=range(len(chosen)))),
        places,
        labels,
        np.int32(num_slots),
    )


def some_behind(launched: Iterable[Any], ahead: int) -> Iterator[Any]:
    """The same items, each only after `ahead` more are made."""
    waiting: collections.deque[Any] = collections.deque()
    for item in launched:
        waiting.append(item)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def batch_devices() -> int:
    """Over how many devices the mesh in force spreads rows."""
    return meshes.batch_devices(jax.sharding.get_abstract_mesh())


def check_rows(rows: Sequence[Row], max_len: int) -> None:
    """Raises ValueError naming the rows that are empty, too long, or ask for nothing."""
    wrong = [
        f"row {i} has {len(row.tokens)} tokens, of which {len(row.places)} are asked for"
        for i, row in enumerate(rows)
        if not 0 < len(row.tokens) <= max_len or not len(row.places)
    ]
    if wrong:
        shown = wrong[:10] + ([f"and {len(wrong) - 10} more"] if len(wrong) > 10 else [])
        raise ValueError(
            f"expected 1 to {max_len} tokens a row, the model's context, and 1 or more asked for; cut the texts into "
            "windows:\n  " + "\n  ".join(shown)
        )
