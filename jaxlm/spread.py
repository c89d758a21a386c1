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
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in mesh_axes(name))
