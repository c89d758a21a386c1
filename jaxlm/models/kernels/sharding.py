"""How a kernel's arguments lie on the mesh in force: XLA cannot split a kernel by itself, `jax.shard_map` does."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.spread import num_shards

Axes = str | tuple[str, ...] | None


class Split(NamedTuple):
    """The mesh axes of rows, of the queries' places, and of heads. Keys and values are whole along their places.

    An axis that a size is no multiple of is left out: each device then computes all of it, as for one row of a batch.
    """

    batch: Axes
    length: Axes
    heads: Axes

    @property
    def queries(self) -> jax.sharding.PartitionSpec:
        """Of (B, T, N, H)."""
        return jax.sharding.PartitionSpec(self.batch, self.length, self.heads, None)

    @property
    def keys(self) -> jax.sharding.PartitionSpec:
        """Of (B, S, K, H)."""
        return jax.sharding.PartitionSpec(self.batch, None, self.heads, None)

    def segments(self, queries: bool) -> jax.sharding.PartitionSpec:
        """Of segment ids (B, T), of queries or keys."""
        return jax.sharding.PartitionSpec(self.batch, self.length if queries else None)


def get_split(rows: int, length: int, kv_heads: int) -> Split:
    """By the rule table and the mesh in force; without a mesh nothing is split.

    length: of a row, in units that must stay together (a kernel's smallest block).
    """
    names = nn.logical_to_mesh_axes(("batch", "length", "act_kv"))
    return Split(*map(divisible, names, (rows, length, kv_heads)))


def divisible(axes: Axes, size: int) -> Axes:
    """`axes`, if the devices along them divide `size`; else None: whole on each."""
    return None if size % num_shards(axes) else axes


def is_split() -> bool:
    """Whether a mesh is in force."""
    return not jax.sharding.get_abstract_mesh().empty


def run_split(function, in_specs, out_specs):
    """`function`, run on each device's part; as it is where no mesh is in force."""
    if not is_split():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def whole_blocks(length: int, block: int) -> int:
    """The next multiple of `block`."""
    return -(-length // block) * block


def pad_places(x: jax.Array, length: int) -> jax.Array:
    """(B, T, …) to (B, length, …) with zeros behind: as segment ids they are padding, which nothing real sees."""
    more = length - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x
