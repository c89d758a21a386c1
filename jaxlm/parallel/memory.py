"""Whether what a run holds all the time has room at all, asked before minutes of compiling and allocating."""

import math
import os
from typing import Any

import jax

from jaxlm.exits import RunError

GIB = 2**30


def refuse_too_large(state: Any) -> None:
    """state: ShapeDtypeStructs with shardings. What a step needs besides (gradients, activations) is the compiler's business.

    Raises:
      RunError: where the state alone is more than the devices hold.
    """
    device = jax.local_devices()[0]
    needed, there = resident_bytes(state), device_bytes(device)
    if needed > there:
        raise RunError(
            f"this run does not fit: parameters and optimizer take {needed / GIB:,.1f} GiB of each device, and {device} has "
            f"{there / GIB:,.1f} GiB. Take a smaller model, an optimizer with less state (optimizer=adafactor), or more devices "
            "(--config.mesh.fsdp=N shares the state out). `jaxlm-tool plan` says what fits where."
        )


def resident_bytes(state: Any) -> int:
    """Bytes of a device that arrays with these shardings take; those in the host's memory take none."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
        if x.sharding.memory_kind != "pinned_host"
    )


def device_bytes(device: jax.Device) -> int:
    """What a device may hold; the devices of a CPU share its memory."""
    if stats := device.memory_stats():
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
