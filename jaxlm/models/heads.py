"""What stands on top of an encoder: the masked-token transform, the pooler and the pair classifier."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.models.config import TransformerConfig
from jaxlm.models.layers import ACTIVATIONS, add_bias, make_param, project
from jaxlm.models.transformer import make_norm


def gather_positions(x_BTD: jax.Array, positions_BM: jax.Array) -> jax.Array:
    """x at the given positions of each row: (B, M, D)."""
    return jnp.take_along_axis(x_BTD, positions_BM[:, :, None], axis=1)


class Dense(nn.Module):
    """x @ kernel + bias: (B, M, D) to (B, M, size)."""

    config: TransformerConfig
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        init, zeros = nn.initializers.normal(c.init_std), nn.initializers.zeros
        shape = (x.shape[-1], self.size)
        kernel = make_param(self, "kernel", init, shape, ("embed", None), c.param_dtype)
        bias = make_param(self, "bias", zeros, shape[1:], ("norm",), c.param_dtype)
        y = project(x, kernel.astype(c.dtype))
        return add_bias(y, bias)


class MLMHead(nn.Module):
    """norm(activation(x W + b)) and the output bias (V,), as in BERT (arXiv:1810.04805, reference code)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BMD: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        init, zeros = nn.initializers.normal(c.init_std), nn.initializers.zeros
        shape = (c.emb_dim, c.emb_dim)
        dense = make_param(self, "dense", init, shape, ("embed", None), c.param_dtype)
        bias = make_param(self, "bias", zeros, shape[1:], ("norm",), c.param_dtype)
        vocab_bias = make_param(
            self, "vocab_bias", zeros, (c.vocab_size,), ("vocab",), c.param_dtype
        )
        x = project(x_BMD, dense.astype(c.dtype))
        x = ACTIVATIONS[c.activation](add_bias(x, bias))
        return make_norm(c, "norm")(x), vocab_bias
