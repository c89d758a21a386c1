"""Beam search: the likeliest continuations that a search of fixed width finds.

    [[best, second]] = beam_search(decoder, params, [prompt], num_beams=4, num_return=2, eos_id=eos, …)

`search` is what does it, for anything that gives logits and can step on: it knows neither model nor cache. The model's
step and the choice of the best candidates are compiled, with one shape; the hypotheses are kept on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.inference.decode import Decoder, read_prompts
from jaxlm.models.cache import take_rows
from jaxlm.parallel.processes import fetch

# (cache, the row of it that each row continues (R,), the token that each row reads (R,)) -> (logits (R, V), cache)
Advance = Callable[[Any, np.ndarray, np.ndarray], tuple[jax.Array, Any]]


@jax.jit
def reorder(cache: Any, parents_R: jax.Array) -> Any:
    """The cache for hypotheses that continue others. What is remembered of a source is the same for all of a prompt."""
    rows = cache.segment_ids.shape[0]
    if cache.memory is None or len(parents_R) != rows:
        return take_rows(cache, parents_R)
    return take_rows(cache.replace(memory=None), parents_R).replace(memory=cache.memory)


class Beam(NamedTuple):
    """A continuation: tokens (n,) int32 without the eos that ended it, and the score by which beams are ranked.

    score: the sum of log-probabilities, that of eos too, divided by (number of tokens, eos counted) ** length_penalty.
    """

    tokens: np.ndarray
    score: float


@dataclass(frozen=True)
class BeamOptions:
    """num_beams: hypotheses that are continued at a time.

    length_penalty: above 0 prefers longer ones (arXiv:1609.08144, section 7, with another formula), 0 compares sums.
    early_stopping: True: a prompt is done as soon as num_beams hypotheses ended; False: when the best of those that go
      on, ended now, would be worse than all of these; 'never': when it cannot become better at any length.
    eos_id: -1 is never reached. must_end: where a hypothesis has its last token to go, that is eos, which costs nothing.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_id: int = -1
    must_end: bool = False


def beam_search(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    num_beams: int,
    max_new_tokens: int,
    max_len: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return: int = 1,
    eos_id: int = -1,
) -> list[list[Beam]]:
    """The `num_return` best continuations of each prompt, the best first; fewer only if there are no more.

    Scores and order are those of transformers' `generate`. prompts, max_new_tokens, max_len: see `decode.stream`; a
    hypothesis also ends where the context does. The others: see `BeamOptions`.

    Raises ValueError for options out of range, and for prompts as `decode.stream` does.
    """
    wrong = []
    if num_beams < 1:
        wrong.append(f"num_beams={num_beams}: at least 1")
    if not 1 <= num_return <= num_beams:
        wrong.append(f"num_return={num_return}: 1 to num_beams={num_beams}")
    if early_stopping not in (True, False, "never"):
        wrong.append(f"early_stopping={early_stopping!r}: True, False or 'never'")
    if not -10 <= length_penalty <= 10:
        wrong.append(f"length_penalty={length_penalty}: -10 to 10")
    if wrong:
        raise ValueError("cannot search beams:\n" + "\n".join(f"  - {w}" for w in wrong))
    params = decoder.prepare(params)
    logits_BV, cache, limits = read_prompts(decoder, params, prompts, max_new_tokens, max_len)

    def advance(cache, parents_R, tokens_R):
        return decoder.step(params, reorder(cache, parents_R), tokens_R)

    options = BeamOptions(num_beams, length_penalty, early_stopping, eos_id, decoder.must_end)
    found = search(logits_BV, cache, advance, limits.tolist(), options)
    return [beams[:num_return] for beams in found]


def search(
    logits_RV: jax.Array, cache: Any, advance: Advance, limits: Sequence[int], options: BeamOptions
) -> list[list[Beam]]:
    """Up to num_beams continuations of each of B rows, the best first.

    logits_RV, cache: what the model gives for the prompts (R = B). advance: reads one token more in R = B * num_beams rows,
    each of which continues one of the cache's rows (B, then R). limits (B,): tokens at most, eos counted.
    """
    rows = [Hypotheses(options, limit) for limit in limits]
    scores_R = np.zeros(len(rows), np.float32)
    while True:
        width, vocab = len(scores_R) // len(rows), logits_RV.shape[1]
        # Of twice as many candidates at least half go on: each hypothesis ends with one token only.
        count = min(2 * options.num_beams, width * vocab)
        best = rank_candidates(logits_RV, scores_R, rows=len(rows), count=count)
        for row, scores_C, places_C in zip(rows, *fetch(best), strict=True):
            row.extend(scores_C, *np.divmod(places_C, vocab))
        if all(row.is_done for row in rows):
            return [row.ended for row in rows]
        parents_R = np.concatenate([i * width + row.parents for i, row in enumerate(rows)])
        tokens_R = np.concatenate([row.last for row in rows])
        scores_R = np.concatenate([row.scores for row in rows])
        logits_RV, cache = advance(cache, parents_R.astype(np.int32), tokens_R)


@functools.partial(jax.jit, static_argnames=("rows", "count"))
def rank_candidates(
    logits_RV: jax.Array, scores_R: jax.Array, *, rows: int, count: int
) -> tuple[jax.Array, jax.Array]:
    """(scores, places), each (B, C): the best next tokens of each prompt's hypotheses; place = hypothesis * V + token."""
    scores_RV = jax.nn.log_softmax(logits_RV, axis=-1) + scores_R[:, None]
    return jax.lax.top_k(scores_RV.reshape(rows, -1), count)


class Hypotheses:
    """Those of one prompt: up to W = num_beams that go on, and the best W that ended, the best first.

    tokens (W, t), scores (W,): of those that go on, the best first; a score is a sum of log-probabilities, and -inf where
    there are fewer than W. parents, last (W,): which of the hypotheses before each of them continues, by which token.
    """

    def __init__(self, options: BeamOptions, limit: int):
        self.options, self.limit = options, limit
        self.ended = [] if limit else [Beam(np.zeros(0, np.int32), 0.0)]
        self.is_done = not limit
        self.tokens = np.zeros((options.num_beams, 0), np.int32)
        self.scores = np.full(options.num_beams, -np.inf, np.float32)
        self.scores[0] = 0
        self.parents, self.last = np.zeros((2, options.num_beams), np.int32)

    def extend(self, scores_C: np.ndarray, parents_C: np.ndarray, tokens_C: np.ndarray) -> None:
        """Takes the candidates, the best first: of the first W those that end here, and of all W that do not.

        At the limit all end.
        """
        if self.is_done:
            return
        width, eos_id = self.options.num_beams, self.options.eos_id
        length = self.tokens.shape[1] + 1
        if self.options.must_end and length == self.limit:
            scores_C, parents_C, tokens_C = self.scores, np.arange(width), np.full(width, eos_id)
        exists_C = scores_C > -np.inf
        ends_C = exists_C & ((tokens_C == eos_id) | (length == self.limit))
        for i in np.flatnonzero(ends_C[:width]):
            tokens = np.append(self.tokens[parents_C[i]], tokens_C[i])
            tokens = tokens[:-1] if tokens_C[i] == eos_id else tokens
            self.ended.append(Beam(tokens, self._penalised(scores_C[i], length)))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[:width]
        self._go_on(scores_C, parents_C, tokens_C, np.flatnonzero(exists_C & ~ends_C)[:width])
        self.is_done = self._is_decided(length)

    def _go_on(self, scores_C, parents_C, tokens_C, chosen: np.ndarray) -> None:
        """Continues the chosen candidates; where there are fewer than W, impossible ones fill up."""
        places = np.resize(chosen, self.options.num_beams) if len(chosen) else 0 * self.parents
        self.parents, self.last = parents_C[places], tokens_C[places]
        self.tokens = np.column_stack([self.tokens[self.parents], self.last])
        self.scores = scores_C[places]
        self.scores[len(chosen) :] = -np.inf

    def _is_decided(self, length: int) -> bool:
        """Whether nothing goes on, or what does is not expected to become better than what ended."""
        if self.scores[0] == -np.inf:
            return True
        if len(self.ended) < self.options.num_beams:
            return False
        if self.options.early_stopping is True:
            return True
        if self.options.early_stopping == "never" and self.options.length_penalty > 0:
            length = self.limit
        return self._penalised(self.scores[0], length) <= self.ended[-1].score

    def _penalised(self, score: float, length: int) -> float:
        return float(score) / length**self.options.length_penalty
