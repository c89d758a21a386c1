"""How fast the hardware could go: the peak that a model FLOPs utilisation divides by."""

import time

import jax
import jax.numpy as jnp

from jaxlm.parallel.peaks import PEAKS


def peak_flops(devices, dtype: str) -> tuple[float, str]:
    """Peak FLOP/s of all `devices` together, and the words that say which peak that is.

    Known accelerators: the data sheet's figure (bfloat16 where there is no figure for `dtype`). A CPU, and
    a device not in the table: the best of a few measured `dtype` matmuls, since no data sheet says it.
    Simulated CPU devices share one set of cores, so the measured figure is not multiplied by their number.
    """
    kind = devices[0].device_kind
    names = [name for name in PEAKS if kind.startswith(name)]
    if names:
        bfloat16, single = PEAKS[max(names, key=len)]
        peak = single if dtype == "float32" and single else bfloat16
        return peak * len(devices), f"data sheet, {len(devices)} x {kind}"
    peak = measured_matmul_flops(dtype)
    count = 1 if devices[0].platform == "cpu" else len(devices)
    return peak * count, f"measured {dtype} matmul on {kind}"


def measured_matmul_flops(dtype: str, size: int = 0, repeats: int = 5) -> float:
    """FLOP/s of the fastest of `repeats` square matmuls on one device.

    size: 0 is one that takes the device so long that its launch, tens of microseconds, does not count.
    """
    device = jax.local_devices()[0]
    size = size or (1024 if device.platform == "cpu" else 8192)
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
