"""The likeliest tokens at the masked places of a text, by an encoder (arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.inference.batches import next_power, pad_batch, plan_batches
from jaxlm.inference.logits import unembed
from jaxlm.parallel.processes import fetch

MASK = "[MASK]"  # how a text writes the tokenizer's mask token; its own spelling will do, too
MAX_ROWS = 8


def mask_pattern(tokenizer: Any) -> re.Pattern[str]:
    """What stands for a mask in a text."""
    spellings = {MASK, tokenizer.token(tokenizer.mask_id)}
    return re.compile("|".join(map(re.escape, sorted(spellings))))


def split_at_masks(tokenizer: Any, text: str) -> list[str]:
    """The text around its masks: one part more than there are masks.

    Where a token brings the space before it along, a masked one does, too, so the space is dropped.

        The [MASK] sat.   ->   'The', ' sat.'        (of bytes or characters: 'The ', ' sat.')
    """
    parts = mask_pattern(tokenizer).split(text)
    if len(tokenizer.encode("a a")) < 3:
        parts[:-1] = [part.rstrip(" ") for part in parts[:-1]]
    return parts


def encode_masked(tokenizer: Any, text: str) -> np.ndarray:
    """[CLS] text [SEP] as ids (n,) int32, with the mask's wherever the text says so."""
    mask = [tokenizer.mask_id]
    ids: list[Any] = [[tokenizer.cls_id]]
    for part in split_at_masks(tokenizer, text):
        ids += [tokenizer.encode(part), mask]
    return np.concatenate([*ids[:-1], [tokenizer.sep_id]]).astype(np.int32)


@functools.lru_cache(maxsize=16)
def make_ranker(model: Any, num_ids: int, top_k: int) -> Callable[..., Any]:
    """Jitted (params, batch with masked_positions (B, M)) -> (probabilities, ids), each (B, M, top_k), likeliest first.

    num_ids: the tokenizer's; a padded vocabulary has rows past it, which stand for nothing.
    """

    def rank(params, batch):
        outputs = model.apply({"params": params}, batch)
        logits = unembed(outputs, outputs.hidden, num_ids)
        return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)

    return jax.jit(rank)


def fill_mask(
    model: Any,
    params: Any,
    rows: Sequence[np.ndarray],
    *,
    mask_id: int,
    num_ids: int,
    max_len: int,
    top_k: int = 5,
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """For each row, for each mask in it from left to right: (ids (top_k,), their probabilities (top_k,)).

    model: an encoder with its masked-token head. rows: ids as `encode_masked` gives them, at most max_len each.
    """
    rank = make_ranker(model, num_ids, top_k)
    places = [np.flatnonzero(np.asarray(row) == mask_id) for row in rows]
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in rows]
    for batch in plan_batches([len(row) for row in rows], max_len, MAX_ROWS):
        most = max(1, *(len(places[i]) for i in batch.indices))
        slots = next_power(most)  # few shapes
        positions = np.zeros((batch.rows, slots), np.int32)
        for place, index in zip(positions, batch.indices, strict=False):
            place[: len(places[index])] = places[index]
        inputs = pad_batch(rows, batch) | {"masked_positions": positions}
        probs, ids = fetch(rank(params, inputs))
        for row, index in enumerate(batch.indices):
            found[index] = [
                (ids[row, slot], probs[row, slot]) for slot in range(len(places[index]))
            ]
    return found
