"""Keys and values of the tokens that a decoder has read, so that each new token costs one position's work.

All rows of a batch fill the same slot at a time: prompts of different lengths are padded on the left.

    slots      0 1 2 3 4 5 6 7         `end` = 5: the next token goes to slot 5 in every row
    row 0      . . a b c _ _ _         segment_ids  0 0 1 1 1 0 0 0      its position is 3
    row 1      d e f g h _ _ _                      1 1 1 1 1 0 0 0      its position is 5

A token sees the slots of its own segment up to its own, and less than a window away where its layer has one.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.models.config import TransformerConfig
from jaxlm.models.layers import constrain

AXES = (None, "batch", "act_kv", "kv_length", None)


@flax.struct.dataclass
class KVCache:
    """What all layers remember of `end` tokens in each row; there is room for S.

    key, value: (L, B, K, S, H) in the compute dtype, of the kv heads only; keys already normed and rotated.
    segment_ids: (B, S) int32; 0 is padding or not yet filled. end: () int32.
    memory: of an encoder-decoder, the keys and values that its decoder makes of what the encoder has read, made once
    and full from then on; their slots are the encoder's places.
    """

    key: jax.Array
    value: jax.Array
    segment_ids: jax.Array
    end: jax.Array
    memory: KVCache | None = None

    @property
    def size(self) -> int:
        """Places, those not yet written included."""
        return self.segment_ids.shape[1]


def make_cache(config: TransformerConfig, rows: int, size: int, source_len: int = 0) -> KVCache:
    """An empty cache of `size` slots. source_len: of an encoder-decoder, the places that its encoder reads."""
    c = config.decoder
    shape = (c.num_layers, rows, c.num_kv_heads, size, c.head_dim)
    empty = constrain(jnp.zeros(shape, c.dtype), AXES)
    memory = make_cache(c, rows, source_len) if source_len else None
    return KVCache(empty, empty, jnp.zeros((rows, size), jnp.int32), jnp.int32(0), memory)


def grow(cache: KVCache, size: int) -> KVCache:
    """The same with room for `size` tokens, as many as it has or more; a `memory` grows no more."""
    more = size - cache.size
    widen = lambda x: constrain(jnp.pad(x, [(0, 0)] * 3 + [(0, more), (0, 0)]), AXES)
    segment_ids = jnp.pad(cache.segment_ids, [(0, 0), (0, more)])
    return cache.replace(key=widen(cache.key), value=widen(cache.value), segment_ids=segment_ids)


def take_rows(cache: KVCache, ids_B: jax.Array) -> KVCache:
    """Row i of the result is row ids_B[i]: what beams need that continue others."""
    take = lambda x: constrain(jnp.take(x, ids_B, axis=1), AXES)
    segment_ids = jnp.take(cache.segment_ids, ids_B, axis=0)
    memory = None if cache.memory is None else take_rows(cache.memory, ids_B)
    return KVCache(take(cache.key), take(cache.value), segment_ids, cache.end, memory)


def next_positions(cache: KVCache, segment_ids_BT: jax.Array) -> jax.Array:
    """(B, T): how many real tokens of its row come before each new one; 0 for padding on the left."""
    before_B = (cache.segment_ids > 0).sum(1, dtype=jnp.int32)
    counted_BT = jnp.cumsum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
    return jnp.maximum(before_B[:, None] + counted_BT - 1, 0)


def add_segments(cache: KVCache, segment_ids_BT: jax.Array) -> KVCache:
    """Notes the segments of T new tokens, so that masks can be made; `end` stays until all layers have written."""
    at = (jnp.int32(0), cache.end)
    new = segment_ids_BT.astype(jnp.int32)
    return cache.replace(segment_ids=jax.lax.dynamic_update_slice(cache.segment_ids, new, at))


def slot_mask(
    cache: KVCache, segment_ids_BT: jax.Array, window: int, is_prefix_BT: jax.Array | None = None
) -> jax.Array:
    """Boolean (B, T, S), True = attend: `layers.attention_mask` (causal) and `layers.window_mask` of the new tokens
    over the slots. window 0: no limit. is_prefix_BT: those of the new tokens that also see the later ones among them."""
    slot_S = jnp.arange(cache.size)
    place_T = cache.end + jnp.arange(segment_ids_BT.shape[1])
    behind_TS = place_T[:, None] - slot_S[None, :]
    seen_BTS = (behind_TS >= 0)[None]
    if is_prefix_BT is not None:
        slots_BS = jnp.zeros(cache.segment_ids.shape, bool)
        slots_BS = jax.lax.dynamic_update_slice(slots_BS, is_prefix_BT, (0, cache.end))
        seen_BTS = seen_BTS | (is_prefix_BT[:, :, None] & slots_BS[:, None, :])
    if window:
        seen_BTS = seen_BTS & (jnp.abs(behind_TS) < window)[None]
    return (segment_ids_BT[:, :, None] == cache.segment_ids[:, None, :]) & seen_BTS


def write_layer(
    cache: KVCache, layer: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array
) -> KVCache:
    """Puts the keys and values (B, T, K, H) of one layer's T new tokens into the slots from `end` on."""
    zero = jnp.int32(0)
    at = (layer, zero, zero, cache.end, zero)

    def write(stored, new_BTKH):
        new = new_BTKH.swapaxes(1, 2)[None].astype(stored.dtype)
        return constrain(jax.lax.dynamic_update_slice(stored, new, at), AXES)

    return cache.replace(key=write(cache.key, key_BTKH), value=write(cache.value, value_BTKH))


def read_layer(cache: KVCache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(key, value) of one layer, each (B, S, K, H): all slots, filled or not."""
    read = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).swapaxes(1, 2)
    return read(cache.key), read(cache.value)
