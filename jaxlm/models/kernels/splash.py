"""Splash attention on TPU: flash attention (arXiv:2307.08691) that skips the blocks which a static mask leaves empty.

The kernel is JAX's own (jax.experimental.pallas.ops.tpu.splash_attention). Here is what it wants: lengths in whole
blocks, queries already scaled, a mask that says which blocks there are, and one call on each device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from jaxlm.models.config import TransformerConfig
from jaxlm.models.kernels.sharding import (
    get_split,
    is_split,
    pad_places,
    run_split,
    whole_blocks,
)
from jaxlm.spread import num_shards

LANES = 128  # of a TPU's vector registers: blocks are made of so many places
RESIDUALS = "attended"  # names the output and the softmax's sums, for rematerialisation


def find_limits(config: TransformerConfig, mesh: Mapping[str, int]) -> list[str]:
    """Nothing: any length, head size, window, cap and mesh."""
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
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend_xla`, with the mask of `layers.attention_mask` and, unless `window` is 0, `window_mask`.

    Queries are split over rows, heads and places; each device has the keys and values of all places. Rows are padded
    to whole blocks with segment 0, which nothing real sees.
    """
    rows, length, heads, head_dim = query_BTNH.shape
    query_BTNH = query_BTNH * jnp.asarray(1.0 / math.sqrt(head_dim), query_BTNH.dtype)
    padded = padded_length(length)
    split = get_split(rows, padded // LANES, key_BSKH.shape[2])
    inputs = (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT, segment_ids_BT)
    window = 0 if window >= length else window
    # A mask that knows no places is the same on every device; JAX cannot cut a full one into shards.
    mask_length = split.length if causal or window else None
    queries = padded // num_shards(split.length)
    shape = (queries * num_shards(mask_length), padded)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([make_mask(shape, causal, window)] * heads),
        block_sizes=choose_blocks(queries, padded, window),
        head_shards=num_shards(split.heads),
        q_seq_shards=num_shards(mask_length),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    kernel_spec = None
    if is_split():
        spec = jax.sharding.PartitionSpec(split.heads, mask_length)
        sharding = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        kernel_spec = kernel.manual_sharding_spec(sharding)
    run = run_split(
        run_rows,
        in_specs=(
            kernel_spec,
            split.queries,
            split.keys,
            split.keys,
            split.segments(queries=True),
            split.segments(queries=False),
        ),
        out_specs=split.queries,
    )
    return run(kernel, *(pad_places(x, padded) for x in inputs))[:, :length]


def run_rows(kernel, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS):
    """The kernel, which knows one row, on all rows of a device; it wants heads before places."""
    query_BNTH, key_BKSH, value_BKSH = (
        x.swapaxes(1, 2) for x in (query_BTNH, key_BSKH, value_BSKH)
    )
    segment_ids = splash.SegmentIds(segments_BT, segments_BS)
    return jax.vmap(kernel)(query_BNTH, key_BKSH, value_BKSH, segment_ids).swapaxes(1, 2)


def make_mask(shape: tuple[int, int], causal: bool, window: int) -> masks.Mask:
    """Which of the keys a query sees, whatever their segments, for (queries, keys); evaluated block by block."""
    if window:
        reach = window - 1
        return masks.LocalMask(shape, (reach, 0 if causal else reach), offset=0)
    return masks.CausalMask(shape) if causal else masks.FullMask(shape)


def padded_length(length: int) -> int:
    """The next length that splits into blocks worth their name: of 128 places up to 1,024 in all, then of 512."""
    return whole_blocks(length, LANES if length <= 1024 else 512)


def choose_blocks(length: int, kv_length: int, window: int) -> splash.BlockSizes:
    """Sizes for `length` queries on a device and `kv_length` keys, multiples of 128 that divide them.

    A step of the grid costs a fixed time and its matmuls fill the MXU better when large; but of a causal mask the
    share (1 + block / length) / 2 is computed, so blocks are 512 until an eighth of the row is more, and at most
    1,024, whose scores (1,024 x 512 in float32, several of them) fit the 16 MiB of VMEM that a kernel gets on every
    generation from v4 to v6e. A local window wants blocks no larger than itself.

    One backward kernel makes all three gradients from scores computed once, 5 matmuls instead of 7, but sums those of
    queries outside, from a copy for each block of keys: up to 8 copies, then two kernels take over.
    """
    limit = min(1024, max(512, kv_length // 8))
    if window:
        limit = min(limit, max(LANES, -(-window // LANES) * LANES))
    block_q, block_kv = largest_block(length, limit), largest_block(kv_length, limit)
    compute = largest_block(block_kv, 512)
    fused = kv_length // block_kv <= 8
    return splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )


def largest_block(length: int, limit: int) -> int:
    """The largest multiple of 128 up to `limit` that divides `length`, itself a multiple of 128."""
    blocks = range(LANES, min(length, limit) + 1, LANES)
    return max(block for block in blocks if length % block == 0)
