"""Optimizers that act per layer, on parameters whose layers are stacked on a leading axis.

Each gives the *direction* of an update, an `optax.GradientTransformation` without a learning rate: the train
step applies `-learning_rate * direction`. What a parameter is (a matrix, a bias, stacked or not) is read from
the names of its logical axes, never from its number of dimensions, to which stacking adds one.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxlm.parallel.mesh import path_names
from jaxlm.training.schedules import (
    SCHEDULES,
    Plateau,
    Schedule,
    make_schedule,
    option_problems,
)

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Plateau",
    "Schedule",
    "clip_scale",
    "ema_update",
    "global_norm",
    "make_optimizer",
    "make_schedule",
    "scale_layers",
]

PyTree = Any
Axes = tuple[str | None, ...]  # the logical axes of one parameter, e.g. ('layers', 'embed', 'mlp')

# --- what a parameter is, by the names of its axes --------------------------------------------------------------------


def is_axes(x: Any) -> bool:
    """Whether a node of a tree is a tuple of logical names, and so a leaf."""
    return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def is_stacked(axes: Axes) -> bool:
    """Whether a parameter's first axis is the layers."""
    return axes[:1] == ("layers",)


def count_stacked(axes: Axes) -> int:
    """Leading axes of which each entry is a parameter of its own: the layers, and in them the experts."""
    return len(list(itertools.takewhile(lambda name: name in ("layers", "expert"), axes)))


def is_decayed(axes: Axes) -> bool:
    """Whether weight decay acts: on matrices and embeddings, which all have an 'embed' axis (adapters: 'rank') and another.

    Biases and norm scales have no 'embed' axis ('norm', 'mlp', 'heads' and 'head_dim' instead).
    """
    is_matrix = len(axes) - count_stacked(axes) > 1
    return is_matrix and ("embed" in axes or "rank" in axes)


def muon_dimensions(axes: Axes) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a hidden layer's matrix are its rows and its columns; None for all other parameters.

    (layers, embed, heads, head_dim) -> 1, (2, 3);  (layers, heads, head_dim, embed) -> (1, 2), 3;
    all remaining axes are batches of matrices.
    """
    if "embed" not in axes or not {"heads", "kv", "mlp"} & set(axes):
        return None
    embed = (axes.index("embed"),)
    inner = tuple(i for i, name in enumerate(axes) if name in ("heads", "kv", "head_dim", "mlp"))
    rows, columns = (embed, inner) if embed < inner else (inner, embed)
    return contrib.MuonDimensionNumbers(rows, columns)


def map_axes(function: Callable, axes: PyTree, *trees: PyTree) -> PyTree:
    """`function(axes, *leaves)` of each parameter; leaves of `trees` may be whole subtrees."""
    return jax.tree.map(function, axes, *trees, is_leaf=is_axes)


# --- per layer --------------------------------------------------------------------------------------------------------


def per_layer(
    transform: optax.GradientTransformation, axes: PyTree
) -> optax.GradientTransformation:
    """`transform` applied to each parameter alone, and to each layer, and each expert in it, of a stacked one.

    For transformations that look at one parameter at a time, such as trust ratios and factored moments.
    The state is the transformation's own, each array of it a tree like the parameters.
    """
    outer = jax.tree.structure(axes, is_leaf=is_axes)

    def each(function, *trees):
        def apply(axes, *leaves):
            each = function
            for _ in range(count_stacked(axes)):
                each = jax.vmap(each)
            return each(*leaves)

        return map_axes(apply, axes, *trees)

    def init(params):
        return _turn_out(outer, each(transform.init, params))

    def update(updates, state, params=None):
        states = _turn_in(outer, state)
        pairs = outer.flatten_up_to(each(transform.update, updates, states, params))
        updates, states = (outer.unflatten(part) for part in zip(*pairs, strict=True))
        return updates, _turn_out(outer, states)

    return optax.GradientTransformation(init, update)


def _turn_out(outer, states: PyTree) -> PyTree:
    """A tree (of structure `outer`) of states -> a state of such trees."""
    return jax.tree.map(lambda *leaves: outer.unflatten(leaves), *outer.flatten_up_to(states))


def _turn_in(outer, state: PyTree) -> PyTree:
    """A state of trees -> a tree of states."""
    is_outer = lambda x: jax.tree.structure(x) == outer
    trees, inner = jax.tree.flatten(state, is_leaf=is_outer)
    leaves = (
        zip(*map(outer.flatten_up_to, trees), strict=True) if trees else [()] * outer.num_leaves
    )
    return outer.unflatten(inner.unflatten(each) for each in leaves)


# --- the optimizers ---------------------------------------------------------------------------------------------------


def _decay(axes: PyTree, weight_decay: float) -> optax.GradientTransformation:
    """Decoupled weight decay (arXiv:1711.05101): adds weight_decay * parameter to the direction."""
    return optax.add_decayed_weights(weight_decay, map_axes(is_decayed, axes))


def _sgd(axes: PyTree, *, momentum: float) -> optax.GradientTransformation:
    return optax.trace(decay=momentum)


def _adamw(axes: PyTree, *, b1: float, b2: float, eps: float, weight_decay: float):
    """arXiv:1711.05101, algorithm 2."""
    return optax.chain(optax.scale_by_adam(b1, b2, eps), _decay(axes, weight_decay))


def _lion(axes: PyTree, *, b1: float, b2: float, weight_decay: float):
    """arXiv:2302.06675, algorithm 2."""
    return optax.chain(optax.scale_by_lion(b1, b2), _decay(axes, weight_decay))


def _lamb(axes: PyTree, *, b1: float, b2: float, eps: float, weight_decay: float):
    """arXiv:1904.00962, algorithm 2: a trust ratio |parameter| / |direction| for each parameter of a layer or expert."""
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        _decay(axes, weight_decay),
        per_layer(optax.scale_by_trust_ratio(), axes),
    )


def _adafactor(axes: PyTree):
    """arXiv:1804.04235, algorithm 4: factored second moments, updates clipped and relative to the parameter's size."""
    one = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return per_layer(one, axes)


def _muon(
    axes: PyTree,
    *,
    momentum: float,
    nesterov: bool,
    ns_steps: int,
    weight_decay: float,
    adam_learning_rate_ratio: float,
    b1: float,
    b2: float,
    eps: float,
):
    """Muon (kellerjordan.github.io/posts/muon) on the matrices of the layers, AdamW on everything else.

    The direction of a matrix is its momentum made orthogonal by `ns_steps` Newton-Schulz steps, times
    sqrt(max(1, columns / rows)). AdamW's learning rate is `adam_learning_rate_ratio` times Muon's.
    """
    dimensions = map_axes(lambda a: muon_dimensions(a) or optax.MaskedNode(), axes)
    labels = map_axes(lambda a: "muon" if muon_dimensions(a) else "adam", axes)
    matrices = optax.chain(
        contrib.scale_by_muon(
            ns_steps=ns_steps,
            beta=momentum,
            eps=eps,
            nesterov=nesterov,
            weight_dimension_numbers=dimensions,
        ),
        _scale_by_shape(dimensions),
    )
    direction = optax.partition(
        {"muon": matrices, "adam": optax.scale_by_adam(b1, b2, eps)}, labels
    )
    ratio = map_axes(lambda a: 1.0 if muon_dimensions(a) else adam_learning_rate_ratio, axes)
    scale = optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, ratio))
    return optax.chain(direction, _decay(axes, weight_decay), scale)


def _scale_by_shape(dimensions: PyTree) -> optax.GradientTransformation:
    """Multiplies each matrix by sqrt(max(1, columns / rows)), so that wide and tall ones move alike."""

    def scale(update, numbers):
        rows, columns = (math.prod(update.shape[i] for i in part) for part in numbers)
        return update * math.sqrt(max(1.0, columns / rows))

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, dimensions))


# The keyword-only arguments of each are the fields that its config group has.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "lamb": _lamb,
    "muon": _muon,
    "sgd": _sgd,
}


def make_optimizer(name: str, *, axes: PyTree, **hyper: Any) -> optax.GradientTransformation:
    """The direction of the update by the optimizer `name`; the caller multiplies it by -learning_rate.

    Stacked and unstacked parameters get equal updates. Weight decay acts on matrices and embeddings only.

    Args:
      name: a key of OPTIMIZERS.
      axes: for each parameter the tuple of its logical axes' names; 'layers' first means stacked layers.
      **hyper: exactly the hyperparameters that the optimizer takes, e.g. b1, b2, eps, weight_decay.

    Raises:
      ValueError: listing missing and unknown hyperparameters, or the known optimizers.
    """
    problems = option_problems("optimizer", name, OPTIMIZERS, hyper)
    if problems:
        raise ValueError(f"optimizer {name!r}:\n" + "\n".join(f"  - {p}" for p in problems))
    return OPTIMIZERS[name](axes, **hyper)


# --- layers that learn slower, or not at all --------------------------------------------------------------------------


def scale_layers(
    transform: optax.GradientTransformation,
    axes: PyTree,
    *,
    num_layers: int,
    layer_decay: float = 1.0,
    frozen_layers: int = 0,
) -> optax.GradientTransformation:
    """`transform`, whose updates are scaled by depth: as if each layer had a learning rate of its own.

    Layer l of L (from 0) has layer_decay^(L - l) of it, the embeddings layer_decay^(L + 1), and all that stands on the
    layers (final norm, heads) the whole of it (arXiv:2106.08254; before it arXiv:2003.10555, appendix B). With
    frozen_layers the embeddings and so many of the lowest layers have none, and stay what they are bit by bit; their
    gradients still count in the global norm.
    Weight decay is part of an update and is scaled with it. Without both options it is `transform` itself.

        embed  layers 0 1 2  head        decay 0.5, L = 3:  1/16  1/8 1/4 1/2  1        frozen_layers 1:  0  0 1 1  1

    Args:
      axes: of the parameters that `transform` is given. 'embed/…' are the embeddings, 'layers/…' is stacked, or
        'layers/<l>/…' if it is not.
      layer_decay: over 0, at most 1.

    Raises:
      ValueError: if an option is out of its range, and in `init` if the layers share their parameters.
    """
    problems = []
    if not 0 < layer_decay <= 1:
        problems.append(f"layer_decay={layer_decay}: must be over 0 and at most 1 (no decay)")
    if not 0 <= frozen_layers <= num_layers:
        problems.append(f"frozen_layers={frozen_layers}: 0 (none) to num_layers={num_layers}")
    if problems:
        raise ValueError("the layers' learning rates:\n" + "\n".join(f"  - {p}" for p in problems))
    if layer_decay == 1 and frozen_layers == 0:
        return transform
    # 0 the embeddings, then the layers, then what stands on them
    depths = np.arange(num_layers + 2)
    factors = layer_decay ** (num_layers + 1.0 - depths)
    factors[: frozen_layers + 1 if frozen_layers else 0] = 0.0
    factor_of = jax.tree_util.tree_map_with_path(
        lambda path, a: factors[_depth(path_names(path), a, num_layers)], axes, is_leaf=is_axes
    )

    def init(params):
        _refuse_shared_layers(axes, params, num_layers)
        return transform.init(params)

    def update(updates, state, params=None):
        updates, state = transform.update(updates, state, params)
        return jax.tree.map(_scale_first_axis, updates, factor_of), state

    return optax.GradientTransformation(init, update)


def _depth(names: tuple[str, ...], axes: Axes, num_layers: int) -> int | slice:
    """Of a parameter; all depths of the layers for a stacked one."""
    if is_stacked(axes):
        return slice(1, num_layers + 1)
    if names[0] == "layers":
        return 1 + int(names[1])
    return 0 if names[0] == "embed" else num_layers + 1


def _scale_first_axis(update: jax.Array, factor: Any) -> jax.Array:
    """update * factor, where factor is one number, or one for each layer; where it is 0 also NaN and -0 become 0."""
    factor = np.asarray(factor, update.dtype)
    factor = factor.reshape(*factor.shape, *(1,) * (update.ndim - factor.ndim))
    return jnp.where(factor > 0, update * factor, jnp.zeros_like(update))


def _refuse_shared_layers(axes: PyTree, params: PyTree, num_layers: int) -> None:
    sizes = map_axes(lambda a, p: p.shape[0] if is_stacked(a) else num_layers, axes, params)
    if found := set(jax.tree.leaves(sizes)) - {num_layers}:
        raise ValueError(
            f"found a stack of {min(found)} where {num_layers} layers are expected: they share their parameters, so no "
            "layer can learn slower than another; set layer_decay=1.0 and frozen_layers=0"
        )


# --- around the optimizer ---------------------------------------------------------------------------------------------


def global_norm(tree: PyTree) -> jax.Array:
    """The norm of all arrays together, a float32 scalar: optax's sums in the arrays' own dtype."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def clip_scale(norm: jax.Array, max_norm: float) -> jax.Array:
    """What gradients of the global norm `norm`, a scalar, are multiplied by, so that it is at most `max_norm`; 0 = no clipping.

    Source: arXiv:1211.5063, algorithm 1.
    """
    return jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30)) if max_norm else jnp.float32(1)


def ema_update(
    ema: PyTree, params: PyTree, decay: float, step: jax.typing.ArrayLike, *, warmup: bool = True
) -> PyTree:
    """The moving average decay * ema + (1 - decay) * params, computed in float32, after step `step` (from 0).

    With `warmup` the decay is at most (1 + step) / (10 + step), so that the random parameters of the start are
    soon forgotten however long the average is.
    """
    step = jnp.asarray(step, jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else jnp.float32(decay)

    def average(old, new):
        old_32, new_32 = old.astype(jnp.float32), new.astype(jnp.float32)
        return (old_32 + (1 - decay) * (new_32 - old_32)).astype(old.dtype)

    return jax.tree.map(average, ema, params)
