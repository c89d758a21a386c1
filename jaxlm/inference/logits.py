"""Logits from a model's outputs, which hold only their two factors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models.layers import Outputs, apply_softcap

Params = Any
Batch = Mapping[str, jax.Array]
# (params, batch, positions (B, M)) -> float32 logits (B, M, V) at those positions
ApplyLogits = Callable[[Params, Batch, jax.Array], jax.Array]


def unembed(outputs: Outputs, hidden_BMD: jax.Array, num_ids: int | None = None) -> jax.Array:
    """Float32 logits (B, M, V) of hidden vectors of `outputs`.

    num_ids: the tokenizer's; a padded vocabulary has rows past it, which stand for nothing. None = all.
    """
    assert outputs.unembed is not None
    table_VD = outputs.unembed[:num_ids].astype(hidden_BMD.dtype)
    logits = jnp.einsum("BMD,VD->BMV", hidden_BMD, table_VD, preferred_element_type=jnp.float32)
    if outputs.unembed_bias is not None:
        logits = logits + outputs.unembed_bias[:num_ids].astype(jnp.float32)[None, None]
    return apply_softcap(logits, outputs.softcap)


@functools.lru_cache(maxsize=16)
def make_apply_logits(model: Any, num_ids: int | None = None) -> ApplyLogits:
    """The logits of a Linen model at chosen positions. One model gives one function, so that jit knows it again.

    num_ids: see `unembed`.
    """

    def apply_logits(params: Params, batch: Batch, positions_BM: jax.Array) -> jax.Array:
        # An encoder gathers the positions before its head; a decoder ignores the key.
        outputs = model.apply({"params": params}, {**batch, "masked_positions": positions_BM})
        hidden = outputs.hidden
        if hidden.shape[:2] != positions_BM.shape:
            hidden = jnp.take_along_axis(hidden, positions_BM[:, :, None], axis=1)
        return unembed(outputs, hidden, num_ids)

    return apply_logits


def pad_rows(rows: Sequence[np.ndarray], max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (B, max_len), lengths (B,)), padded with 0 on the right.

    Raises ValueError if a row is empty or longer than max_len, listing all such rows.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    wrong = [f"row {i} has {n} tokens" for i, n in enumerate(lengths) if not 0 < n <= max_len]
    if wrong or not len(rows):
        raise ValueError(
            f"expected 1 to max_len={max_len} tokens a row: "
            + ("; ".join(wrong) or "no rows given")
        )
    tokens = np.zeros((len(rows), max_len), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


def make_batch(tokens_BT: jax.Array, length_B: jax.Array) -> dict[str, jax.Array]:
    """A model's batch of rows of which the first `length` tokens are real and the rest is padding."""
    positions_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    segment_ids = (positions_BT < length_B[:, None]).astype(jnp.int32)
    return {"tokens": tokens_BT, "segment_ids": segment_ids, "positions": positions_BT}
