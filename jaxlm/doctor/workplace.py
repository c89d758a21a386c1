"""Where and with what a run works: its config on these devices, its workdir and what lies there, its data."""

import math
import shutil
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.build import is_store, named_sources
from jaxlm.data import store_check
from jaxlm.doctor.findings import FAIL, GB, OK, SCRATCH, WARN, Patient, Said
from jaxlm.doctor.machine import spread
from jaxlm.exits import RunError
from jaxlm.files import as_path, is_remote
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import processes
from jaxlm.planning.compiling import stand_in_tokenizer
from jaxlm.program import Program, make_program
from jaxlm.tokenizers import is_saved, load_tokenizer
from jaxlm.training import stored
from jaxlm.training.checkpoints import FOLDER, Checkpoints, find_step, find_steps
from jaxlm.training.state import TrainState

PROBE_BYTES = 64 << 20
SLOW_DISK = 50e6  # bytes/s


def check_config(patient: Patient) -> Said:
    """Whether the config makes a program, how large it is, and its checkpoint."""
    if program := make_config_program(patient):
        size = f"{checkpoint_bytes(program) / GB:.2f} GB"
        yield OK, f"{program.num_params:,} parameters; a checkpoint has {size}"


def make_config_program(patient: Patient) -> Program | None:
    """The program of a pretraining config on the devices that there are; nothing is allocated."""
    config = patient.config
    if config is None or "objective" not in config:
        return None
    mesh = meshes.make_mesh(**config.mesh)
    tokenizer = stand_in_tokenizer(config.model.vocab_size, config.tokenizer.num_sentinels)
    return make_program(config, mesh, tokenizer)


def checkpoint_bytes(program: Program) -> int:
    """Bytes of the state of a run."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state_shape))


def check_workdir(patient: Patient) -> Said:
    """Writes and reads a checkpoint there, as a run does."""
    if patient.workdir is None:
        return
    scratch = patient.workdir / SCRATCH
    says = f"{patient.workdir}: no checkpoint can be written"
    mend = "free some room, mend its permissions, or take another --workdir"
    if problem := "".join(processes.gather("scratch", make_folder(scratch))):
        yield FAIL, f"{says}: {problem}", mend
        return
    try:
        yield from write_and_read(scratch)
    except (OSError, RunError) as error:
        yield FAIL, f"{says}: {error}", mend
    finally:
        if processes.is_main():
            remove(scratch)


def make_folder(folder: Path) -> str:
    """Process 0 makes it; returns what is in the way, or ''."""
    try:
        if processes.is_main():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    return ""


def check_room(patient: Patient) -> Said:
    """Room on the workdir's disk for the checkpoints that are still to come."""
    if patient.workdir is None or is_remote(patient.workdir):
        return
    there = next(p for p in (patient.workdir, *patient.workdir.absolute().parents) if p.exists())
    free, program = shutil.disk_usage(there).free, make_config_program(patient)
    if program is None:
        yield OK, f"{free / GB:,.1f} GB are free"
        return
    there_are = len(find_steps(patient.workdir / FOLDER))
    more = max(1, most_checkpoints(patient.config) - there_are)
    wanted = more * checkpoint_bytes(program)
    says = f"{free / GB:,.1f} GB are free, {more} more checkpoints take {wanted / GB:,.1f} GB"
    if free < wanted:
        mend = "free some room, take another --workdir, a smaller checkpoint.keep_last or a larger checkpoint.keep_every"
        yield FAIL, says, mend
    elif free < 2 * wanted:
        yield WARN, says, "free some room: the run's other files and the next one want some, too"
    else:
        yield OK, says


def most_checkpoints(config: ConfigDict) -> int:
    """How many checkpoints a run may have at a time: the newest, the one that is being written, the best, each `keep_every`."""
    kept = config.checkpoint
    every = math.lcm(kept.keep_every, config.checkpoint_every_steps)  # 0 if either is
    for_good = config.num_train_steps // every if every else 0
    return kept.keep_last + 1 + bool(kept.best_metric) + for_good


def write_and_read(folder: Path) -> Said:
    """Saves a probe of noise as a checkpoint, reads it again, compares, and says how fast both were."""
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
    """Removes a folder, here or on a bucket, with all that is in it."""
    (folder.rmtree if is_remote(folder) else lambda: shutil.rmtree(folder))()


def check_run(patient: Patient) -> Said:
    """What a run has left in the workdir: its tokenizer and its newest checkpoint."""
    workdir = patient.workdir
    if workdir is None or not processes.is_main():
        return
    if is_saved(workdir / "tokenizer"):
        tokenizer = load_tokenizer(workdir / "tokenizer")
        yield OK, f"its tokenizer is whole ({tokenizer.vocab_size:,} ids)"
    if find_steps(workdir / "checkpoints"):
        step_dir = find_step(workdir)
        problems = stored.problems(step_dir)
        mend = "the run goes on from the step before; `jaxlm-tool fsck` looks at all"
        yield from ((FAIL, f"{step_dir}: {problem}", mend) for problem in problems)
        if not problems:
            yield OK, f"step {step_dir.name} is whole"


def check_data(patient: Patient) -> Said:
    """Every byte of the prepared stores that the config names, and of the one that the run has made."""
    if not processes.is_main():
        return
    sources = named_sources(patient.config.data.sources) if has_text(patient.config) else []
    stores = [as_path(path) for _, path in sources if is_store(path)]
    if patient.workdir and (own := patient.workdir / "store").is_dir():
        stores += sorted(path for path in own.iterdir() if not path.name.endswith(".partial"))
    for store in stores:
        problems = store_check.problems(store)
        mend = "copy it again from where it is whole, or prepare it again"
        yield from ((FAIL, f"{store}: {problem}", mend) for problem in problems)
        if not problems:
            yield OK, f"{store} is whole"


def has_text(config: ConfigDict | None) -> bool:
    """Whether the config is of pretraining, which has sources of text."""
    return config is not None and "sources" in config.data
