"""What a model does between its first layer and its last: attention's probabilities, and what layers hand on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxlm.inference.batches import pad_batch, plan_batches
from jaxlm.models.heads import POOLINGS
from jaxlm.models.kernels import REFERENCE
from jaxlm.models.layers import LOOKED_AT
from jaxlm.parallel.processes import fetch

MAX_ROWS = 8


def read_inside(model: Any, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Name -> array of what the model's modules keep in `layers.LOOKED_AT`: 'embed/embedded', 'layers/attention/probs', ….

    By the reference attention, whatever kernel the config names: the fused ones never hold probabilities.
    """
    config = dataclasses.replace(model.config, attention_kernel=REFERENCE, remat="none")
    _, found = model.clone(config=config).apply({"params": params}, batch, mutable=[LOOKED_AT])
    return {path: x for path, (x,) in flatten_dict(found[LOOKED_AT], sep="/").items()}


@functools.lru_cache(maxsize=16)
def make_attention_reader(model: Any) -> Callable[..., dict[str, jax.Array]]:
    """Jitted (params, batch) -> name of an attention -> float32 (L, B, N, T, S): who looks at whom; rows sum to 1."""

    def read(params, batch):
        found = read_inside(model, params, batch)
        # Layers that share their parameters stand in two nested loops.
        return {
            path.removesuffix("/probs"): x.reshape(-1, *x.shape[-4:])
            for path, x in found.items()
            if path.endswith("/probs")
        }

    return jax.jit(read)


@functools.lru_cache(maxsize=16)
def make_state_reader(model: Any, pooling: str) -> Callable[..., jax.Array]:
    """Jitted (params, batch) -> float32 (L + 1, B, D): the embeddings, then what each layer hands on, pooled."""

    def read(params, batch):
        found = read_inside(model, params, batch)
        hidden = found["layers/hidden"]
        states = [found["embed/embedded"], *hidden.reshape(-1, *hidden.shape[-3:])]
        pool = lambda x_BTD: POOLINGS[pooling](x_BTD.astype(jnp.float32), batch)[:, 0]
        return jnp.stack([pool(x_BTD) for x_BTD in states])

    return jax.jit(read)


def pooled_states(
    model: Any, params: Any, rows: Sequence[np.ndarray], *, pooling: str, max_len: int
) -> np.ndarray:
    """Float32 (L + 1, n, D): of each row of ids (1 to max_len) the states of every layer, the embeddings first.

    pooling: 'mean' of all real tokens, or the 'first' or 'last' of them. The final norm of pre-norm models is not applied.
    """
    read, parts = make_state_reader(model, pooling), {}
    for batch in plan_batches([len(row) for row in rows], max_len, MAX_ROWS):
        states = fetch(read(params, pad_batch(rows, batch)))
        parts |= dict(zip(batch.indices.tolist(), states.swapaxes(0, 1), strict=False))
    return np.stack([parts[i] for i in range(len(rows))], axis=1)
