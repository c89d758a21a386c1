"""Small parts that every model shares, and the names that every array carries.

Shape letters (einsums and variable suffixes use the same ones):

    B batch   T query length   S key length   D width   N heads   K kv heads   G = N / K
    H head dim   F mlp dim   V vocab   P positions in a table   L layers
    M masked positions   E examples in a row   C classes   R rank of an adapter

Parameters and activations name their axes by the logical names in `LOGICAL_AXES`; which mesh axis a name means is
decided in one table elsewhere. An unknown name raises here, because Flax would ignore it in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm.mixing import LOWBIAS32, mix
from jaxlm.spread import num_devices

PARAM_AXES = frozenset(
    {"embed", "expert", "mlp", "heads", "kv", "head_dim", "vocab", "layers", "norm", "pos", "rank"}
)
ACTIVATION_AXES = frozenset(
    {
        "batch",
        "table_rows",
        "found_rows",
        "length",
        "kv_length",
        "act_embed",
        "act_heads",
        "act_kv",
        "act_mlp",
        "act_vocab",
        "act_expert",
        "act_group",
    }
)
LOGICAL_AXES = PARAM_AXES | ACTIVATION_AXES

# Flax's collection of what is kept to be looked at, where apply's `mutable` names it; else nothing of it is computed:
# `embedded` (B, T, D) of Embed; of each layer `hidden` (L, B, T, D), what it hands on, and `probs` (L, B, N, T, S) of Attention.
LOOKED_AT = "intermediates"

Axes = tuple[str | None, ...]


@flax.struct.dataclass
class Auxiliary:
    """What layers add to the loss of a batch besides what their outputs are judged by: float32.

    loss: () in units of the mean loss. metrics: name -> (total, weight).
    """

    loss: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class Outputs:
    """What a model returns in training: never logits over the vocabulary, but the two factors that make them.

    hidden: (B, T, D), or (B, M, D) at gathered positions; final-normed or head-transformed.
    unembed: (V, D) in the parameters' dtype; logits = softcap(hidden @ unembed.T + unembed_bias). None with a task head.
    unembed_bias: (V,) or None.
    pair_logits: (B, E, C) float32 or None: the next-sentence or sentence-order head.
    head_logits: (B, E, C) or (B, T, C) float32 or None: a task head's (`heads.Head`).
    head_labels: (B, T) int32 or None: what head_logits should say, where the model itself decides that (ELECTRA).
    cache: a decoder's `cache.KVCache` with the tokens of this call in it, if it was given one.
    auxiliary: of routers (`moe.auxiliary`), or None.
    softcap: logits become softcap * tanh(logits / softcap); 0 means none.
    """

    hidden: jax.Array
    unembed: jax.Array | None
    unembed_bias: jax.Array | None = None
    pair_logits: jax.Array | None = None
    head_logits: jax.Array | None = None
    head_labels: jax.Array | None = None
    cache: Any = None
    auxiliary: Auxiliary | None = None
    softcap: float = flax.struct.field(pytree_node=False, default=0.0)


def check_axes(axes: Axes, ndim: int | None = None) -> None:
    """Raises ValueError if a logical name is unknown or the number of names is not `ndim`."""
    unknown = [name for name in axes if name is not None and name not in LOGICAL_AXES]
    if unknown:
        raise ValueError(
            f"unknown logical axis {unknown} in {axes}; known: {sorted(LOGICAL_AXES)}. "
            "Use one of these, or add the name here and to the rule table."
        )
    if ndim is not None and len(axes) != ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of {ndim} dimensions")


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Constrains the sharding of `x` by the logical names of its axes (None = replicated); does nothing without a mesh."""
    check_axes(axes, x.ndim)
    return nn.with_logical_constraint(x, axes)


def make_param(
    module: nn.Module,
    name: str,
    init: Callable[..., jax.Array],
    shape: tuple[int, ...],
    axes: Axes,
    dtype: Any,
) -> jax.Array:
    """A parameter of `module`, of this shape, that carries the logical names of its axes."""
    check_axes(axes, len(shape))
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype))


def project(x: jax.Array, kernel: jax.Array, axes: int = 1, *, merge_rows: bool) -> jax.Array:
    """The last `axes` axes of x contracted with the first of a kernel: (B, T, D) x (D, N, H) -> (B, T, N, H).

    merge_rows: as one product of two matrices, because XLA:CPU copies transposed operands for the gradient of any other shape;
    but where devices share `length`, B and T stay apart: rows merged over both could not stay where they are. For TPUs not:
    a product of all axes can be written in the order of axes that a kernel reads, one of two matrices is copied into it.
    """
    if not merge_rows:
        return jnp.tensordot(x, kernel, axes)
    rows, columns = x.shape[: x.ndim - axes], kernel.shape[axes:]
    inner = math.prod(kernel.shape[:axes])
    merged = rows if num_devices("length") > 1 else (math.prod(rows),)
    y = x.reshape(*merged, inner) @ kernel.reshape(inner, math.prod(columns))
    return y.reshape(*rows, *columns)


def along_last(v: jax.Array, x: jax.Array) -> jax.Array:
    """Gives `v` leading axes of size 1, so that it lines up with the last axes of `x`."""
    return jnp.expand_dims(v, tuple(range(x.ndim - v.ndim)))


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x (..., n) + bias (n,), or over more last axes; in float32, so that the bias's gradient is a sum in float32."""
    return (x.astype(jnp.float32) + along_last(bias.astype(jnp.float32), x)).astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of `x` and scales up the rest; without a key it is the identity."""
    if key is None or rate == 0.0:
        return x
    keep = hashed_bits(key, x.shape) >= np.uint32(int(rate * 2**32))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 for dropout: each element's index in the whole array, hashed with one and then the other word of the key.

    Much less work than jax.random.bits, which a TPU's step feels, and the same on every mesh, too. Indices are taken modulo
    2**32: elements that far apart share their bits. Too weak for anything but masks.
    """
    words = jax.random.key_data(key).reshape(-1)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return mix(mix(index ^ words[0], LOWBIAS32) ^ words[1], LOWBIAS32)


def dropout_key(module: nn.Module, rate: float, deterministic: bool) -> jax.Array | None:
    """A fresh key for `dropout`, or None where there is nothing to drop (then no operation is emitted)."""
    return None if deterministic or rate == 0.0 else module.make_rng("dropout")


def apply_softcap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap), so |result| < cap (Gemma 2, arXiv:2408.00118, section 2); cap 0 is the identity."""
    return cap * jnp.tanh(x / cap) if cap else x


# --- activations ------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: (
        0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    ),  # erfc would cost twice as much
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # Primer, arXiv:2109.08668
    "swiglu": jax.nn.silu,  # of the gate; arXiv:2002.05202
}
# Of the gate; arXiv:2002.05202.
ACTIVATIONS |= {"geglu": ACTIVATIONS["gelu"], "geglu_tanh": ACTIVATIONS["gelu_tanh"]}
GATED = frozenset({"swiglu", "geglu", "geglu_tanh"})


# --- normalisation ----------------------------------------------------------------------------------------------------


def rms_normalise(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32, in the shape of x (arXiv:1910.07467, eq. 4)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def norm_scale(module: nn.Module, name: str, size: int, offset: float, param_dtype: Any) -> Any:
    """What a norm multiplies by, (size,) in float32 and 1 at first: `offset` plus the parameter `name`."""
    init = nn.initializers.constant(1.0 - offset)
    scale = make_param(module, name, init, (size,), ("norm",), param_dtype).astype(jnp.float32)
    return scale + offset if offset else scale


class Norm(nn.Module):
    """Layer norm (arXiv:1607.06450) or RMS norm over the last axis; statistics in float32, result in `dtype`."""

    kind: str
    eps: float
    use_bias: bool
    dtype: Any
    param_dtype: Any
    scale_offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros, size = nn.initializers.zeros, x.shape[-1:]
        scale = norm_scale(self, "scale", size[0], self.scale_offset, self.param_dtype)
        y = x.astype(jnp.float32)
        if self.kind == "layer_norm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = rms_normalise(y, self.eps) * along_last(scale, y)
        if self.use_bias:
            bias = make_param(self, "bias", zeros, size, ("norm",), self.param_dtype)
            y = y + along_last(bias.astype(jnp.float32), y)
        return y.astype(self.dtype)


# --- positions --------------------------------------------------------------------------------------------------------


def sinusoidal_positions(positions_BT: jax.Array, width: int) -> jax.Array:
    """Fixed sines and cosines (B, T, width), float32 (arXiv:1706.03762, section 3.5; halves, not interleaved)."""
    half = width // 2
    frequency_h = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotary_frequencies(head_dim: int, theta: float, scaling: tuple[float, ...] = ()) -> jax.Array:
    """Radians per position (head_dim / 2,), float32 (arXiv:2104.09864, section 3.2.2).

    scaling: (); (factor,) stretches every wavelength (arXiv:2306.15595); Llama 3.1's (factor, low, high, original_len)
    stretches those over original_len / low, keeps those under original_len / high and blends those between (as in
    Meta's llama-models).
    """
    half = head_dim // 2
    frequency = jnp.exp(-math.log(theta) * jnp.arange(half, dtype=jnp.float32) / half)
    if len(scaling) < 2:
        return frequency / scaling[0] if scaling else frequency
    factor, low, high, original_len = scaling
    turns = original_len * frequency / (2 * math.pi)  # full turns within the original context
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / factor)


def rotary_table(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each (B, T, head_dim / 2) in float32: computed once and used by every layer."""
    frequency_h = rotary_frequencies(head_dim, theta, scaling)
    angles = positions_BT.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x[i], x[i + H/2]) by their position's angle, in float32; result as x. table: `rotary_table`'s."""
    cos, sin = (t[:, :, None, :] for t in table)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


# --- masks ------------------------------------------------------------------------------------------------------------


def attention_mask(
    segment_ids_BT: jax.Array, *, causal: bool, is_prefix_BT: jax.Array | None = None
) -> jax.Array:
    """Boolean (B, T, S), True = attend: within the same segment only, and with `causal` never to a later place.

        segments   1 1 2 2 0        causal   1 . . . .        is_prefix 1 1 1 0 0   1 1 . . .
                                             1 1 . . .        (causal)              1 1 . . .
                                             . . 1 . .                              . . 1 . .
                                             . . 1 1 .                              . . 1 1 .
                                             . . . . 1                              . . . . 1

    is_prefix_BT: bool, places that also see the later ones among them (arXiv:1910.10683, figure 3, right).
    Padding (segment 0) sees padding only, so no row is empty and nothing real depends on it.
    """
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    if not causal:
        return same
    length = segment_ids_BT.shape[1]
    earlier = jnp.tril(jnp.ones((length, length), bool))[None]
    if is_prefix_BT is not None:
        earlier = earlier | (is_prefix_BT[:, :, None] & is_prefix_BT[:, None, :])
    return same & earlier


def window_mask(length: int, window: int) -> jax.Array:
    """Boolean (T, S), True = less than `window` places apart (arXiv:2004.05150, section 3.1; causal: arXiv:2310.06825).

    window 2   1 1 . . .        with the causal mask   1 . . . .
               1 1 1 . .                               1 1 . . .
               . 1 1 1 .                               . 1 1 . .
               . . 1 1 1                               . . 1 1 .
               . . . 1 1                               . . . 1 1
    """
    place = jnp.arange(length)
    return jnp.abs(place[:, None] - place[None, :]) < window
