"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

What that takes besides causal and a window behind is a mask of (B, 1, T, S), which becomes a bias in the queries'
dtype: 2 T^2 bytes a row, made anew in each layer and held for it alone. Packed rows cost that, and all rows are packed
ones to it. `triton` does without.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jaxlm.models.config import TransformerConfig
from jaxlm.models.kernels.sharding import (
    get_split,
    pad_places,
    run_split,
    whole_blocks,
)
from jaxlm.models.layers import attention_mask, window_mask
from jaxlm.spread import num_shards

DTYPES = ("bfloat16", "float16")
LARGEST_HEAD = 256  # from Hopper on …
LARGEST_HEAD_BEFORE = 128  # … and before it
AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities


def find_limits(config: TransformerConfig, mesh: Mapping[str, int]) -> list[str]:
    """What of a config cuDNN cannot do, each as found and expected."""
    c, limits = config, []
    if c.dtype not in DTYPES:
        limits.append(f"dtype={c.dtype!r}: cuDNN attends in {' or '.join(DTYPES)}")
    if c.head_dim % 8 or c.head_dim > LARGEST_HEAD:
        limits.append(f"head_dim={c.head_dim}: cuDNN wants a multiple of 8, at most {LARGEST_HEAD}")
    if c.attention_softcap:
        limits.append(f"attention_softcap={c.attention_softcap}: cuDNN caps no scores; set it to 0")
    if mesh.get("stage", 1) > 1:
        limits.append(
            f"mesh.stage={mesh['stage']}: jax does not batch cuDNN's masks over stages; set it to 1"
        )
    return limits


def find_device_limits(config: TransformerConfig, capability: tuple[int, ...]) -> list[str]:
    """The same of GPUs of a compute capability."""
    if capability < AMPERE:
        return ["cuDNN attends on GPUs from Ampere on (A100, L4), and this one is older"]
    if capability < HOPPER and config.head_dim > LARGEST_HEAD_BEFORE:
        return [
            f"head_dim={config.head_dim}: before Hopper (H100) cuDNN wants at most {LARGEST_HEAD_BEFORE}"
        ]
    return []


def attend(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    causal: bool,
    window: int,
    softcap: float,
) -> jax.Array:
    """As `attention.attend_xla`, with the mask of `layers.attention_mask` and, unless `window` is 0, `window_mask`."""
    rows, length, _, _ = query_BTNH.shape
    padded = whole_blocks(length, 2)
    split = get_split(rows, padded // 2, key_BSKH.shape[2])
    query, key, value, segment_ids = (
        pad_places(x, padded) for x in (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)
    )
    # cuDNN counts places from the first query it is given, which is the row's only where rows are whole.
    whole = num_shards(split.length) == 1
    mask_BTS = attention_mask(segment_ids, causal=causal and not whole)
    behind = causal and whole
    if window and not behind:
        mask_BTS &= window_mask(padded, window)[None]

    def run(query, key, value, mask_BTS):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask_BTS[:, None],
            is_causal=behind,
            local_window_size=(window - 1, 0) if window and behind else None,
            implementation="cudnn",
        )

    mask_spec = jax.sharding.PartitionSpec(split.batch, split.length, None)
    specs = (split.queries, split.keys, split.keys, mask_spec)
    run = run_split(run, in_specs=specs, out_specs=split.queries)
    return run(query, key, value, mask_BTS)[:, :length]
