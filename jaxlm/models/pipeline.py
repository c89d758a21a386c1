"""Pipeline parallelism: layers spread over stages, and micro-batches that pass through these (GPipe, arXiv:1811.06965).

Each turn every stage works, each on another micro-batch, then all hand on what they made. M micro-batches take M + S - 1
turns through S stages, so (S - 1) / (M + S - 1) of the work is on nothing:

    turn       0  1  2  3  4        S = 2 stages, M = 4 micro-batches a to d
    stage 0    a  b  c  d  .
    stage 1    .  a  b  c  d

All of it is one program of all devices (GSPMD, arXiv:2105.04663, section 3.3): the stages are an axis of the arrays, `vmap`
runs them, and they are handed on by a roll along that axis. Gradients follow by themselves, turns in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.models.layers import constrain
from jaxlm.spread import mesh_axes, num_devices

PyTree = Any
ROWS = ("batch", "length", "act_embed")  # of x, and of what goes with it

# (parameters of some layers, what differs between them, x, what goes with x, dropout key or None) -> (x, sums of each layer)
Stage = Callable[[PyTree, PyTree, jax.Array, PyTree, jax.Array | None], tuple[jax.Array, PyTree]]


def num_stages() -> int:
    """Over how many stages the mesh in force spreads the layers; 1 without a mesh."""
    return num_devices("layers")


def count_micro_batches(rows: int, asked: int) -> int:
    """Into how many parts a batch is cut: `asked`, or, where that is 0, the most, up to four for each stage, of which each
    still has as many rows for every device of a stage.

    Raises:
      ValueError: if `asked` does not divide the rows.
    """
    if rows % (asked or 1):
        raise ValueError(
            f"pipeline_micro_batches={asked} does not divide the {rows} rows that pass through the stages at a time; set it "
            "to a divisor of them, or to 0"
        )
    stages = num_stages()
    shares = max(rows * stages // num_devices("batch"), 1)  # rows for each device of a stage
    return asked or max(n for n in range(1, 4 * stages + 1) if shares % n == 0)


def run_stages(
    stage: Stage,
    params: PyTree,
    differences: PyTree,
    x_BTD: jax.Array,
    along: PyTree,
    key: jax.Array | None,
    micro_batches: int,
) -> tuple[jax.Array, PyTree]:
    """x after all layers (B, T, D), and the sums of each layer (L, …) over the micro-batches.

    params, differences: of all layers, on axis 0. along: what a stage reads besides x, (B, T) or (B, S, D); zeros are nothing.
    key: of dropout, from which each turn of each stage has its own; None drops nothing. micro_batches: a divisor of B.
    """
    stages, (axis,) = num_stages(), mesh_axes("layers")
    parts = lambda x: x.reshape(stages, x.shape[0] // stages, *x.shape[1:])
    params_S, differences_S = jax.tree.map(parts, (params, differences))
    run = jax.vmap(stage, spmd_axis_name=axis)
    turns = micro_batches + stages - 1
    keys = None if key is None else jax.random.split(key, (turns, stages))

    def turn(held: PyTree, given: PyTree) -> tuple[PyTree, PyTree]:
        (x, along), keys_S = given
        x, along = jax.tree.map(hand_on, held, (x, along))
        x, sums = run(params_S, differences_S, x, along, keys_S)
        return (x, along), (constrain(x[-1], ROWS), sums)

    def hand_on(held_S: jax.Array, given: jax.Array) -> jax.Array:
        first = jnp.arange(stages).reshape(-1, *[1] * given.ndim) == 0
        held_S = jnp.where(first, given[None], jnp.roll(held_S, 1, axis=0))
        return constrain(held_S, ("layers", *ROWS)[: held_S.ndim])

    def cut(x: jax.Array) -> jax.Array:
        # Each part has rows of every device, as in gradient accumulation; then come turns with nothing new.
        x = x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)
        x = constrain(x, (None, *ROWS)[: x.ndim])
        return jnp.concatenate([x, jnp.zeros((stages - 1, *x.shape[1:]), x.dtype)])

    with nn.logical_axis_rules(within_stages(axis)):
        given = jax.tree.map(cut, (x_BTD, along))
        nothing = jax.tree.map(lambda x: jnp.zeros((stages, *x.shape[1:]), x.dtype), given)
        _, (made, sums) = jax.lax.scan(turn, nothing, (given, keys))
        # Of the gradient, too, or each turn of the backward pass would gather that of all turns.
        made = constrain(made, (None, *ROWS))
    x = made[stages - 1 :].swapaxes(0, 1).reshape(x_BTD.shape)
    sums = jax.tree.map(lambda s: s.sum(0).reshape(-1, *s.shape[3:]), sums)
    return constrain(x, ROWS), sums


def within_stages(axis: str) -> list[tuple[str, Any]]:
    """The rules in force, but for the rows of a batch: outside the stages they lie on the stages' devices, too."""

    def without(over: Any) -> Any:
        return tuple(a for a in over if a != axis) if isinstance(over, tuple) else over

    return [
        (name, over if name == "layers" else without(over))
        for name, over in nn.get_logical_axis_rules()
    ]
