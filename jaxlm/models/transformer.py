"""The Block and the stack of them that both decoder (GPT) and encoder (BERT) are made of.

pre   x = x + attention(norm(x));  x = x + mlp(norm(x));  and a norm after the last layer
post  x = norm(x + attention(x));  x = norm(x + mlp(x))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models.attention import Attention, is_unrolled, residual_std
from jaxlm.models.config import TransformerConfig
from jaxlm.models.layers import (
    ACTIVATIONS,
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
)

__all__ = ["MLP", "Block", "Embed", "TransformerConfig", "apply_layers", "batch_positions"]

# What remat='dots' keeps of a layer: the outputs of its matmuls, but not attention's scores.
SAVED_NAMES = ("query", "key", "value", "attended", "attention_out", "gate", "up", "mlp_out")
ACTIVATION = ("batch", "length", "act_embed")


def make_norm(config: TransformerConfig, name: str) -> Norm:
    bias = config.norm_bias and config.norm == "layer_norm"
    return Norm(config.norm, config.norm_eps, bias, config.dtype, config.param_dtype, name=name)


class Embed(nn.Module):
    """Token embeddings plus learned or sinusoidal positions plus token types, normed if `use_norm`, then dropout.

    Returns x (B, T, D) in the compute dtype and the token table (V, D) in the parameters' dtype.
    A token outside the vocabulary gives NaN: a loud error instead of a wrong row.
    """

    config: TransformerConfig
    use_norm: bool = False
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, token_types_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        c = self.config
        table_VD = self.table("embedding", c.vocab_size, "vocab")
        # Looked up in a table that is whole along the width, or XLA would rematerialise it in full.
        x = look_up(constrain(table_VD, ("vocab", None)), tokens_BT).astype(jnp.float32)
        if c.position == "learned":
            x = x + look_up(self.table("positions", c.max_len, "pos"), positions_BT)
        elif c.position == "sinusoidal":
            x = x + sinusoidal_positions(positions_BT, c.emb_dim)
        if c.num_token_types:
            types = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            x = x + look_up(self.table("token_types", c.num_token_types, None), types)
        x = constrain(x.astype(c.dtype), ACTIVATION)
        if self.use_norm:
            x = make_norm(c, "norm")(x)
        x = dropout(x, c.dropout_rate, dropout_key(self, c.dropout_rate, self.deterministic))
        return x, table_VD

    def table(self, name: str, size: int, axis: str | None) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(c.init_std)
        return make_param(self, name, init, (size, c.emb_dim), (axis, "embed"), c.param_dtype)


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
        c = self.config
        shape = (x.shape[-1], size)
        init = nn.initializers.normal(std)
        kernel = make_param(self, name, init, shape, axes, c.param_dtype)
        y = project(x, kernel.astype(c.dtype))
        if c.mlp_bias:
            axis = "mlp" if axes[1] == "mlp" else "norm"
            zeros = nn.initializers.zeros
            bias = make_param(self, f"{name}_bias", zeros, (size,), (axis,), c.param_dtype)
            y = add_bias(y, bias)
        return checkpoint_name(y, "mlp_out" if name == "down" else name)


class Block(nn.Module):
    """One layer: attention and MLP, each with its norm and its residual. Returns (x, None), as a scan wants."""

    config: TransformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, None]:
        c = self.config
        attention = Attention(c, self.deterministic, name="attention")
        mlp = MLP(c, name="mlp")
        attention_norm, mlp_norm = make_norm(c, "attention_norm"), make_norm(c, "mlp_norm")
        if c.norm_position == "pre":
            x = x_BTD + self.drop(attention(attention_norm(x_BTD), mask_BTS, rotary))
            x = x + self.drop(mlp(mlp_norm(x)))
        else:
            x = attention_norm(x_BTD + self.drop(attention(x_BTD, mask_BTS, rotary)))
            x = mlp_norm(x + self.drop(mlp(x)))
        return constrain(x, ACTIVATION), None

    def drop(self, x: jax.Array) -> jax.Array:
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
) -> jax.Array:
    """Runs all layers (parameters `layers`, stacked on axis 0), then, in pre-norm models, `final_norm`.

    Call it inside a module's compact method. The mask and the rotary angles are made once, outside the loop.
    """
    c = config
    mask_BTS = attention_mask(segment_ids_BT, causal=causal)
    rotary = None
    if c.position == "rotary":
        rotary = rotary_table(positions_BT, c.head_dim, c.rope_theta, c.rope_scaling)
    layers = nn.scan(
        rematerialised(Block, c),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=c.num_layers,
        unroll=c.unroll or c.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, deterministic, name="layers")
    x_BTD, _ = layers(x_BTD, mask_BTS, rotary)
    return make_norm(c, "final_norm")(x_BTD) if c.norm_position == "pre" else x_BTD


def batch_positions(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(segment_ids, positions), each (B, T): the batch's own, or one whole segment counted from 0."""
    tokens = batch["tokens"]
    segment_ids = batch["segment_ids"] if "segment_ids" in batch else jnp.ones_like(tokens)
    if "positions" in batch:
        return segment_ids, batch["positions"]
    return segment_ids, jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
