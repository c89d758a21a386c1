"""State that waits in the host's memory between steps, pinned so that the device reads and writes it directly.

The device is free of it (8 bytes a parameter for Adam) during the forward and backward pass; for the update all of it comes
over at once, beside the new one, and goes back. So it helps where activations are what does not fit, and makes the peak
larger where the state itself is: share that by mesh.fsdp. A plan of the step says which of the two it is.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding

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
