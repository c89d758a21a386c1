"""Checksums of arrays where they lie: one number for an array, whatever mesh, host or file holds it.

Of each element, its bits and its row-major index in the whole array go through two integer mixers, and what each gives is
summed modulo 2**32:

    array  [[a b]     index  0 1     sum of  mix(bits(a), 0)  mix(bits(b), 1)
            [c d]]           2 3             mix(bits(c), 2)  mix(bits(d), 3)
             └── device 1: its part of the sum, with the indices that its shard has in the whole

A sum has no order, so devices sum their own shards and no array is gathered. At a given index a mixer is a bijection of the
bits: a change of one element always changes both sums, and any other change goes unseen with probability 2**-64. Indices
are taken modulo 2**32: elements that far apart could be exchanged.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlm import mixing
from jaxlm.exits import Corrupted
from jaxlm.parallel.mesh import path_names

PyTree = Any
# (multiplier of the index, what mixes it with the bits)
MIXERS = ((0x9E3779B1, mixing.MURMUR3), (0x85EBCA77, mixing.LOWBIAS32))
WORDS = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
}  # bytes of an element -> what its bits are read as
CHUNK = 1 << 16  # elements that numpy mixes at once: they stay in the cache


def checksums(tree: PyTree) -> dict[str, str]:
    """Path -> 16 hexadecimal digits of every array, computed on its devices; all processes must call.

    tree: arrays of a NamedSharding, of one device, or of numpy.

    Raises:
      Corrupted: naming arrays and devices, if devices that hold the same part of an array hold different bits.
      TypeError: for elements of more than 4 bytes, and for other shardings.
    """
    return start_checksums(tree)()


def start_checksums(tree: PyTree) -> Callable[[], dict[str, str]]:
    """`checksums`, of which the devices' work is only begun: what it returns waits for it, in any thread, and is the rest.

    The arrays may be donated afterwards.
    """
    leaves = {"/".join(path_names(p)): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    on_host = {path: checksum(x) for path, x in leaves.items() if not isinstance(x, jax.Array)}
    meshes: dict[Mesh, dict[str, NamedSharding]] = {}
    for path in sorted(leaves.keys() - on_host):
        sharding = _named(leaves[path])
        meshes.setdefault(sharding.mesh, {})[path] = sharding
    begun = []
    for mesh, shardings in meshes.items():
        by_device = _summing(mesh, tuple(shardings.values()))
        begun.append((shardings, by_device([leaves[path] for path in shardings])))

    def finish() -> dict[str, str]:
        found = on_host | _join_all(begun)
        return {path: found[path] for path in leaves}

    return finish


def _join_all(begun: Sequence[tuple[Mapping[str, NamedSharding], jax.Array]]) -> dict[str, str]:
    """Path -> digits, of (path -> sharding, rows of `_summing`) for each mesh."""
    found, problems = {}, []
    for shardings, rows in begun:
        for (path, sharding), row in zip(
            shardings.items(), np.moveaxis(jax.device_get(rows), -2, 0), strict=True
        ):
            sums, differing = _join(row, sharding)
            found[path] = _digits(sums)
            problems += [f"  {path}: {line}" for line in differing]
    if problems:
        raise Corrupted(
            "copies of one array differ between devices, so one of these devices computes or keeps wrong numbers:\n"
            + "\n".join(problems)
            + "\nGo on from the newest checkpoint without them."
        )
    return found


def checksum(array: Any) -> str:
    """The same of an array in the memory of this host, by numpy alone."""
    array = np.asarray(array)
    flat = np.ascontiguousarray(array).reshape(-1).view(_word(array.dtype))
    sums = np.zeros(len(MIXERS), np.uint32)
    from_zero = np.arange(CHUNK, dtype=np.uint32)
    for start in range(0, flat.size, CHUNK):
        bits = flat[start : start + CHUNK].astype(np.uint32)
        index = from_zero[: bits.size] + np.uint32(start % 2**32)
        sums += np.array([mixed.sum(dtype=np.uint32) for mixed in mix(bits, index)])
    return _digits(sums)


def mix(bits: Any, index: Any) -> list[Any]:
    """Both mixers of uint32 arrays, of numpy or of jax."""
    mixed = []
    for factor, mixer in MIXERS:
        x = index * np.uint32(factor)
        x ^= bits
        mixed.append(mixing.mix(x, mixer))
    return mixed


def _word(dtype: np.dtype) -> Any:
    if dtype.itemsize not in WORDS:
        raise TypeError(f"found an array of {dtype}: expected elements of 1, 2 or 4 bytes")
    return WORDS[dtype.itemsize]


def _digits(sums: Sequence[int] | np.ndarray) -> str:
    return "".join(f"{int(x) % 2**32:08x}" for x in sums)


def _named(x: jax.Array) -> NamedSharding:
    if isinstance(x.sharding, NamedSharding):
        return x.sharding
    if isinstance(x.sharding, SingleDeviceSharding):
        return NamedSharding(Mesh(list(x.devices()), ("device",)), PartitionSpec())
    raise TypeError(f"found an array of {x.sharding}: expected a NamedSharding, or one device")


@functools.cache
def _summing(mesh: Mesh, shardings: tuple[NamedSharding, ...]) -> Any:
    """A jitted function: arrays -> (devices of the mesh …, array, mixer) uint32, the sums of each device's shards, on all
    devices, so that nothing is left to exchange."""

    def sums(shards: list[jax.Array]) -> jax.Array:
        rows = jnp.stack([_sum_shard(x, s) for x, s in zip(shards, shardings, strict=True)])
        return jax.lax.all_gather(rows, mesh.axis_names).reshape(*mesh.devices.shape, *rows.shape)

    on_devices = [NamedSharding(mesh, s.spec) for s in shardings]
    sums = jax.shard_map(
        sums,
        mesh=mesh,
        in_specs=([s.spec for s in shardings],),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    # State may wait in the host's memory: it comes over for this alone.
    return jax.jit(lambda arrays: sums(jax.device_put(arrays, on_devices)))


def _sum_shard(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Both sums over the elements of one device's shard."""
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis, names in reversed(list(enumerate(_axes(sharding, x.ndim)))):
        shards = math.prod(sharding.mesh.shape[name] for name in names)
        first = jax.lax.axis_index(names) * x.shape[axis] if names else 0
        own = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.uint32(first)
        index += own * np.uint32(stride % 2**32)
        stride *= x.shape[axis] * shards
    word = _word(x.dtype)
    bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, word)
    mixed = mix(bits.astype(jnp.uint32), index)
    zeros = [np.uint32(0)] * len(mixed)
    # One reduction of both: XLA:CPU gives 12 GB/s, and 0.7 for two.
    add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
    return jnp.stack(jax.lax.reduce(mixed, zeros, add, range(x.ndim)))


def _axes(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes that share each axis of an array; () where none does."""
    entries = [*sharding.spec, *[None] * ndim][:ndim]
    return [x if isinstance(x, tuple) else (x,) if x else () for x in entries]


def _join(row: np.ndarray, sharding: NamedSharding) -> tuple[np.ndarray, list[str]]:
    """(sums over the whole array, a line for each shard of which devices hold different copies).

    row: (devices of the mesh …, mixer).
    """
    sizes = sharding.mesh.shape
    used = {name for names in _axes(sharding, len(sharding.spec)) for name in names}
    axes = sorted(range(len(sizes)), key=lambda axis: list(sizes)[axis] not in used)
    num_shards = math.prod(sizes[name] for name in used)
    copies = row.transpose(*axes, row.ndim - 1).reshape(num_shards, -1, len(MIXERS))
    devices = sharding.mesh.devices.transpose(axes).reshape(num_shards, -1)
    lines = [
        ", ".join(f"{d} has {_digits(x)}" for d, x in zip(devices[i], copies[i], strict=True))
        for i in np.flatnonzero((copies != copies[:, :1]).any((1, 2)))
    ]
    return copies[:, 0].sum(0, dtype=np.uint64), lines
