"""Texts as vectors: the last hidden states of a model, pooled (Sentence-BERT, arXiv:1908.10084, section 3)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.inference.batches import pad_batch, plan_batches
from jaxlm.models import Head

POOLINGS = ("mean", "first", "last")
MAX_ROWS = 32


@functools.lru_cache(maxsize=16)
def make_embedder(model: Any, pooling: str) -> Callable[..., jax.Array]:
    """Jitted (params, batch) -> float32 (B, D): the pooled states, whatever head the model has.

    pooling: 'mean' of all real tokens, or the 'first' or 'last' of them.
    """
    body = type(model)(model.config, head=Head(model.config, num_classes=0, pooling=pooling))

    def embed(params, batch):
        return body.apply({"params": params}, batch).head_logits[:, 0].astype(jnp.float32)

    return jax.jit(embed)


def embed(
    model: Any, params: Any, rows: Sequence[np.ndarray], *, pooling: str, max_len: int
) -> np.ndarray:
    """A vector for each row of ids: float32 (n, D). rows: 1 to max_len ids each."""
    run = make_embedder(model, pooling)
    vectors = np.zeros((len(rows), model.config.emb_dim), np.float32)
    for batch in plan_batches([len(row) for row in rows], max_len, MAX_ROWS):
        pooled = jax.device_get(run(params, pad_batch(rows, batch)))
        vectors[batch.indices] = pooled[: len(batch.indices)]
    return vectors
