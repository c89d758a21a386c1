"""State that waits in the host's memory between steps, pinned so that the device reads and writes it directly.

The device is free of it (8 bytes a parameter for Adam) during the forward and backward pass; for the update all of it comes
over at once, beside the new one, and goes back. So it helps where activations are what does not fit, and makes the peak
larger where the state itself is: share that by mesh.fsdp. A plan of the step says which of the two it is.
"""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any

HOST = "pinned_host"


def on_host(shardings: PyTree) -> PyTree:
    """The same shardings in the memory of the devices' hosts.

    Raises:
      ValueError: if the devices cannot reach it.
    """
    for sharding in jax.tree.leaves(shardings)[:1]:
        device = sharding.mesh.devices.flat[0]
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise ValueError(
                f"offload_optimizer=True: {device.device_kind} devices have no memory {HOST!r}, only {kinds}; "
                "set it to False, or share the state by mesh.fsdp"
            )
    return jax.tree.map(lambda s: NamedSharding(s.mesh, s.spec, memory_kind=HOST), shardings)


def on_device(shardings: PyTree) -> PyTree:
    """The same shardings in the devices' own memory."""
    return jax.tree.map(lambda s: NamedSharding(s.mesh, s.spec), shardings)


def start_copy(tree: PyTree) -> PyTree:
    """A copy of arrays in the memory of the devices' hosts, of which the copying is only begun: a program to which the arrays
    are donated waits for it. All processes must call.

    Of what several devices hold each copies a part, so that every byte is copied, and kept, once.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts = {i: _in_parts(x.sharding, x.shape) for i, x in enumerate(leaves) if _repeats(x)}
    if parts:
        split = jax.jit(_same, out_shardings=list(parts.values()))
        for i, x in zip(parts, split([leaves[i] for i in parts]), strict=True):
            leaves[i] = x
    hosts = [x.sharding.with_memory_kind(HOST) for x in leaves]
    return structure.unflatten(jax.device_put(leaves, hosts, may_alias=False))


def _same(tree: PyTree) -> PyTree:
    return tree


def _repeats(x: jax.Array) -> bool:
    """Whether several devices hold the same part of it, in their own memory."""
    sharding = x.sharding
    named = isinstance(sharding, NamedSharding) and sharding.memory_kind != HOST
    return named and sharding.num_devices * math.prod(sharding.shard_shape(x.shape)) > x.size


def _in_parts(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """By those axes of the mesh, too, over which an array of this shape was repeated, as far as they divide it."""
    sizes = sharding.mesh.shape
    dims = [(dim,) if isinstance(dim, str) else tuple(dim or ()) for dim in sharding.spec]
    dims += [()] * (len(shape) - len(dims))
    used = [axis for dim in dims for axis in dim]
    for axis in (axis for axis in sizes if axis not in used):
        for i, dim in enumerate(dims):
            if shape[i] % math.prod(sizes[name] for name in (*dim, axis)) == 0:
                dims[i] = (*dim, axis)
                break
    return NamedSharding(sharding.mesh, PartitionSpec(*(dim or None for dim in dims)))
