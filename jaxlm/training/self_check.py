"""A step that is computed twice must give the same bits: XLA's programs are deterministic, so anything else is the machine.

state ──copy──▶ step ──▶ state', metrics
  └───────────▶ step ──▶ state', metrics      equal bit by bit, on each device
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.exits import Corrupted
from jaxlm.parallel import processes
from jaxlm.parallel.mesh import path_names
from jaxlm.training.state import TrainState

PyTree = Any


class SelfCheck:
    """`train_step`, of which every so many steps one is computed twice; in these the device holds a second state.

    train_step: jitted (state, batch) -> (state, metrics); the state is donated. The same compiled program runs both times.
    every: a step is checked if its number, from 1, is a multiple.
    step: how many steps are finished.
    spend: gives a context to which the time of the second computation is charged.
    """

    def __init__(
        self,
        train_step: Callable,
        every: int,
        step: int,
        spend: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.train_step, self.every, self.step, self.spend = train_step, every, step, spend

    def __call__(self, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Any]:
        """Raises Corrupted, naming arrays and devices, if the two differ."""
        self.step += 1
        if self.step % self.every:
            return self.train_step(state, batch)
        with self.spend("self_check"):
            first = jax.block_until_ready(self.train_step(copy(state), batch))
        second = self.train_step(state, batch)
        with self.spend("self_check"):
            problems = _problems(first, second)
        if problems:
            raise Corrupted(
                f"step {self.step} was computed twice from the same state and batch, and gave two results:\n"
                + "\n".join(problems)
                + f"\nThis machine computes wrong numbers, maybe since step {max(self.step - self.every, 0)}, after which no "
                "step was checked: go on from a checkpoint before that on other devices."
            )
        return second


def copy(tree: PyTree) -> PyTree:
    """The same arrays in memory of their own, where they lie."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(_copying(tuple(x.sharding for x in leaves))(leaves))


def differences(one: PyTree, other: PyTree) -> dict[str, list[jax.Device]]:
    """Path -> the devices that hold different bits of that array in two trees of the same shardings; equal ones are left out.

    NaN equals NaN of the same bits. All processes must call.
    """
    paths = ["/".join(path_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
    ones, others = jax.tree.leaves(one), jax.tree.leaves(other)
    shardings = tuple(x.sharding for x in ones)
    differ = processes.fetch(_comparing(shardings)(ones, others))
    devices = shardings[0].mesh.devices
    found = {path: devices[differ[..., number]] for number, path in enumerate(paths)}
    return {path: list(where) for path, where in found.items() if len(where)}


@functools.cache
def _copying(shardings: tuple[NamedSharding, ...]) -> Callable:
    copy = lambda arrays: [jnp.copy(x) for x in arrays]
    return jax.jit(copy, out_shardings=list(shardings))


@functools.cache
def _comparing(shardings: tuple[NamedSharding, ...]) -> Callable:
    """A jitted function: two lists of arrays -> bool (devices of the mesh …, arrays), where a device's shards differ."""
    mesh, specs = shardings[0].mesh, [s.spec for s in shardings]

    def compare(ones: list[jax.Array], others: list[jax.Array]) -> jax.Array:
        differ = [(_bits(x) != _bits(y)).any() for x, y in zip(ones, others, strict=True)]
        return jnp.stack(differ).reshape([1] * mesh.devices.ndim + [len(differ)])

    on_shards = jax.shard_map(
        compare,
        mesh=mesh,
        in_specs=(specs, specs),
        out_specs=PartitionSpec(*mesh.axis_names),
        check_vma=False,
    )
    # State may wait in the host's memory: it comes over for this alone.
    here = [NamedSharding(mesh, spec) for spec in specs]
    return jax.jit(lambda x, y: on_shards(jax.device_put(x, here), jax.device_put(y, here)))


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x
    return jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))


def _problems(first: tuple[TrainState, Any], second: tuple[TrainState, Any]) -> list[str]:
    """A line for each array of the state and each metric of which two results of a step differ."""
    (state, metrics), (other_state, other_metrics) = first, second
    lines = [
        f"  {path}, on {', '.join(map(str, devices))}"
        for path, devices in differences(state, other_state).items()
    ]
    said, again = jax.device_get((metrics, other_metrics))
    return lines + [
        f"  metric {name}: {said[name]} and {again[name]}"
        for name in said
        if not _equal_bits(said[name], again[name])
    ]


def _equal_bits(one: Any, other: Any) -> bool:
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(one, other, strict=True)
    )
