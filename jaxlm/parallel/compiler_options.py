"""What the compiler is told for each kind of device, each with its reason; everything else is its default.

As options of the jitted step and not as LIBTPU_INIT_ARGS or XLA_FLAGS: these must be set before jax starts, and one that
a release does not know ends the process.
"""

from typing import Any

import jax

# By the beginning of `device_kind`; all that match apply.
OPTIONS: dict[str, dict[str, Any]] = {
    "TPU": {
        # Matrices that are sharded over fsdp are gathered whole, which runs beside other work; by default they are
        # gathered piece by piece in a loop of thin matmuls (Qwen3-0.6B on v5e-16: 0.83 of 2.0 estimated seconds).
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    },
}


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The options for a program over the mesh's devices."""
    kind = mesh.devices.flat[0].device_kind
    return {
        name: value
        for prefix, options in OPTIONS.items()
        if kind.startswith(prefix)
        for name, value in options.items()
    }
