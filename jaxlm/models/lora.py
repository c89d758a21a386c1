"""Low-rank adapters of projections, and their way back into the matrices (LoRA, arXiv:2106.09685, section 4.1).

    y = x W + alpha / rank (x A) B        W (in..., out...)   A (in..., R)   B (R, out...)

B begins as zeros, so a new adapter changes nothing. Beside the matrix `query` lie `query_lora_a` and `query_lora_b`, and
like every parameter of a layer they are stacked over the layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.models.config import TransformerConfig
from jaxlm.models.layers import Axes, make_param, project

PyTree = Any
A, B = "_lora_a", "_lora_b"


def is_adapter(path: str) -> bool:
    """Whether the parameter of this path ('layers/mlp/up_lora_a') is part of an adapter."""
    return path.endswith((A, B))


def scale(config: TransformerConfig) -> float:
    """What x A B is multiplied by."""
    return config.lora_alpha / config.lora_rank


def adapt(
    module: nn.Module,
    config: TransformerConfig,
    name: str,
    x: jax.Array,
    y: jax.Array,
    shape: tuple[int, ...],
    axes: Axes,
    num_in: int = 1,
) -> jax.Array:
    """y = x W (..., out axes) plus the adapter of the projection `name`, if the config gives it one.

    shape, axes: of W, whose first `num_in` axes are contracted with the last of x.
    """
    c = config
    if not c.lora_rank or name not in c.lora_targets:
        return y
    normal = nn.initializers.normal(1 / math.sqrt(math.prod(shape[:num_in])))
    a_shape, b_shape = (*shape[:num_in], c.lora_rank), (c.lora_rank, *shape[num_in:])
    a_axes, b_axes = (*axes[:num_in], "rank"), ("rank", *axes[num_in:])
    a = make_param(module, name + A, normal, a_shape, a_axes, c.param_dtype)
    b = make_param(module, name + B, nn.initializers.zeros, b_shape, b_axes, c.param_dtype)
    low = project(x, a.astype(c.dtype), num_in, merge_rows=c.merge_rows)
    low = low * jnp.asarray(scale(c), c.dtype)
    return y + project(low, b.astype(c.dtype), merge_rows=c.merge_rows)


def without_adapters(config: TransformerConfig) -> TransformerConfig:
    """The config of the model whose parameters `merge` gives."""
    fields = ("lora_rank", "lora_alpha", "lora_targets")
    return dataclasses.replace(config, **{f: getattr(TransformerConfig, f) for f in fields})


def merge(params: PyTree, config: TransformerConfig) -> PyTree:
    """The parameters of the same model without adapters, for `without_adapters(config)`.

    params: nested dicts, whole (not what `partition.split` leaves). Sums are float32, results in the matrices' dtype.
    """
    flat = flatten_dict(params, sep="/")
    merged = {path: x for path, x in flat.items() if not is_adapter(path)}
    for path, kernel in merged.items():
        if path + A in flat:
            layers = jax.vmap(merge_kernel, (0, 0, 0, None))
            merged[path] = layers(kernel, flat[path + A], flat[path + B], scale(config))
    return unflatten_dict(merged, sep="/")


def merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + scale A B of one layer: (in..., out...), (in..., R), (R, out...)."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
