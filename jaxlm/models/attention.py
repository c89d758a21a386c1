"""Attention: projections, rotary positions, QK norm, grouped queries, and the kernels that do the inner part."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models import lora
from jaxlm.models.cache import KVCache, read_layer, write_layer
from jaxlm.models.config import TransformerConfig
from jaxlm.models.kernels import FUSED, find_limits
from jaxlm.models.layers import (
    LOOKED_AT,
    add_bias,
    along_last,
    apply_softcap,
    constrain,
    dropout,
    dropout_key,
    make_param,
    norm_scale,
    project,
    rms_normalise,
    rotate,
)

MASKED = -1e30  # finite, so that a row without a key gives a number and not NaN


def attend_xla(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    mask_BTS: jax.Array,
    key: jax.Array | None = None,
    bias_NTS: jax.Array | None = None,
    *,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with a float32 softmax (arXiv:1706.03762, eq. 1; grouped as in arXiv:2305.13245).

    Head n reads kv head n // G. mask: True = attend. key: for dropout of the probabilities, or None.
    bias: float32, the same for all rows, added to the (capped) scores; None adds nothing.
    Returns (B, T, N, H) in the dtype of the value. Differentiable in reverse mode only.
    """
    batch, length, heads, head_dim = query_BTNH.shape
    query_BKGTH, key_BKSH, mask_B11TS, bias_1KGTS = by_head(
        query_BTNH, key_BSKH, mask_BTS, bias_NTS
    )
    value_BKSH, kept_BKGTS = value_BSKH.swapaxes(1, 2), None
    if key is not None and dropout_rate:
        shape = (*query_BKGTH.shape[:4], key_BKSH.shape[2])
        kept_BKGTS = dropout(jnp.ones(shape, jnp.float32), dropout_rate, key)
    inputs = query_BKGTH, key_BKSH, value_BKSH, mask_B11TS, kept_BKGTS, bias_1KGTS
    out_BKGTH = _attend(softcap, *inputs)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def attention_probs(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    mask_BTS: jax.Array,
    bias_NTS: jax.Array | None = None,
    *,
    softcap: float = 0.0,
) -> jax.Array:
    """Float32 (B, N, T, S): what `attend_xla` weighs the values with, before dropout. To be looked at; it makes its own."""
    inputs = by_head(query_BTNH, key_BSKH, mask_BTS, bias_NTS)
    probs_BKGTS, _ = _probs(softcap, *inputs)
    return probs_BKGTS.reshape(len(probs_BKGTS), -1, *probs_BKGTS.shape[3:])


def by_head(
    query_BTNH: jax.Array, key_BSKH: jax.Array, mask_BTS: jax.Array, bias_NTS: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """(query over sqrt(H) (B, K, G, T, H), key (B, K, S, H), 0 or MASKED (B, 1, 1, T, S), bias (1, K, G, T, S) or None).

    Heads go before positions first: as einsums of the given layouts this took 1.3 times as long on XLA:CPU.
    """
    batch, length, heads, head_dim = query_BTNH.shape
    kv_heads = key_BSKH.shape[2]
    query_BTNH = query_BTNH * jnp.asarray(1.0 / math.sqrt(head_dim), query_BTNH.dtype)
    query_BTKGH = query_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    query_BKGTH, key_BKSH = query_BTKGH.transpose(0, 2, 3, 1, 4), key_BSKH.swapaxes(1, 2)
    mask_B11TS = jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    if bias_NTS is None:
        return query_BKGTH, key_BKSH, mask_B11TS, None
    bias_1KGTS = bias_NTS.reshape(1, *query_BKGTH.shape[1:4], key_BKSH.shape[2])
    return query_BKGTH, key_BKSH, mask_B11TS, bias_1KGTS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(softcap, query_BKGTH, key_BKSH, value_BKSH, mask_B11TS, kept_BKGTS, bias_1KGTS):
    """softmax(softcap(q k) + bias + mask) v; `kept` multiplies the probabilities (dropout). It and bias may be None.

    All but mask (0 or MASKED) and kept have gradients.

    Its gradient is written out for two savings that XLA does not find: the softmax's row sums come from the output,
    H terms each instead of S (arXiv:2205.14135, appendix B.4), and no product wants scores transposed. For those sums
    the output is kept in float32.
    """
    inputs = query_BKGTH, key_BKSH, value_BKSH, mask_B11TS, kept_BKGTS, bias_1KGTS
    return _attend_forward(softcap, *inputs)[0]


def _attend_forward(softcap, query_BKGTH, key_BKSH, value_BKSH, mask_B11TS, kept_BKGTS, bias_1KGTS):
    probs_BKGTS, scores_BKGTS = _probs(softcap, query_BKGTH, key_BKSH, mask_B11TS, bias_1KGTS)
    used_BKGTS = _keep(probs_BKGTS, kept_BKGTS).astype(value_BKSH.dtype)
    out_BKGTH = _to_float32("BKGTS,BKSH->BKGTH", used_BKGTS, value_BKSH)
    capped_BKGTS = scores_BKGTS if softcap else None
    inputs = (query_BKGTH, key_BKSH, value_BKSH, kept_BKGTS, bias_1KGTS)
    return out_BKGTH.astype(value_BKSH.dtype), (inputs, probs_BKGTS, capped_BKGTS, out_BKGTH)


def _probs(softcap, query_BKGTH, key_BKSH, mask_B11TS, bias_1KGTS):
    """(softmax, capped scores without bias), float32 (B, K, G, T, S)."""
    scores_BKGTS = apply_softcap(_to_float32("BKGTH,BKSH->BKGTS", query_BKGTH, key_BKSH), softcap)
    biased_BKGTS = scores_BKGTS if bias_1KGTS is None else scores_BKGTS + bias_1KGTS
    return jax.nn.softmax(biased_BKGTS + mask_B11TS, axis=-1), scores_BKGTS


def _attend_backward(softcap, residuals, grad_BKGTH):
    inputs, probs_BKGTS, capped_BKGTS, out_BKGTH = residuals
    query_BKGTH, key_BKSH, value_BKSH, kept_BKGTS, bias_1KGTS = inputs
    dtype = query_BKGTH.dtype
    used_BKGTS = _keep(probs_BKGTS, kept_BKGTS).astype(dtype)
    value_grad_BKHS = jnp.einsum("BKGTH,BKGTS->BKHS", grad_BKGTH, used_BKGTS)
    probs_grad_BKGTS = _keep(_to_float32("BKGTH,BKSH->BKGTS", grad_BKGTH, value_BKSH), kept_BKGTS)
    row_sums_BKGT = (grad_BKGTH.astype(jnp.float32) * out_BKGTH).sum(-1)
    scores_grad_BKGTS = probs_BKGTS * (probs_grad_BKGTS - row_sums_BKGT[..., None])
    bias_grad_1KGTS = None if bias_1KGTS is None else scores_grad_BKGTS.sum(0, keepdims=True)
    if softcap:
        scores_grad_BKGTS *= 1 - (capped_BKGTS / softcap) ** 2
    scores_grad_BKGTS = scores_grad_BKGTS.astype(dtype)
    key_grad_BKHS = jnp.einsum("BKGTH,BKGTS->BKHS", query_BKGTH, scores_grad_BKGTS)
    query_grad_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", scores_grad_BKGTS, key_BKSH)
    return (
        query_grad_BKGTH,
        key_grad_BKHS.swapaxes(2, 3),
        value_grad_BKHS.swapaxes(2, 3),
        None,
        None,
        bias_grad_1KGTS,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _to_float32(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _keep(x: jax.Array, kept: jax.Array | None) -> jax.Array:
    return x if kept is None else x * kept


@flax.struct.dataclass
class View:
    """What a layer's attention sees, and where it takes the places to be.

    mask_BTS: True = attend; for the reference. None for a fused kernel, which makes it block by block from
    others: segment_ids_BT, and, known when compiling, `causal` and `window` (0: no limit).
    rotary: (cos, sin) of `layers.rotary_table`, or None where it does not rotate.
    bias_NTS: float32, added to the scores (`relative.RelativeBias`), or None; for the reference.
    """

    mask_BTS: jax.Array | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None
    segment_ids_BT: jax.Array | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)
    window: int = flax.struct.field(pytree_node=False, default=0)
    bias_NTS: jax.Array | None = None


def choose(index: jax.Array | None, options: list[Any]) -> Any:
    """The option (arrays, or trees of them) of that index (a scalar); the first if there is no index."""
    if index is None:
        return options[0]
    return jax.tree.map(lambda *arrays: jax.lax.select_n(index, *arrays), *options)


class Attention(nn.Module):
    """Multi-head attention, within a sequence or from one to another, by the options of `config`."""

    config: TransformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        source_BSD: jax.Array | None,
        views: tuple[View, ...],
        index: jax.Array | None = None,
        cache: KVCache | None = None,
        layer: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns (B, T, D), and the cache, if there is one, with what this layer adds to it.

        source: what keys and values are made of: x itself, another sequence, or None where the cache has them all.
        index: which of the views is this layer's; None where there is only one.
        """
        c, new = self.config, None
        query = self.project("query", x_BTD, c.num_heads, "heads")
        if source_BSD is not None:
            new = [self.project(x, source_BSD, c.num_kv_heads, "kv") for x in ("key", "value")]
        rotary = choose(index, [view.rotary for view in views])
        query = self.place("query", query, rotary)
        if c.query_scale:  # kernels divide by sqrt(H)
            query = query * jnp.asarray(c.query_scale * math.sqrt(c.head_dim), query.dtype)
        query = constrain(checkpoint_name(query, "query"), ("batch", "length", "act_heads", None))
        if new is not None:
            key, value = self.gather(self.place("key", new[0], rotary), new[1])
            cache = None if cache is None else write_layer(cache, layer, key, value)
        if cache is not None:
            key, value = read_layer(cache, layer)
        out = self.attend(query, key, value, views, index)
        return self.merge(constrain(out, ("batch", "length", "act_heads", None))), cache

    def place(
        self, name: str, x_BTNH: jax.Array, rotary: tuple[jax.Array, jax.Array] | None
    ) -> jax.Array:
        """Queries or keys (B, T, N, H), normed and rotated where the config says so."""
        x = self.normalise(f"{name}_norm", x_BTNH) if self.config.qk_norm else x_BTNH
        return x if rotary is None else rotate(x, rotary)

    def gather(self, key_BSKH: jax.Array, value_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B, S, K, H) of whole rows, which every query meets: devices that share a row gather them here."""

        def whole(name, x):
            x = constrain(checkpoint_name(x, name), ("batch", "length", "act_kv", None))
            return constrain(x, ("batch", "kv_length", "act_kv", None))

        return whole("key", key_BSKH), whole("value", value_BSKH)

    def project(self, name: str, x_BTD: jax.Array, heads: int, axis: str) -> jax.Array:
        """x (B, T, D) by the parameter `name` to (B, T, heads, H), with its adapter and bias."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        shape, axes = (c.emb_dim, heads, c.head_dim), ("embed", axis, "head_dim")
        kernel = make_param(self, name, init, shape, axes, c.param_dtype)
        y = project(x_BTD, kernel.astype(c.dtype), merge_rows=c.merge_rows)
        y = lora.adapt(self, c, name, x_BTD, y, shape, axes)
        if c.qkv_bias:
            zeros = nn.initializers.zeros
            bias = make_param(self, f"{name}_bias", zeros, shape[1:], axes[1:], c.param_dtype)
            y = add_bias(y, bias)
        return y

    def normalise(self, name: str, x_BTNH: jax.Array) -> jax.Array:
        """RMS norm of each head's H numbers (Qwen3; arXiv:2302.05442, section 2)."""
        c = self.config
        scale = norm_scale(self, name, c.head_dim, c.norm_scale_offset, c.param_dtype)
        y = rms_normalise(x_BTNH, c.norm_eps)
        return (y * along_last(scale, y)).astype(c.dtype)

    def attend(
        self,
        query_BTNH: jax.Array,
        key_BSKH: jax.Array,
        value_BSKH: jax.Array,
        views: tuple[View, ...],
        index: jax.Array | None,
    ) -> jax.Array:
        """What the queries read, (B, T, N, H), by the config's kernel. index: the layer's kind among `views`."""
        c = self.config
        if limits := find_limits(c):
            raise ValueError(f"attention_kernel={c.attention_kernel!r}:\n  " + "\n  ".join(limits))
        if views[0].mask_BTS is None:
            return self.attend_fused(query_BTNH, key_BSKH, value_BSKH, views, index)
        mask_BTS = choose(index, [view.mask_BTS for view in views])
        rate = c.attention_dropout_rate
        rng = dropout_key(self, rate, self.deterministic)
        attend = functools.partial(attend_xla, softcap=c.attention_softcap, dropout_rate=rate)
        if c.remat == "attention":
            attend = jax.checkpoint(attend, prevent_cse=is_unrolled(c))
        out = attend(query_BTNH, key_BSKH, value_BSKH, mask_BTS, rng, views[0].bias_NTS)
        if self.is_mutable_collection(LOOKED_AT):
            softcap, seen = c.attention_softcap, (query_BTNH, key_BSKH, mask_BTS, views[0].bias_NTS)
            self.sow(LOOKED_AT, "probs", attention_probs(*seen, softcap=softcap))
        return checkpoint_name(out, "attended")

    def attend_fused(
        self,
        query_BTNH: jax.Array,
        key_BSKH: jax.Array,
        value_BSKH: jax.Array,
        views: tuple[View, ...],
        index: jax.Array | None,
    ) -> jax.Array:
        """As `attend`, by a kernel that holds no scores; remat='attention' has nothing to recompute there."""
        c = self.config
        if self.is_initializing():
            return query_BTNH  # parameters do not depend on it, and are made from one row
        kernels = [
            functools.partial(
                FUSED[c.attention_kernel].attend,
                causal=view.causal,
                window=view.window,
                softcap=c.attention_softcap,
            )
            for view in views
        ]
        inputs = (query_BTNH, key_BSKH, value_BSKH, views[0].segment_ids_BT)
        return kernels[0](*inputs) if index is None else jax.lax.switch(index, kernels, *inputs)

    def merge(self, x_BTNH: jax.Array) -> jax.Array:
        """Heads (B, T, N, H) by the parameter `out` to (B, T, D), with its adapter and bias."""
        c = self.config
        init = nn.initializers.normal(residual_std(c))
        shape, axes = (c.num_heads, c.head_dim, c.emb_dim), ("heads", "head_dim", "embed")
        kernel = make_param(self, "out", init, shape, axes, c.param_dtype)
        y = project(x_BTNH, kernel.astype(c.dtype), axes=2, merge_rows=c.merge_rows)
        y = lora.adapt(self, c, "out", x_BTNH, y, shape, axes, num_in=2)
        if c.out_bias:
            zeros = nn.initializers.zeros
            bias = make_param(self, "out_bias", zeros, (c.emb_dim,), ("norm",), c.param_dtype)
            y = add_bias(y, bias)
        return y


def residual_std(config: TransformerConfig) -> float:
    """Initial deviation of the matrices that write into the residual stream.

    0 with zero_init_out; in pre-norm models init_std / sqrt(2 L) (GPT-2 paper, section 2.3); in post-norm init_std.
    """
    if config.zero_init_out:
        return 0.0
    if config.norm_position == "post":
        return config.init_std
    return config.init_std / math.sqrt(2 * config.num_layers)


def is_unrolled(config: TransformerConfig) -> bool:
    """Whether no loop is left: then only `prevent_cse` keeps XLA from undoing rematerialisation."""
    return config.unroll in (0, config.num_layers)
