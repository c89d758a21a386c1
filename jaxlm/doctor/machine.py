"""The machine: Python and its packages, the devices and what they compute, the other processes."""

import os
import platform
import shutil
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.doctor.findings import FAIL, GB, OK, SCRATCH, WARN, NoDevices, Patient, Said
from jaxlm.doctor.versions import CORE, find_conflicts
from jaxlm.files import cache_folder
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import processes
from jaxlm.parallel.accelerators import unseen_accelerators
from jaxlm.parallel.peaks import PEAKS
from jaxlm.training.throughput import measured_matmul_flops

PYTHONS = ((3, 11), (3, 13))  # what is tested
SLOW_CPU = (
    4e9  # float32 FLOP/s of a core; one with vectors of eight does ten times as much and more
)
# Of an accelerator's peak, of which a large matmul reaches 80 to 95%.
SHARES = {FAIL: 0.25, WARN: 0.6}
SLOW_COMPILE = 20.0  # s for a matmul


def check_python(patient: Patient) -> Said:
    """Whether this Python is one that jaxlm is tested with."""
    says, (least, most) = f"Python {platform.python_version()}", PYTHONS
    if sys.version_info[:2] < least:
        yield FAIL, says, "take Python 3.11, 3.12 or 3.13"
    elif sys.version_info[:2] > most:
        yield WARN, f"{says} is not tested", "Python 3.11, 3.12 and 3.13 are"
    else:
        yield OK, says


def check_versions(patient: Patient) -> Said:
    """Whether the installed packages go together."""
    conflicts = find_conflicts()
    for conflict in conflicts:
        yield (FAIL if conflict.breaks else WARN), conflict.found, conflict.mend
    if not conflicts:
        yield OK, ", ".join(f"{name} {version(name)}" for name in CORE)


def check_devices(patient: Patient) -> Said:
    """Which devices jax finds, and whether they are those that are there."""
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise NoDevices(
            f"jax finds none, with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: {error}",
            "install jax for them (README, TPU and GPU), or unset JAX_PLATFORMS",
        ) from error
    kinds = sorted({device.device_kind for device in devices})
    yield OK, f"{len(devices)} x {', '.join(kinds)} in {jax.process_count()} process(es)"
    for found, mend in unseen_accelerators():
        yield FAIL, found, mend


def check_arithmetic(patient: Patient) -> Said:
    """Every device multiplies two matrices of whole numbers, whose product is exact."""
    a, b = (np.random.default_rng(i).integers(-8, 9, (256, 256)).astype(np.float32) for i in (0, 1))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    wrong = [
        str(device)
        for device in jax.local_devices()
        if not np.array_equal(multiply(jax.device_put(a, device), jax.device_put(b, device)), exact)
    ]
    if wrong:
        yield FAIL, f"{', '.join(wrong)} multiply wrongly", "do not use this machine: replace it"
    else:
        yield OK, f"{len(jax.local_devices())} device(s) multiply exactly"


def check_speed(patient: Patient) -> Said:
    """The compiler's time, and the rate of a large matmul beside what the chip's vendor says."""
    device = jax.local_devices()[0]
    began = time.perf_counter()
    jax.jit(lambda x: x @ x + 1).lower(jax.ShapeDtypeStruct((512, 512), "float32")).compile()
    seconds = time.perf_counter() - began
    if seconds > SLOW_COMPILE:
        yield WARN, f"a matmul compiles in {seconds:.0f} s", "other work may have the processors"
    else:
        yield OK, f"a matmul compiles in {seconds:.2f} s"
    names = [name for name in PEAKS if device.device_kind.startswith(name)]
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        rate, least = measured_matmul_flops("float32"), {WARN: SLOW_CPU * cores}
        says = f"{rate / 1e9:,.0f} GFLOP/s in float32 on {cores} core(s)"
    else:
        rate, least = measured_matmul_flops("bfloat16"), {}
        says = f"{rate / 1e12:,.0f} TFLOP/s in bfloat16"
        if names:
            peak = PEAKS[max(names, key=len)][0]
            least = {verdict: share * peak for verdict, share in SHARES.items()}
            says += f" of {peak / 1e12:,.0f} ({rate / peak:.0%})"
    verdict = next((verdict for verdict, limit in least.items() if rate < limit), OK)
    mend = "other work, heat or a power limit may slow it: look at top, nvidia-smi"
    yield verdict, says, mend if verdict != OK else ""


def check_processes(patient: Patient) -> Said:
    """All devices of all processes add their ones up."""
    if patient.place is None:
        yield OK, "one process: no launcher's environment"
    else:
        place = patient.place
        where = place.coordinator or "found by jax"
        yield OK, f"{place.launcher}: {place.num_processes} processes, coordinator {where}"
    mesh = meshes.make_mesh()
    processes.meet(mesh)
    ones = spread(mesh, np.ones(mesh.size, np.float32))
    began = time.perf_counter()
    total = float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))
    seconds = time.perf_counter() - began
    if total == mesh.size:
        yield OK, f"{mesh.size} device(s) have added up ({seconds:.2f} s, compiled)"
    else:
        yield FAIL, f"{mesh.size} ones add up to {total}", "do not use these machines together"


def spread(mesh: jax.sharding.Mesh, array: np.ndarray) -> jax.Array:
    """The array (devices, ...), its first axis over all devices of all processes."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def check_cache(patient: Patient) -> Said:
    """Compiled programs and copies of data lie there."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SCRATCH).touch()
        (folder / SCRATCH).unlink()
        yield OK, f"{folder}, {shutil.disk_usage(folder).free / GB:,.1f} GB are free"
    except OSError as error:
        mend = "every start compiles anew: set XDG_CACHE_HOME to a folder that can be written"
        yield WARN, f"{folder}: {error}", mend
