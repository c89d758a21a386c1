"""The device mesh, the rule table, and the shardings that follow from them.

A model names its axes (`embed`, `heads`, `batch`, …) and never devices. `RULES` is the one place where a
name becomes a mesh axis; everything here is derived from it, so that a change of parallelism is a change
of mesh shape and nothing else.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any

# Outermost first: what talks most (tensor) is spread over neighbours, what talks least (data) over slices.
MESH_AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")

# Order decides: a mesh axis goes to the first name that asks for it, so `batch` comes before `embed`
# (the other way round, a batch sharded over fsdp is silently replicated).
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp", "expert", "stage")),
    # rows, while devices of `fsdp` share the width of the table that they are looked up in, and when each has its own again
    ("table_rows", "data"),
    ("found_rows", ("data", "fsdp")),
    ("length", "context"),
    ("kv_length", None),  # attention gathers keys and values over context
    # parameters
    ("expert", "expert"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv", "tensor"),
    ("vocab", "tensor"),
    ("head_dim", None),
    ("layers", "stage"),
    ("norm", None),
    ("pos", None),
    ("rank", None),
    # activations
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    ("act_expert", "expert"),
    ("act_group", ("data", "fsdp", "stage")),  # rows, where experts are spread instead of them
)

# Arrays of a batch that have an entry for each token of a row. Where predictions are gathered, labels and weights
# have one for each slot instead.
TOKEN_KEYS = frozenset({"tokens", "segment_ids", "positions", "token_types", "labels", "weights"})
TOKEN_KEYS |= {"is_prefix", "encoder_tokens", "encoder_segment_ids", "encoder_positions", "order"}
SLOT_KEYS = frozenset({"labels", "weights"})


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    stage: int = 1,
    *,
    devices=None,
) -> Mesh:
    """A mesh of these sizes over `devices` (default: all). One axis may be -1: whatever is left.

    Where TPUs are of several slices, `data` is split over them first, or `stage`, if `data` cannot be, so that only it uses
    the network between them.

    Raises:
      ValueError: if the product of the sizes is not the number of devices, or neither `data` nor `stage` a multiple of the slices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices).ravel()
    sizes = dict(zip(MESH_AXES, (data, stage, fsdp, expert, context, tensor), strict=True))
    free = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and known > 0 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if len(free) > 1 or known < 1 or int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(
            f"a mesh of {sizes} does not cover {len(devices)} devices ({devices[0].platform}): the sizes must multiply to "
            f"{len(devices)}; set --config.mesh.AXIS; one of them may be -1 (= whatever is left)"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return Mesh(lay_out(devices, sizes), MESH_AXES, axis_types=auto)


def lay_out(devices: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """The devices (n,) as an array of these sizes: neighbours on the chips' own network next to each other.

    GPUs keep their order, which is by host: there an axis may span hosts, and the outer ones do first.
    """
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        return devices.reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    over_slices = "stage" if sizes["data"] % slices and sizes["stage"] % slices == 0 else "data"
    if sizes[over_slices] % slices:
        inner = len(devices) // slices
        raise ValueError(
            f"mesh axis data={sizes['data']} is not divisible by the {slices} slices of these {len(devices)} devices, and "
            f"the network between slices is too slow for other axes than it and stage: set data to a multiple of {slices}, and the "
            f"others so that they multiply to {inner} or a divisor of it"
        )
    dcn = tuple(slices if name == over_slices else 1 for name in sizes)
    inner = tuple(size // outer for size, outer in zip(shape, dcn, strict=True))
    if slices == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(inner, dcn, devices, allow_split_physical_axes=True)


RULE = dict(RULES)


def spec(*names: str | None) -> PartitionSpec:
    """What the rule table makes of logical names."""
    return nn.logical_to_mesh_axes(names, RULES)


def batch_shardings(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """How the arrays of a batch lie on the devices, by their names: rows over `batch`, tokens over `length`.

    What has no entry for each token (masked_positions, example_*, and labels of gathered predictions) is whole beyond
    its rows.
    """
    tokens = TOKEN_KEYS - SLOT_KEYS if "masked_positions" in batch else TOKEN_KEYS
    of_rows, of_tokens = (
        NamedSharding(mesh, spec(*names)) for names in (("batch",), ("batch", "length"))
    )
    return {key: of_tokens if key in tokens else of_rows for key in batch}


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def logical_axes(boxed: PyTree) -> PyTree:
    """The tuple of axis names of each parameter, from the boxed tree that `model.init` makes."""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def param_shardings(mesh: Mesh, boxed: PyTree) -> PyTree:
    """A `NamedSharding` for each parameter of the boxed (abstract) tree.

    Raises:
      ValueError: naming every parameter axis that its mesh axes do not divide, with the nearest sizes that would fit.
    """
    shapes, names = nn.meta.unbox(boxed), logical_axes(boxed)
    owners: dict[tuple[str, int], list[str]] = {}

    def shard(path, shape, axes):
        for size, axis in zip(shape.shape, axes, strict=True):
            if axis:
                owners.setdefault((axis, size), []).append("/".join(path_names(path)))
        return NamedSharding(mesh, PartitionSpec(*(RULE[axis] if axis else None for axis in axes)))

    shardings = jax.tree_util.tree_map_with_path(shard, shapes, names)
    sizes = [
        (f"axis {axis!r} of {paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)}", axis, n)
        for (axis, n), paths in owners.items()
    ]
    if problems := misfits(mesh, sizes):
        raise ValueError(
            "the mesh does not fit the model:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return shardings


def misfits(mesh: Mesh, sizes: Iterable[tuple[str, str, int]]) -> list[str]:
    """A line for each size that its mesh axes do not divide, with the nearest sizes, and meshes, that would fit.

    sizes: (what to call it, its logical axis, its size) of each.
    """
    lines = []
    for label, name, size in sizes:
        axes, ways = RULE[name], axis_size(mesh, RULE[name])
        if size % ways == 0:
            continue
        spread = [axes] if isinstance(axes, str) else [a for a in axes if mesh.shape.get(a, 1) > 1]
        over = " x ".join(spread)
        lower, upper = size // ways * ways, (size // ways + 1) * ways
        fits = f"{lower} or {upper}" if lower else f"{upper}"
        if name == "vocab":  # which cannot be smaller than the tokenizer's
            fits = f"{upper} (rows that no token has are padding)"
        shares = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0 and size % n == 0]
        nearest = [max(n for n in shares if n < ways), *[n for n in shares if n > ways][:1]]
        lines.append(
            f"{label} is {size}, not divisible by the {ways} devices of mesh axis {over}: make it {fits}, or set "
            f"{over} to {' or '.join(map(str, nearest))}"
        )
    return lines


def axis_size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    """The number of devices along one mesh axis, or along the product of several; an axis that the mesh lacks has one."""
    if axis is None:
        return 1
    names = (axis,) if isinstance(axis, str) else axis
    return int(np.prod([mesh.shape.get(name, 1) for name in names]))


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


def batch_devices(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return axis_size(mesh, RULE["batch"])


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The global row numbers, int (rows,) ascending, of which this process's devices hold all or, with `context`, a part.

    Raises:
      ValueError: if `batch_size` is not divisible by the devices of the batch axes.
    """
    if problems := misfits(mesh, [("batch_size", "batch", batch_size)]):
        raise ValueError(problems[0])
    spans = NamedSharding(mesh, spec("batch")).addressable_devices_indices_map((batch_size,))
    rows: set[int] = set()
    for (span,) in spans.values():
        rows.update(range(*span.indices(batch_size)))
    return np.array(sorted(rows))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows (`local_rows`, each of whole length) as global arrays, sharded by `batch_shardings`."""
    shardings = batch_shardings(mesh, batch)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), shardings)
    blocks = batch_devices(mesh)
    held = len(local_rows(mesh, blocks))  # of the blocks of rows that one device holds
    return {
        key: _put_rows(shardings[key], value, len(value) * blocks // held)
        for key, value in batch.items()
    }


def _put_rows(sharding: NamedSharding, rows: np.ndarray, batch_size: int) -> jax.Array:
    """This process's rows as its part of a global array of `batch_size` rows."""
    held = local_rows(sharding.mesh, batch_size)

    def part(index):
        first, *rest = index
        start, stop, _ = first.indices(batch_size)
        return rows[(slice(*np.searchsorted(held, (start, stop))), *rest)]

    return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, part)
