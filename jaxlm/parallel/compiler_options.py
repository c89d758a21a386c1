"""What the compiler is told for each kind of device, each with its reason; everything else is its default.

As options of the jitted step and not as LIBTPU_INIT_ARGS or XLA_FLAGS: these must be set before jax starts, and one that
a release does not know ends the process. As an option, such a one is left out, with a line in the log.
"""

import functools
import logging
import re
from typing import Any

import jax

log = logging.getLogger("jaxlm")

# By the beginning of `device_kind`; all that match apply.
OPTIONS: dict[str, dict[str, Any]] = {
    "TPU": {
        # Matrices that are sharded over fsdp are gathered whole, which runs beside other work; by default they are
        # gathered piece by piece in a loop of thin matmuls (Qwen3-0.6B on v5e-16: 0.83 of 2.0 estimated seconds).
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    },
    "TPU v6": {
        # One operation may use 96 of its 128 MiB of VMEM: larger tiles where matmuls are what limits (MaxText's v6e
        # recipes, benchmarks/xla_flags_library.py; not measured here).
        "xla_tpu_scoped_vmem_limit_kib": "98304",
    },
    "NVIDIA": {
        # Collectives are moved to where other work hides them (NVIDIA's JAX images set it).
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # … also across the iterations of the loop over layers: the next layer's matrices are gathered, and the last
        # one's gradients reduced, beside this one (NVIDIA's guide "Tips for High-Performance LLMs with JAX and XLA"; the
        # gathers are seen to move in a compiled loop; not measured here).
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
    },
}
# On top of these, where the mesh spans several slices.
SLICES_OPTIONS: dict[str, dict[str, Any]] = {
    "TPU": {
        # Gradients cross the slow network between slices beside the backward pass (MaxText's DATA_PARALLEL_OVERLAP).
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
}
FLAGS = ("auto", "none")


def lowering_platform(platform: str) -> str:
    """What lowering calls a device's `platform`."""
    return {"gpu": "cuda"}.get(platform, platform)


def compiler_options(mesh: jax.sharding.Mesh, flags: str = "auto") -> dict[str, Any]:
    """The options for a program over the mesh's devices, without those that its compiler does not know.

    flags: 'auto', or 'none' for none.
    """
    if flags not in FLAGS:
        raise ValueError(f"compiler_flags {flags!r}: expected one of {', '.join(FLAGS)}")
    wanted = wanted_options(mesh) if flags == "auto" else {}
    return known_options(tuple(wanted.items()), mesh.devices.flat[0])


def wanted_options(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What is known to help on the mesh's devices, and between slices if there are several."""
    devices = mesh.devices.flat
    slices = {getattr(device, "slice_index", 0) for device in devices}
    tables = [OPTIONS, SLICES_OPTIONS] if len(slices) > 1 else [OPTIONS]
    return {
        name: value
        for table in tables
        for prefix, options in table.items()
        if devices[0].device_kind.startswith(prefix)
        for name, value in options.items()
    }


@functools.cache
def known_options(options: tuple[tuple[str, Any], ...], device: jax.Device) -> dict[str, Any]:
    """Those that the device's compiler accepts: it is asked with the smallest program, and names one it does not know."""
    left = dict(options)
    sharding = jax.sharding.SingleDeviceSharding(device)
    number = jax.ShapeDtypeStruct((), "float32", sharding=sharding)
    platform = lowering_platform(device.platform)
    while left:
        lowered = jax.jit(lambda x: x + 1).trace(number).lower(lowering_platforms=(platform,))
        try:
            lowered.compile(compiler_options=left)
            break
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None:
                raise
            del left[unknown[1]]
            log.info("this release's compiler has no option %s: left out", unknown[1])
    return left
