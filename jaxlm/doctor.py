"""Whether a machine, a workdir and a config are fit for a run: what is wrong with each, and the mend.

Every check yields findings, and says by them what it saw. `examine` runs all: those that break a run are `fail`, those that
make it slow or short-lived `warn`.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxlm.build import is_store, named_sources
from jaxlm.data import store_check
from jaxlm.exits import RunError
from jaxlm.files import cache_folder, is_remote
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import processes
from jaxlm.parallel.launchers import Place
from jaxlm.parallel.peaks import PEAKS
from jaxlm.planning.compiling import stand_in_tokenizer
from jaxlm.program import Program, make_program
from jaxlm.tokenizers import is_saved, load_tokenizer
from jaxlm.training import stored
from jaxlm.training.checkpoints import Checkpoints, find_step, find_steps
from jaxlm.training.state import TrainState
from jaxlm.training.throughput import measured_matmul_flops
from jaxlm.versions import find_conflicts

OK, WARN, FAIL = "ok", "warn", "fail"
PYTHONS = ((3, 11), (3, 13))  # what is tested
SLOW_CPU = 4e9  # float32 FLOP/s of a core: a tenth of what one of 2015 does
SHARES = {
    FAIL: 0.25,
    WARN: 0.6,
}  # of an accelerator's peak, which a large matmul reaches to 80 to 95%
SLOW_COMPILE = 20.0  # s for a matmul
PROBE_BYTES = 64 << 20
SLOW_DISK = 50e6  # bytes/s
GB = 1e9
SCRATCH = ".doctor"


class Finding(NamedTuple):
    """check: its name. verdict: OK, WARN or FAIL. mend: what to do, '' for OK."""

    check: str
    verdict: str
    found: str
    mend: str = ""


class NoDevices(Exception):
    """(what was found, the mend)."""


@dataclasses.dataclass(frozen=True)
class Patient:
    """What is examined: always this machine and its devices; workdir and config if they are given."""

    workdir: Path | None = None
    config: ConfigDict | None = None
    place: Place | None = None


def examine(patient: Patient) -> Iterator[Finding]:
    """The findings of all checks, as they come; without devices there are no others after that. All processes of a run must
    ask."""
    for name, check in CHECKS.items():
        try:
            for said in check(patient):
                yield Finding(name, *said)
        except NoDevices as error:
            yield Finding(name, FAIL, *error.args)
            return
        except (
            Exception
        ) as error:  # what a check has not foreseen: the others still have something to say
            yield Finding(
                name, FAIL, f"{type(error).__name__}: {error}", "mend what the error says"
            )


Said = Iterator[tuple[str, ...]]  # (verdict, found[, mend])


def check_python(patient: Patient) -> Said:
    version, (least, most) = sys.version_info[:2], PYTHONS
    if version < least:
        yield FAIL, f"Python {sys.version.split()[0]}", "take Python 3.11, 3.12 or 3.13"
    elif version > most:
        yield WARN, f"Python {sys.version.split()[0]} is not tested", "Python 3.11 to 3.13 are"
    else:
        yield OK, f"Python {sys.version.split()[0]}"


def check_versions(patient: Patient) -> Said:
    conflicts = find_conflicts()
    for conflict in conflicts:
        yield (FAIL if conflict.breaks else WARN), conflict.found, conflict.mend
    if not conflicts:
        packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
        from importlib.metadata import version

        yield OK, ", ".join(f"{name} {version(name)}" for name in packages)


def check_devices(patient: Patient) -> Said:
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise NoDevices(
            f"jax finds none, with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: {error}",
            "install jax for them (README, TPU and GPU), or unset JAX_PLATFORMS",
        ) from error
    kinds = sorted({device.device_kind for device in devices})
    yield OK, f"{len(devices)} x {', '.join(kinds)} in {jax.process_count()} process(es)"
    if devices[0].platform == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        for what, files, extra in (
            ("NVIDIA GPUs", "/dev/nvidia[0-9]*", "cuda12"),
            ("TPU chips", "/dev/accel*", "tpu"),
        ):
            if glob.glob(files):
                yield (
                    FAIL,
                    f"this machine has {what}, and jax does not see them",
                    f"pip install -r requirements.txt 'jax[{extra}]>=0.7.2,<0.11'",
                )


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
        rate, cores = measured_matmul_flops("float32"), len(os.sched_getaffinity(0))
        says = f"{rate / 1e9:,.0f} GFLOP/s in float32 on {cores} core(s)"
        verdict = WARN if rate < SLOW_CPU * cores else OK
    elif not names:
        yield OK, f"{measured_matmul_flops('bfloat16', 8192) / 1e12:,.0f} TFLOP/s in bfloat16"
        return
    else:
        rate, peak = measured_matmul_flops("bfloat16", 8192), PEAKS[max(names, key=len)][0]
        says = f"{rate / 1e12:,.0f} of {peak / 1e12:,.0f} TFLOP/s in bfloat16 ({rate / peak:.0%})"
        verdict = next((v for v, share in SHARES.items() if rate < share * peak), OK)
    mend = "other work, heat or a power limit may slow it: look at top, nvidia-smi"
    yield verdict, says, "" if verdict == OK else mend


def check_processes(patient: Patient) -> Said:
    """All devices of all processes add their ones up."""
    if patient.place is None:
        yield OK, "one process: no launcher's environment"
    else:
        place = patient.place
        yield (
            OK,
            f"{place.launcher}: {place.num_processes} processes, coordinator {place.coordinator or 'by jax'}",
        )
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
    """The array, its first axis over all devices of all processes."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def check_config(patient: Patient) -> Said:
    if program := make_config_program(patient):
        yield (
            OK,
            f"{program.num_params:,} parameters; a checkpoint has {checkpoint_bytes(program) / GB:.2f} GB",
        )


def make_config_program(patient: Patient) -> Program | None:
    """The program of a pretraining config on the devices that there are; nothing is allocated."""
    config = patient.config
    if config is None or "objective" not in config:
        return None
    mesh = meshes.make_mesh(**config.mesh)
    tokenizer = stand_in_tokenizer(config.model.vocab_size, config.tokenizer.num_sentinels)
    return make_program(config, mesh, tokenizer)


def checkpoint_bytes(program: Program) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state_shape))


def check_workdir(patient: Patient) -> Said:
    """Writes and reads a checkpoint there, as a run does, and looks at the room that is left."""
    if patient.workdir is None:
        return
    scratch = patient.workdir / SCRATCH
    try:
        if processes.is_main():
            scratch.mkdir(parents=True, exist_ok=True)
        processes.barrier("the scratch folder is there")
        yield from write_and_read(scratch)
    except (OSError, RunError) as error:
        mend = "free some room, mend its permissions, or take another --workdir"
        yield FAIL, f"{patient.workdir}: no checkpoint can be written: {error}", mend
        return
    finally:
        if processes.is_main() and scratch.is_dir():
            remove(scratch)
    if is_remote(patient.workdir):
        return
    free = shutil.disk_usage(patient.workdir).free
    program = make_config_program(patient)
    if program is None:
        yield OK, f"{free / GB:,.1f} GB are free"
        return
    kept = patient.config.checkpoint.keep_last + 1  # and the one that is being written
    wanted = kept * checkpoint_bytes(program)
    says = f"{free / GB:,.1f} GB are free, {kept} checkpoints take {wanted / GB:,.1f} GB"
    if free < wanted:
        yield (
            FAIL,
            says,
            "free some room, take another --workdir, or a smaller checkpoint.keep_last",
        )
    else:
        yield (
            (WARN if free < 2 * wanted else OK),
            says,
            "" if free >= 2 * wanted else "free some room",
        )


def write_and_read(folder: Path) -> Said:
    mesh = meshes.make_mesh()
    rows = mesh.size * (PROBE_BYTES // 4096 // mesh.size)
    noise = np.random.default_rng(0).standard_normal((rows, 1024), np.float32)
    zeros = spread(mesh, np.zeros(mesh.size, np.int32))
    state = TrainState(zeros, {"w": spread(mesh, noise)}, {}, skipped=zeros)
    shape = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    checkpoints = Checkpoints(folder)
    began = time.perf_counter()
    checkpoints.save(1, state, {"step": 1}, None)
    checkpoints.wait()
    written = noise.nbytes / (time.perf_counter() - began)
    began = time.perf_counter()
    found = checkpoints.restore(shape)
    read = noise.nbytes / (time.perf_counter() - began)
    checkpoints.close()
    assert found is not None
    if not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), found[0], state))):
        yield FAIL, f"{folder.parent}: what is read is not what was written", "do not use this disk"
        return
    says = (
        f"a checkpoint is written at {written / 1e6:,.0f} MB/s and read at {read / 1e6:,.0f} MB/s"
    )
    slow = min(written, read) < SLOW_DISK
    yield (WARN if slow else OK), says, "a faster disk shortens saves" if slow else ""


def remove(folder: Path) -> None:
    (folder.rmtree if is_remote(folder) else lambda: shutil.rmtree(folder))()


def check_run(patient: Patient) -> Said:
    """What a run has left in the workdir: its tokenizer and its newest checkpoint."""
    workdir = patient.workdir
    if workdir is None:
        return
    if is_saved(workdir / "tokenizer"):
        tokenizer = load_tokenizer(workdir / "tokenizer")
        yield OK, f"its tokenizer is whole ({tokenizer.vocab_size:,} ids)"
    if find_steps(workdir / "checkpoints"):
        step_dir = find_step(workdir)
        problems = stored.problems(step_dir)
        for problem in problems:
            yield (
                FAIL,
                f"{step_dir}: {problem}",
                "the run goes on from the step before; tools/fsck.py looks at all",
            )
        if not problems:
            yield OK, f"step {step_dir.name} is whole"


def check_data(patient: Patient) -> Said:
    sources = named_sources(patient.config.data.sources) if has_text(patient.config) else []
    stores = [Path(path) for _, path in sources if is_store(path)]
    if patient.workdir is not None and is_store(patient.workdir / "store"):
        stores.append(patient.workdir / "store")
    for store in stores:
        problems = store_check.problems(store)
        for problem in problems:
            yield (
                FAIL,
                f"{store}: {problem}",
                "copy it again from where it is whole, or prepare it again",
            )
        if not problems:
            yield OK, f"{store} is whole"


def has_text(config: ConfigDict | None) -> bool:
    return config is not None and "sources" in config.data


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


CHECKS: dict[str, Callable[[Patient], Said]] = {
    "python": check_python,
    "versions": check_versions,
    "cache": check_cache,
    "devices": check_devices,
    "arithmetic": check_arithmetic,
    "speed": check_speed,
    "processes": check_processes,
    "config": check_config,
    "workdir": check_workdir,
    "run": check_run,
    "data": check_data,
}
