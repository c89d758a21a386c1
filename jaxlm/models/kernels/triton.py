"""Flash attention on GPUs by JAX's own Pallas kernel (jax.experimental.pallas.ops.gpu.attention), compiled by Triton.

It takes segment ids, so packed rows cost no T x T mask: the choice for long ones. It knows no window, and wants a key
and a value for each head, so grouped ones are repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxlm.models.config import TransformerConfig
from jaxlm.models.kernels.sharding import get_split, pad_places, run_split, whole_blocks

BLOCK = 128  # places; rows are padded to whole ones


def find_limits(config: TransformerConfig, mesh: Mapping[str, int]) -> list[str]:
    """What of a config the Triton kernel cannot do, each as found and expected."""
    c, limits = config, []
    if c.attention_softcap:
        limits.append(
            f"attention_softcap={c.attention_softcap}: the Triton kernel caps no scores; set it to 0"
        )
    if any(c.layer_windows):
        limits.append(
            f"attention_windows={c.attention_windows}: the Triton kernel knows no windows; set it to ()"
        )
    if mesh.get("context", 1) > 1:
        limits.append(
            f"mesh.context={mesh['context']}: the Triton kernel wants whole rows on a device; set it to 1"
        )
    return limits


def attend(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    causal: bool,
    window: int,
    softcap: float,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend_xla` with the mask of `layers.attention_mask`; `window` and `softcap` must be 0."""
    from jax.experimental.pallas.ops.gpu import attention  # needs a jaxlib with Triton

    rows, length, heads, head_dim = query_BTNH.shape
    padded = whole_blocks(length, BLOCK)
    split = get_split(rows, padded, key_BSKH.shape[2])._replace(length=None)

    def run(query, key, value, segment_ids):
        groups = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
        return attention.mha(
            query,
            key,
            value,
            segment_ids,
            sm_scale=1.0 / math.sqrt(head_dim),
            causal=causal,
            interpret=interpret,
        )

    specs = (split.queries, split.keys, split.keys, split.segments(queries=True))
    run = run_split(run, in_specs=specs, out_specs=split.queries)
    inputs = (pad_places(x, padded) for x in (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT))
    return run(*inputs)[:, :length]
