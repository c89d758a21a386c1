"""What tasks share: how texts become one sequence, the shape of a feature, and the losses of few classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Feature = dict[str, np.ndarray]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
Ids = np.ndarray


class Laid(NamedTuple):
    """Texts laid out as one sequence.

    tokens, token_types: int32 (n,). starts: where each text begins. lengths: how many tokens of each are there.
    truncated: whether tokens were cut off. pool_position: where a head reads the whole of it.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    truncated: bool
    pool_position: int


@dataclass(frozen=True)
class Layout:
    """How one or two texts become a sequence of at most `seq_len` tokens.

        encoder        [CLS] a a a [SEP] b b [SEP]     token types 0 0 0 0 0 1 1 1, read at [CLS] (arXiv:1810.04805)
        RoBERTa        <s> a a a </s> </s> b b </s>    token types 0, read at <s> (arXiv:1907.11692)
        decoder        <bos> a a a <eos> b b <eos>     read at the last <eos> (Radford et al. 2018, section 3.3)
        XLNet          a a a [SEP] b b [SEP] [CLS]     token types 0 0 0 0 1 1 1 2, read at [CLS] (arXiv:1906.08237)

    before, between, after: ids. pair_types: whether the second text has the token type 1. last_type: of the last token,
    where it has one of its own.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    pair_types: bool
    reads_last: bool
    seq_len: int
    last_type: int | None = None

    def room(self, num_texts: int) -> int:
        """How many tokens the texts may have together."""
        extra = len(self.before) + len(self.between) * (num_texts - 1) + len(self.after)
        return max(0, self.seq_len - extra)

    def lay(self, *texts: Ids, cut: int | None = None) -> Laid:
        """One or two texts' ids as a sequence.

        cut: the text that is shortened where they do not fit; None = whichever is longer, token by token.
        """
        lengths = fit_lengths([len(t) for t in texts], self.room(len(texts)), cut)
        parts, types, starts = [np.array(self.before, np.int32)], [0] * len(self.before), []
        for number, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            follows = self.after if number == len(texts) - 1 else self.between
            starts.append(len(types))
            parts += [np.asarray(text[:length], np.int32), np.array(follows, np.int32)]
            types += [number if self.pair_types else 0] * (length + len(follows))
        tokens = np.concatenate(parts)
        if self.last_type is not None:
            types[-1] = self.last_type
        return Laid(
            tokens,
            np.array(types, np.int32),
            tuple(starts),
            tuple(lengths),
            any(n < len(t) for n, t in zip(lengths, texts, strict=True)),
            len(tokens) - 1 if self.reads_last else 0,
        )


def make_layout(
    tokenizer: Any, seq_len: int, *, causal: bool, num_token_types: int, cls_last: bool = False
) -> Layout:
    """The layout of a model: a decoder (`causal`), XLNet (`cls_last`), RoBERTa (its cls is its bos, no second token type),
    else BERT's."""
    t = tokenizer
    if cls_last:
        return Layout((), (t.sep_id,), (t.sep_id, t.cls_id), True, True, seq_len, last_type=2)
    if causal:
        return Layout((t.bos_id,), (t.eos_id,), (t.eos_id,), False, True, seq_len)
    is_roberta = t.cls_id == t.bos_id and num_token_types < 2
    between = (t.sep_id, t.sep_id) if is_roberta else (t.sep_id,)
    return Layout((t.cls_id,), between, (t.sep_id,), num_token_types > 1, False, seq_len)


def fit_lengths(lengths: list[int], room: int, cut: int | None = None) -> list[int]:
    """Lengths that together are at most `room`: the longest text is shortened first, or only number `cut` if it can be."""
    lengths = list(lengths)
    excess = sum(lengths) - room
    if excess <= 0:
        return lengths
    if cut is not None:
        shorter = min(excess, lengths[cut])
        lengths[cut] -= shorter
        excess -= shorter
    while excess > 0:
        longest = max(range(len(lengths)), key=lambda i: lengths[i])
        others = [n for i, n in enumerate(lengths) if i != longest]
        shorter = min(excess, max(1, lengths[longest] - max(others, default=0)))
        lengths[longest] -= shorter
        excess -= shorter
    return lengths


def make_feature(laid: Laid, **keys: Any) -> Feature:
    """A feature of one slot: the laid tokens and what else the task says about them."""
    return {
        "tokens": laid.tokens,
        "token_types": laid.token_types,
        "example_positions": np.array([laid.pool_position], np.int32),
        **{key: np.asarray(value) for key, value in keys.items()},
    }


def softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(total, weight) of -log p(label), (..., C) logits against (...) labels, where `weights` (...) is above 0.

    label_smoothing: share of the target spread over all classes (arXiv:1512.00567, section 7).
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    loss = -(1 - label_smoothing) * picked - label_smoothing * log_probs.mean(-1)
    return (loss * weights).sum(), weights.sum()


def share(correct: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The metric (how many are right, how many count): examples of any positive weight count as one."""
    counted = (weights > 0).astype(jnp.float32)
    return (correct * counted).sum(), counted.sum()


def real_weights(batch: Mapping[str, jax.Array]) -> jax.Array:
    """(B, E) float32: the slots' loss weights, 0 where a slot is empty."""
    return batch["example_weights"] * (batch["example_ids"] >= 0)
