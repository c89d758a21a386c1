"""The Block and the stack of them that both decoder (GPT) and encoder (BERT) are made of.

pre       x = x + attention(norm(x));  x = x + mlp(norm(x));  and a norm after the last layer
sandwich  x = x + norm(attention(norm(x)));  x = x + norm(mlp(norm(x)));  and a norm after the last layer
post      x = norm(x + attention(x));  x = norm(x + mlp(x))

In an encoder-decoder's decoder, cross attention stands between the two in the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models import lora, pipeline
from jaxlm.models.attention import Attention, View, is_unrolled, residual_std
from jaxlm.models.cache import KVCache, add_segments, next_positions, slot_mask
from jaxlm.models.config import TransformerConfig
from jaxlm.models.kernels import REFERENCE
from jaxlm.models.layers import (
    ACTIVATIONS,
    LOOKED_AT,
    Auxiliary,
    Norm,
    add_bias,
    attention_mask,
    constrain,
    dropout,
    dropout_key,
    make_param,
    project,
    rotary_table,
    sinusoidal_positions,
    window_mask,
)
from jaxlm.models.moe import MoE, RouterSums, auxiliary
from jaxlm.models.relative import RelativeBias
from jaxlm.spread import num_devices

__all__ = ["MLP", "Block", "Dense", "Embed", "TransformerConfig", "apply_layers", "batch_positions"]

# What remat='dots' keeps of a layer: the outputs of its matmuls, but not attention's scores.
SAVED_NAMES = ("query", "key", "value", "attended", "attention_out", "gate", "up", "mlp_out")
ACTIVATION = ("batch", "length", "act_embed")


def make_norm(config: TransformerConfig, name: str) -> Norm:
    """The config's norm, as a module of this name."""
    c = config
    bias = c.norm_bias and c.norm == "layer_norm"
    return Norm(c.norm, c.norm_eps, bias, c.dtype, c.param_dtype, c.norm_scale_offset, name=name)


class Dense(nn.Module):
    """x @ kernel + bias: (B, M, D) to (B, M, size)."""

    config: TransformerConfig
    size: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        init, zeros = nn.initializers.normal(c.init_std), nn.initializers.zeros
        shape = (x.shape[-1], self.size)
        kernel = make_param(self, "kernel", init, shape, ("embed", None), c.param_dtype)
        y = project(x, kernel.astype(c.dtype), merge_rows=c.merge_rows)
        if not self.use_bias:
            return y
        return add_bias(y, make_param(self, "bias", zeros, shape[1:], ("norm",), c.param_dtype))


class Embed(nn.Module):
    """Token embeddings plus learned or sinusoidal positions plus token types, normed if `use_norm`, then dropout.

    Tables are `table_dim` wide; if that is not the width of the model, `projection` brings the sum there.
    Returns x (B, T, D) in the compute dtype and the token table (V, table_dim) in the parameters' dtype.
    A token outside the vocabulary gives NaN: a loud error instead of a wrong row.
    With a `table` (V, table_dim), another module's, there is none of its own. projected=False leaves x as wide as the
    tables, for models that share them (ELECTRA).
    """

    config: TransformerConfig
    use_norm: bool = False
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        token_types_BT: jax.Array | None,
        table_VD: jax.Array | None = None,
        projected: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        c = self.config
        if table_VD is None:
            table_VD = make_token_table(self, c)
        x = look_up_parts(table_VD, tokens_BT, c.dtype).astype(jnp.float32)
        if c.scale_embeddings:  # rounded as the released Gemmas round it
            x = x * jnp.asarray(math.sqrt(c.table_dim), c.dtype).astype(jnp.float32)
        if c.position == "learned":
            table = self.table("positions", c.position_offset + c.max_len, "pos")
            rows_BT = positions_BT + c.position_offset if c.position_offset else positions_BT
            # In a table that is whole along the width, or XLA would rematerialise what it finds in full.
            x = x + look_up(whole_rows(table, "pos"), rows_BT)
        elif c.position == "sinusoidal":
            x = x + sinusoidal_positions(positions_BT, c.table_dim)
        if c.num_token_types:
            types = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            table = self.table("token_types", c.num_token_types, None)
            x = x + look_up(whole_rows(table, None), types)
        x = constrain(x.astype(c.dtype), ACTIVATION)
        if self.use_norm:
            x = make_norm(c, "norm")(x)
        x = dropout(x, c.dropout_rate, dropout_key(self, c.dropout_rate, self.deterministic))
        if c.embed_factor_dim and projected:
            x = constrain(Dense(c, c.emb_dim, name="projection")(x), ACTIVATION)
        self.sow(LOOKED_AT, "embedded", x)
        return x, table_VD

    def table(self, name: str, size: int, axis: str | None) -> jax.Array:
        """The parameter `name`, (size, table_dim)."""
        return make_table(self, self.config, name, size, axis, self.config.init_std)


def make_table(
    module: nn.Module, config: TransformerConfig, name: str, size: int, axis: str | None, std: float
) -> jax.Array:
    """The parameter `name` of `module`, (size, table_dim), normal with deviation `std`. axis: the logical name of its rows."""
    init, shape = nn.initializers.normal(std), (size, config.table_dim)
    return make_param(module, name, init, shape, (axis, "embed"), config.param_dtype)


def make_token_table(module: nn.Module, config: TransformerConfig) -> jax.Array:
    """The parameter `embedding` (V, table_dim) of `module`."""
    c = config
    std = c.embed_init_std or c.init_std
    return make_table(module, c, "embedding", c.vocab_size, "vocab", std)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole_rows(table_VD: jax.Array, axis: str | None) -> jax.Array:
    """The table whole along its width. Its gradient is not: a plain constraint binds the gradient, too, which every device would
    then hold in full, in float32, only to keep its own part of the sum."""
    return constrain(table_VD, (axis, None))


def _share_gradient(axis: str | None, _: None, grad_VD: jax.Array) -> tuple[jax.Array]:
    if axis is not None and num_devices(axis) > 1:  # or XLA would first make that of all rows
        grad_VD = constrain(grad_VD, (axis, None))
    return (constrain(grad_VD, (axis, "embed")),)


whole_rows.defvjp(lambda table_VD, axis: (whole_rows(table_VD, axis), None), _share_gradient)


def look_up_parts(table_VD: jax.Array, ids_BT: jax.Array, dtype: Any) -> jax.Array:
    """As `look_up`, for a large table whose width devices share: each finds its part of the width for the rows of all of them,
    and they exchange what they found, in `dtype`. So neither the table nor its gradient, which is summed in the table's own
    dtype, is whole anywhere, and less is moved than either. Where devices share the vocabulary, too (`tensor`), the table is gathered
    along its width: each has few of its rows, and XLA held more at once for the exchange (Qwen3 0.6B on v5e-16: 2.4 against 2.0 GB)."""
    alone = num_devices("embed") == 1 or len(ids_BT) % num_devices("batch")  # few rows: of prompts
    if alone or num_devices("vocab") > 1:
        return look_up(whole_rows(table_VD, "vocab"), ids_BT).astype(dtype)
    ids_BT = constrain(ids_BT, ("table_rows", "length"))
    x_BTD = look_up(table_VD, ids_BT).astype(dtype)
    x_BTD = constrain(x_BTD, ("table_rows", "length", "embed"))
    # In two steps: XLA finds no way from a part of the width to rows that experts or stages share, too, but by making it whole.
    return constrain(constrain(x_BTD, ("found_rows", "length", "act_embed")), ACTIVATION)


def look_up(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Rows of the table, (B, T, D); an id outside it gives NaN."""
    return jnp.take(table_VD, ids_BT, axis=0, mode="fill")


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) for the gated ones (arXiv:2002.05202)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        activate = ACTIVATIONS[c.activation]
        up = self.project("up", x_BTD, c.mlp_dim, ("embed", "mlp"), c.init_std)
        if c.is_gated:
            gate = self.project("gate", x_BTD, c.mlp_dim, ("embed", "mlp"), c.init_std)
            hidden = activate(gate) * up
        else:
            hidden = activate(up)
        hidden = constrain(hidden, ("batch", "length", "act_mlp"))
        return self.project("down", hidden, c.emb_dim, ("mlp", "embed"), residual_std(c))

    def project(
        self, name: str, x: jax.Array, size: int, axes: tuple[str, str], std: float
    ) -> jax.Array:
        """x (..., n) by the parameter `name` to (..., size), with its adapter and bias. axes: logical names of both."""
        c = self.config
        shape = (x.shape[-1], size)
        init = nn.initializers.normal(std)
        kernel = make_param(self, name, init, shape, axes, c.param_dtype)
        y = project(x, kernel.astype(c.dtype), merge_rows=c.merge_rows)
        y = lora.adapt(self, c, name, x, y, shape, axes)
        if c.mlp_bias:
            axis = "mlp" if axes[1] == "mlp" else "norm"
            zeros = nn.initializers.zeros
            bias = make_param(self, f"{name}_bias", zeros, (size,), (axis,), c.param_dtype)
            y = add_bias(y, bias)
        return checkpoint_name(y, "mlp_out" if name == "down" else name)


def make_view(
    config: TransformerConfig,
    window: int,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    causal: bool,
    cache: KVCache | None = None,
    bias_NTS: jax.Array | None = None,
    is_prefix_BT: jax.Array | None = None,
) -> View:
    """The view of the layers whose attention window is `window` (0: no limit).

    With a cache the reference attends, and with a prefix, whatever the kernel: no fused one knows them.
    """
    c, rotary = config, None
    theta, scaling = c.rope_theta, c.rope_scaling
    is_fused = c.attention_kernel != REFERENCE and cache is None and is_prefix_BT is None
    if cache is not None:
        mask_BTS = slot_mask(cache, segment_ids_BT, window, is_prefix_BT)
    elif not is_fused:
        mask_BTS = attention_mask(segment_ids_BT, causal=causal, is_prefix_BT=is_prefix_BT)
        if window:
            mask_BTS = mask_BTS & window_mask(segment_ids_BT.shape[1], window)[None]
    if not is_fused:
        mask_BTS = constrain(mask_BTS, ("batch", "length", "kv_length"))
    if window and c.rope_local_theta:
        theta, scaling = c.rope_local_theta, ()
    if c.position == "rotary":
        rotary = rotary_table(positions_BT, c.head_dim, theta, scaling)
    if is_fused:
        return View(rotary=rotary, segment_ids_BT=segment_ids_BT, causal=causal, window=window)
    return View(mask_BTS, rotary, segment_ids_BT if c.num_experts else None, bias_NTS=bias_NTS)


def layer_differences(config: TransformerConfig) -> dict[str, jax.Array]:
    """What differs between layers besides their parameters, each (L,); empty where they are all alike.

    view: the index of the layer's attention window among the distinct ones. is_unnormed: it has no norm before attention.
    """
    c, differences = config, {}
    windows = distinct_windows(c)
    if len(windows) > 1:
        differences["view"] = jnp.array([windows.index(w) for w in c.layer_windows], jnp.int32)
    if not c.first_norm:
        differences["is_unnormed"] = jnp.arange(c.num_layers) == 0
    return differences


def distinct_windows(config: TransformerConfig) -> list[int]:
    """The windows that layers have, ascending; 0 = none."""
    return sorted(set(config.layer_windows))


Carry = tuple[jax.Array, KVCache | None]  # what goes from layer to layer


@flax.struct.dataclass
class Source:
    """What a decoder reads of its encoder: its output, or None where the cache has the keys and values made of it."""

    hidden_BSD: jax.Array | None
    view: View


def make_source(
    hidden_BSD: jax.Array | None, segment_ids_BS: jax.Array, segment_ids_BT: jax.Array
) -> Source:
    """Each place of the decoder sees the encoder's places of its own segment; by the reference, whatever the kernel."""
    mask_BTS = segment_ids_BT[:, :, None] == segment_ids_BS[:, None, :]
    return Source(hidden_BSD, View(constrain(mask_BTS, ("batch", "length", "kv_length"))))


class Block(nn.Module):
    """One layer: attention, cross attention where there is a source, and MLP, each with its norms and its residual.

    Returns what a scan wants: the carry, and for each layer what its router did, or None without experts.

    carry: x (B, T, D), and the cache of all layers or None. views: one for each distinct attention window.
    differences: see `layer_differences`, here of this layer. source: an encoder-decoder's, for its decoder.
    """

    config: TransformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        views: tuple[View, ...],
        differences: Mapping[str, jax.Array],
        source: Source | None = None,
    ) -> tuple[Carry, RouterSums | None]:
        c, (x, cache) = self.config, carry
        attention = Attention(c, self.deterministic, name="attention")
        layer, routed = differences.get("layer"), None

        def attend(x):
            nonlocal cache
            y, cache = attention(x, x, views, differences.get("view"), cache, layer)
            return y

        def attend_source(x):
            nonlocal cache
            cross = Attention(c, self.deterministic, name="cross_attention")
            memory = None if cache is None else cache.memory
            y, memory = cross(x, source.hidden_BSD, (source.view,), None, memory, layer)
            cache = None if cache is None else cache.replace(memory=memory)
            return y

        x = self.add("attention", attend, x, differences.get("is_unnormed"))
        if source is not None:
            x = self.add("cross_attention", attend_source, x)

        def feed_forward(x):
            nonlocal routed
            if not c.num_experts:
                return MLP(c, name="mlp")(x)
            experts = MoE(c, self.deterministic, name="mlp")
            y, routed = experts(x, views[0].segment_ids_BT)
            return y

        x = constrain(self.add("mlp", feed_forward, x), ACTIVATION)
        self.sow(LOOKED_AT, "hidden", x)
        return (x, cache), routed

    def add(
        self,
        name: str,
        part: Callable[[jax.Array], jax.Array],
        x: jax.Array,
        is_unnormed: jax.Array | None = None,
    ) -> jax.Array:
        """x (B, T, D) plus what `part` makes of it, normed before, after, or before and after the sum."""
        c = self.config
        norm = make_norm(c, f"{name}_norm")
        if c.norm_position == "post":
            return norm(x + self.drop(part(x)))
        normed = norm(x) if is_unnormed is None else jnp.where(is_unnormed, x, norm(x))
        y = part(normed)
        if c.norm_position == "sandwich":
            y = make_norm(c, f"{name}_out_norm")(y)
        return x + self.drop(y)

    def drop(self, x: jax.Array) -> jax.Array:
        """Dropout at the config's rate, the shape kept."""
        rate = self.config.dropout_rate
        return dropout(x, rate, dropout_key(self, rate, self.deterministic))


def rematerialised(block: Any, config: TransformerConfig) -> Any:
    """`block` with the layer's remat policy; 'attention' is applied inside the attention itself."""
    policies = jax.checkpoint_policies
    if config.remat in ("none", "attention"):
        return block
    policy = (
        policies.save_only_these_names(*SAVED_NAMES)
        if config.remat == "dots"
        else policies.nothing_saveable
    )
    return nn.remat(block, policy=policy, prevent_cse=is_unrolled(config))


def apply_layers(
    config: TransformerConfig,
    x_BTD: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    causal: bool,
    deterministic: bool,
    cache: KVCache | None = None,
    source: tuple[jax.Array, jax.Array] | None = None,
    is_prefix_BT: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None, Auxiliary | None]:
    """Runs all layers (parameters `layers`, stacked on axis 0), then, unless in post-norm models, `final_norm`.

    source: an encoder's output (B, S, D) and its segment ids (B, S), for cross attention. A cache with a `memory` is filled
    from it, and serves in its place from then on. is_prefix_BT: see `attention_mask`.
    Returns x, the cache, and what the routers add to the loss; None where there is none.

    Call it inside a module's compact method. Masks and rotary angles are made once, outside the loop.
    With a cache the T tokens also see those in it, and are in the cache that is returned. It is the loop's carry, which
    is updated in place; as a stacked input and output all of it would be copied for each token.
    """
    c, bias_NTS, seen = config, None, None
    if cache is not None:
        cache = add_segments(cache, segment_ids_BT)
        if cache.memory is not None:
            if source is not None:
                cache = cache.replace(memory=add_segments(cache.memory, source[1]))
            seen = make_source(source and source[0], cache.memory.segment_ids, segment_ids_BT)
    elif source is not None:
        seen = make_source(*source, segment_ids_BT)
    if c.position == "relative":
        length = segment_ids_BT.shape[1]
        keys, first = (length, 0) if cache is None else (cache.size, cache.end)
        bias_NTS = RelativeBias(c, causal, name="relative_bias")(length, keys, first)

    def see(segment_ids_BT, positions_BT, is_prefix_BT):
        return tuple(
            make_view(
                c, window, segment_ids_BT, positions_BT, causal, cache, bias_NTS, is_prefix_BT
            )
            for window in distinct_windows(c)
        )

    axes = (nn.broadcast, 0, nn.broadcast)
    loop = dict(in_axes=axes, length=c.num_layers, unroll=c.unroll or c.num_layers)
    differences = layer_differences(c)
    if cache is not None:
        differences["layer"] = jnp.arange(c.num_layers)
    stack = functools.partial(
        nn.scan,
        rematerialised(Block, c),
        variable_axes={"params": 0, LOOKED_AT: 0},
        split_rngs={"params": True, "dropout": True},
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    if c.share_layers:  # a stack of one, run again and again
        layers = stack(**loop | dict(length=1, unroll=1))(c, deterministic, name="layers")
        differences = {name: x[:, None] for name, x in differences.items()}
        repeat = nn.scan(
            lambda layers, *inputs: layers(*inputs),
            variable_axes={LOOKED_AT: 0},
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            **loop,
        )
        views = see(segment_ids_BT, positions_BT, is_prefix_BT)
        (x, cache), routed = repeat(layers, (x_BTD, cache), views, differences, seen)
    else:
        layers = stack(**loop)(c, deterministic, name="layers")
        if cache is None and pipeline.num_stages() > 1 and not layers.is_initializing():
            along = (segment_ids_BT, positions_BT, is_prefix_BT, source)
            x, routed = through_stages(layers, see, x_BTD, along, differences)
        else:
            views = see(segment_ids_BT, positions_BT, is_prefix_BT)
            (x, cache), routed = layers((x_BTD, cache), views, differences, seen)
    if cache is not None:
        cache = cache.replace(end=cache.end + x.shape[1])
    x = x if c.norm_position == "post" else make_norm(c, "final_norm")(x)
    return x, cache, auxiliary(c, routed) if c.num_experts else None


def through_stages(
    layers: Block,
    see: Callable[..., tuple[View, ...]],
    x_BTD: jax.Array,
    along: tuple[Any, ...],
    differences: Mapping[str, jax.Array],
) -> tuple[jax.Array, RouterSums | None]:
    """What `layers` (the stack, bound) make of x, and their routers' sums (L, …), by the pipeline of the mesh's stages.

    see: (segment ids, positions, is_prefix) -> views. along: these three of the rows of x, and the source or None.
    """
    c, deterministic = layers.config, layers.deterministic
    block = rematerialised(Block, c)(c, deterministic, parent=None)
    drops = not deterministic and (c.dropout_rate or c.attention_dropout_rate)

    def stage(params, differences, x, along, key):
        *seen, source = along
        views = see(*seen)
        source = source and make_source(*source, seen[0])
        num_layers = len(jax.tree.leaves(params)[0])
        keys = None if key is None else jax.random.split(key, num_layers)

        def layer(x, given):
            params, differences, key = given
            rngs = {} if key is None else {"dropout": key}
            variables = {"params": params}
            (x, _), routed = block.apply(
                variables, (x, None), views, differences, source, rngs=rngs
            )
            return x, routed

        unroll = min(c.unroll or num_layers, num_layers)
        return jax.lax.scan(layer, x, (params, differences, keys), unroll=unroll)

    return pipeline.run_stages(
        stage,
        layers.variables["params"],
        differences,
        x_BTD,
        along,
        layers.make_rng("dropout") if drops else None,
        pipeline.count_micro_batches(len(x_BTD), c.pipeline_micro_batches),
    )


def batch_positions(
    batch: Mapping[str, jax.Array], cache: KVCache | None = None
) -> tuple[jax.Array, jax.Array]:
    """(segment_ids, positions), each (B, T): the batch's own, or one whole segment counted from 0.

    With a cache, positions go on from what is in it.
    """
    tokens = batch["tokens"]
    segment_ids = batch["segment_ids"] if "segment_ids" in batch else jnp.ones_like(tokens)
    if "positions" in batch:
        return segment_ids, batch["positions"]
    if cache is not None:
        return segment_ids, next_positions(cache, segment_ids)
    return segment_ids, jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
