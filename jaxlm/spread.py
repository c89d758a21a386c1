"""Over which devices of the mesh in force a logical axis is spread. What a logical axis means is in the rule table of jaxlm.parallel.mesh."""

import math

import jax
from flax import linen as nn


def mesh_axes(name: str) -> tuple[str, ...]:
    """The axes of the mesh in force, of more than one device, that a logical axis is spread over; none without a mesh."""
    axes = nn.logical_to_mesh_axes((name,))[0] or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    names = (axes,) if isinstance(axes, str) else axes
    return tuple(axis for axis in names if sizes.get(axis, 1) > 1)


def num_devices(name: str) -> int:
    """Over how many devices of the mesh in force a logical axis is spread; 1 without a mesh."""
    return num_shards(mesh_axes(name))


def num_shards(axes: str | tuple[str, ...] | None) -> int:
    """The number of parts that axes of the mesh in force cut an array into."""
    if axes is None:
        return 1
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in ([axes] if isinstance(axes, str) else axes))
