"""State that waits in the host's memory between steps, pinned so that the device reads and writes it directly.

Worth it where the optimizer's state, 8 bytes a parameter for Adam, is what does not fit: it leaves the device while the
forward and backward pass need the room, and crosses the host's link twice a step.
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
