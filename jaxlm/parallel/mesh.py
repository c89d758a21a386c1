"""The device mesh, the rule table, and the shardings that follow from them.

A model names its axes (`embed`, `heads`, `batch`, …) and never devices. `RULES` is the one place where a
name becomes a mesh axis; everything here is derived from it, so that a change of parallelism is a change
of mesh shape and nothing else.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any

MESH_AXES = ("data", "fsdp", "tensor")

# Order decides: a mesh axis goes to the first name that asks for it, so `batch` comes before `embed`
# (the other way round, a batch sharded over fsdp is silently replicated).
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    # parameters
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv", "tensor"),
    ("vocab", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("norm", None),
    ("pos", None),
    ("rank", None),
    # activations
    ("length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """A mesh of the axes `data`, `fsdp`, `tensor` over `devices` (default: all). One axis may be -1: the rest.

    Raises:
      ValueError: if the product of the sizes is not the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices).ravel()
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    free = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and known > 0 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if len(free) > 1 or int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(
            f"a mesh of {sizes} does not cover {len(devices)} devices: the sizes must multiply to "
            f"{len(devices)}; at most one may be -1 (= whatever is left)"
        )
    shape = tuple(sizes.values())
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; every other axis of a batch array is whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def logical_axes(boxed: PyTree) -> PyTree:
    """The tuple of axis names of each parameter, from the boxed tree that `model.init` makes."""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def param_shardings(mesh: Mesh, boxed: PyTree) -> PyTree:
    """A `NamedSharding` for each parameter of the boxed (abstract) tree.

    Raises:
      ValueError: naming every parameter axis that its mesh axes do not divide.
    """
    rules = dict(RULES)
    shapes = nn.meta.unbox(boxed)
    problems = []

    def shard(path, shape, names):
        axes = tuple(rules[name] if name else None for name in names)
        for size, name, axis in zip(shape.shape, names, axes, strict=True):
            ways = axis_size(mesh, axis)
            if size % ways:
                problems.append(
                    f"  {jax.tree_util.keystr(path)}: axis {name!r} has {size} entries, not divisible by the "
                    f"{ways} devices of mesh axis {axis!r}"
                )
        return NamedSharding(mesh, PartitionSpec(*axes))

    names = logical_axes(boxed)
    shardings = jax.tree_util.tree_map_with_path(shard, shapes, names)
    if problems:
        raise ValueError(
            "the mesh does not fit the model; change the mesh or the sizes:\n" + "\n".join(problems)
        )
    return shardings


def axis_size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    """The number of devices along one mesh axis, or along the product of several."""
    if axis is None:
        return 1
    names = (axis,) if isinstance(axis, str) else axis
    return int(np.prod([mesh.shape[name] for name in names]))


def mirror_shardings(mesh: Mesh, tree: PyTree, params: PyTree, shardings: PyTree) -> PyTree:
    """Shardings of an optimizer state: a leaf that mirrors a parameter is sharded as the parameter.

    Mirrors are found by (path suffix, shape), because optimizers nest copies of the parameter tree in
    containers of their own; all other leaves (counts, scales, factored statistics) are replicated.
    """
    by_path = {
        path_names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def find(path, leaf):
        names = path_names(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, tree)


def path_names(path) -> tuple[str, ...]:
    """A key path as plain names, whatever containers (dict, tuple, dataclass) it leads through."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The global row numbers, ascending, that this process's devices hold of a batch of `batch_size` rows.

    Raises:
      ValueError: if `batch_size` is not divisible by the devices of the batch axes.
    """
    ways = axis_size(mesh, ("data", "fsdp"))
    if batch_size % ways:
        lower, upper = batch_size // ways * ways, (batch_size // ways + 1) * ways
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {ways} devices of mesh axes data x fsdp: "
            f"take {lower or upper} or {upper}"
        )
    spans = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows: set[int] = set()
    for (span,) in spans:
        rows.update(range(*span.indices(batch_size)))
    return np.array(sorted(rows))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """This process's rows as global arrays of `batch_size` rows, sharded over the batch axes."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {
        key: jax.make_array_from_process_local_data(sharding, value, (batch_size, *value.shape[1:]))
        for key, value in batch.items()
    }
