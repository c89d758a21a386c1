"""Relative positions as biases of attention's scores, by how far a key is from its query (T5, arXiv:1910.10683, section 2.1).

    offset (key's place - query's)   … -9  -8  -7 … -1   0   1 …  7   8   9 …
    bucket of 32, both directions    …  8   8   7 …  1   0  17 … 23  24  24 …
    bucket of 32, causal             …  9   8   7 …  1   0   0 …  0   0   0 …

Near distances have a bucket each, farther ones share buckets that grow as powers do, and from `relative_max_distance` on
there is one. Places are counted in the row: within a document, which is in one piece, they differ as positions do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm.models.config import TransformerConfig
from jaxlm.models.layers import constrain, make_param


class RelativeBias(nn.Module):
    """One bias for each bucket and head, shared by all layers of a stack: float32 (N, T, S)."""

    config: TransformerConfig
    causal: bool

    @nn.compact
    def __call__(self, queries: int, keys: int, first: jax.Array | int = 0) -> jax.Array:
        """Of `queries` queries, the first at the place `first` of `keys` keys."""
        c, init = self.config, nn.initializers.normal(self.config.init_std)
        shape, axes = (c.relative_buckets, c.num_heads), (None, "heads")
        table_RN = make_param(self, "table", init, shape, axes, c.param_dtype).astype(jnp.float32)
        offset_W = jnp.arange(queries + keys) - (queries - 1) - first
        bucket_W = find_buckets(
            offset_W, c.relative_buckets, c.relative_max_distance, causal=self.causal
        )
        bias_NTS = spread(jnp.take(table_RN, bucket_W, axis=0).T, queries, keys)
        return constrain(bias_NTS, ("act_heads", "length", "kv_length"))


def find_buckets(
    offset: jax.Array, num_buckets: int, max_distance: int, *, causal: bool
) -> jax.Array:
    """The bucket of each offset, int32 in the shape of `offset`, 0 to num_buckets - 1; see the picture."""
    ahead = 0 if causal else jnp.where(offset > 0, num_buckets // 2, 0)
    distance = jnp.maximum(-offset, 0) if causal else jnp.abs(offset)
    table = distance_buckets(num_buckets if causal else num_buckets // 2, max_distance)
    return ahead + jnp.asarray(table)[jnp.minimum(distance, max_distance)]


def distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """int32 (max_distance + 1,): of each distance. Half of the buckets are exact, the others grow logarithmically."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    growth = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    # Rounded, or 64 / 8 of 128 / 8 could be a hair less than the 3/4 that it is.
    far = exact + np.floor(np.round(growth * (num_buckets - exact), 6)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, num_buckets - 1)).astype(np.int32)


def spread(x_NW: jax.Array, queries: int, keys: int) -> jax.Array:
    """result[n, t, s] = x[n, s - t + T - 1], of W = T + S, without a gather, whose gradient would be a slow scatter.

    x   a b c d *      T = 2, S = 3      c's row begins one later in each repetition that is cut one shorter

    x x, from T - 1 on, in rows of W - 1     b c d *        the first S of each      b c d
                                             a b c d                                 a b c
    """
    heads, width = len(x_NW), queries + keys
    again = jnp.broadcast_to(x_NW[:, None], (heads, queries, width)).reshape(heads, -1)
    rows = again[:, queries - 1 : -1].reshape(heads, queries, width - 1)
    return rows[:, :, :keys]
