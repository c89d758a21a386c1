"""What stands on top of a model: the masked-token transform, and the heads of tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.models.config import TransformerConfig
from jaxlm.models.layers import (
    ACTIVATIONS,
    add_bias,
    dropout,
    dropout_key,
    make_param,
    project,
)
from jaxlm.models.transformer import Dense, batch_positions, make_norm


def gather_positions(x_BTD: jax.Array, positions_BM: jax.Array) -> jax.Array:
    """x at the given positions of each row: (B, M, D)."""
    return jnp.take_along_axis(x_BTD, positions_BM[:, :, None], axis=1)


def transform(
    module: nn.Module,
    config: TransformerConfig,
    x: jax.Array,
    size: int,
    activation: str,
    *,
    use_norm: bool,
) -> jax.Array:
    """activation(x W + b), normed if `use_norm`: (B, M, D) or wider to (B, M, size).

    The parameters `dense`, `bias` (where MLPs have biases) and `norm` are the module's own.
    """
    c = config
    init, zeros = nn.initializers.normal(c.init_std), nn.initializers.zeros
    shape = (x.shape[-1], size)
    dense = make_param(module, "dense", init, shape, ("embed", None), c.param_dtype)
    x = project(x, dense.astype(c.dtype), merge_rows=c.merge_rows)
    if c.mlp_bias:
        x = add_bias(x, make_param(module, "bias", zeros, shape[1:], ("norm",), c.param_dtype))
    x = HEAD_ACTIVATIONS[activation](x)
    return make_norm(c, "norm")(x) if use_norm else x


class MLMHead(nn.Module):
    """norm(activation(x W + b)) and the output bias (V,), as in BERT (arXiv:1810.04805, reference code).

    With factorised embeddings W leads back to their width.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BMD: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        x = transform(self, c, x_BMD, c.table_dim, c.activation, use_norm=True)
        zeros = nn.initializers.zeros
        vocab_bias = make_param(
            self, "vocab_bias", zeros, (c.vocab_size,), ("vocab",), c.param_dtype
        )
        return x, vocab_bias


class Head(nn.Module):
    """A task's logits: pool, transform, dropout, dense, each of them optional.

    pooling: 'first' token (of each example, with example_positions (B, E) in the batch), 'last' real token, 'mean' of
    the real tokens (of segment e for example e, with example_positions), 'entities', the vectors at both
    example_entity_positions (B, E, 2) side by side, or '' for logits at every token.
    transform: the activation after a dense layer as wide as the model, '' for no such layer; use_norm: a norm after it.
    num_classes: C, or 0 for the vectors themselves.
    Returns float32 (B, E, C), where E is 1 without example_positions, or (B, T, C) at every token.
    """

    config: TransformerConfig
    num_classes: int
    pooling: str = ""
    transform: str = ""
    use_norm: bool = False
    use_bias: bool = True
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, batch: Mapping[str, jax.Array], deterministic: bool = True
    ) -> jax.Array:
        c, rate = self.config, self.dropout_rate
        for field, known in (("pooling", POOLINGS), ("transform", ("", *HEAD_ACTIVATIONS))):
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"{field}={value!r}: use one of {', '.join(map(repr, known))}")
        x = POOLINGS[self.pooling](x_BTD, batch)
        if self.transform:
            x = transform(self, c, x, c.emb_dim, self.transform, use_norm=self.use_norm)
        x = dropout(x, rate, dropout_key(self, rate, deterministic))
        if self.num_classes:
            x = Dense(c, self.num_classes, self.use_bias, name="out")(x)
        return x.astype(jnp.float32)


def pool_first(x_BTD: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The vectors at example_positions, or each row's first: (B, E, D)."""
    first = jnp.zeros((x_BTD.shape[0], 1), jnp.int32)
    return gather_positions(x_BTD, batch.get("example_positions", first))


def pool_last(x_BTD: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The vectors at example_positions, or at each row's last real token: (B, E, D)."""
    segment_ids, _ = batch_positions(batch)
    place = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    last = jnp.max(jnp.where(segment_ids > 0, place, 0), axis=1, keepdims=True)
    return gather_positions(x_BTD, batch.get("example_positions", last))


def pool_mean(x_BTD: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean over each example's segment, or over all real tokens: (B, E, D), summed in float32."""
    segment_ids = batch_positions(batch)[0][:, :, None]
    if "example_positions" in batch:
        examples = jnp.arange(1, batch["example_positions"].shape[1] + 1)
        of_example_BTE = segment_ids == examples[None, None]
    else:
        of_example_BTE = segment_ids > 0
    share_BTE = of_example_BTE / jnp.maximum(of_example_BTE.sum(axis=1, keepdims=True), 1)
    mean = jnp.einsum("BTE,BTD->BED", share_BTE, x_BTD.astype(jnp.float32))
    return mean.astype(x_BTD.dtype)


def pool_entities(x_BTD: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The vectors at example_entity_positions (B, E, 2), or at each row's first, side by side: (B, E, 2 D)."""
    first = jnp.zeros((x_BTD.shape[0], 1, 2), jnp.int32)
    places = batch.get("example_entity_positions", first)
    flat = gather_positions(x_BTD, places.reshape(len(places), -1))
    return flat.reshape(*places.shape[:2], -1)


POOLINGS = {
    "": lambda x, batch: x,
    "first": pool_first,
    "last": pool_last,
    "mean": pool_mean,
    "entities": pool_entities,
}
HEAD_ACTIVATIONS = {**ACTIVATIONS, "tanh": jnp.tanh}

# name: (config, num_classes=…, …) -> Head, as BERT and ELECTRA have them; other families change fields.
HEADS: dict[str, Callable[..., Head]] = {
    "sequence_classification": functools.partial(Head, pooling="first", transform="tanh"),
    "token_classification": Head,
    "relation_classification": functools.partial(Head, pooling="entities"),
    "question_answering": functools.partial(Head, num_classes=2),
    "replaced_token_detection": functools.partial(Head, num_classes=1, transform="gelu"),
}
