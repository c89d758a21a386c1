"""A run and its workdir, alike for pretraining and fine-tuning: what it writes about itself (config.json,
environment.json, checkpoint manifests), where it goes on, and the loop over it.
"""

import contextlib
import errno
import importlib.metadata
import json
import logging
import platform
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jaxlm import build, config_files, identity, sealed
from jaxlm.data.positions import as_json
from jaxlm.exits import Damaged, NotSaved, Stopped
from jaxlm.files import remove_partials, write_text
from jaxlm.lock import held
from jaxlm.parallel import processes
from jaxlm.parallel.memory import refuse_too_large
from jaxlm.private import refuse_secrets
from jaxlm.rewind import check_rewinds
from jaxlm.training.checkpoints import FOLDER, Checkpoints, find_steps
from jaxlm.training.goodput import Ledger
from jaxlm.training.guards import BadSteps
from jaxlm.training.loop import Intervals, Loop, Resumed, Work
from jaxlm.training.metrics import MetricWriter
from jaxlm.training.profile import Profile, parse_steps
from jaxlm.training.self_check import SelfCheck
from jaxlm.training.session import Session
from jaxlm.training.state import TrainState
from jaxlm.training.stopping import Stop
from jaxlm.training.stored import read_manifest
from jaxlm.training.watchdog import Watchdog

log = logging.getLogger("jaxlm")

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def accept_config(config: ConfigDict, workdir: Path, allow_change: bool) -> None:
    """Refuses, on a resume, a config that would make it another run; a new run's is written to config.json.

    A config that differs is written when the run goes on with it (`open_writer`): until then it may turn out not to fit.
    """
    refuse_another_config(config)
    path = workdir / "config.json"
    if processes.is_main() and not path.exists():
        build.write_config(config, path)
    # No other process looks for it before: NFS remembers for half a minute what was not there.
    processes.barrier("config.json is written")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there although process 0 has written it: --workdir must be on a disk or bucket that all "
            "processes share"
        )
    changes = identity.config_changes(config_files.saved_config(path), config)
    kinds = {name: identity.kind_of(name) for name in changes}
    of = lambda kind: [line for name, line in changes.items() if kinds[name] == kind]
    # Before its first checkpoint a run has nothing that another config would spoil, a mended one least of all.
    has_begun = bool(find_steps(workdir / FOLDER))
    for line in of("execution") + ([] if has_begun else of("identity")):
        log.info("config changed since this run began: %s", line)
    refused = of("identity") if has_begun else []
    identity.accept_changes(workdir, refused, of("kept"), allowed=allow_change)


def accept_data(run: build.Run, allow_change: bool) -> None:
    """Refuses data, a dtype or a tokenizer that are not those of process 0, or, on a resume, of the run's newest checkpoint."""
    mine, folder = manifest(run, 0), run.workdir / FOLDER
    refuse_other_data(mine)
    for step in reversed(find_steps(folder)):
        with contextlib.suppress(Damaged):  # what is damaged is named when it is restored
            about = read_manifest(folder / str(step))
            changes, kept = identity.manifest_changes(about, mine)
            return identity.accept_changes(run.workdir, changes, kept, allowed=allow_change)


def refuse_other_data(about: Mapping[str, Any]) -> None:
    """Raises if process 0 has read other data, or computes in another dtype. about: this process's manifest."""
    first = json.loads(processes.gather("data", json.dumps(about))[0])
    changes, kept = identity.manifest_changes(first, about)
    refuse_differing("other data", [*changes, *kept], "Give all processes the same files.")


def note_recipe(recipe: str, workdir: Path) -> None:
    """recipe.json: what --config named, and the config that it is before any flag; '' is none."""
    if recipe and processes.is_main():
        config = config_files.read_config(recipe)
        refuse_secrets(flatten_dict(config.to_dict(), sep="."))
        content = {"name": recipe, "config": json.loads(config.to_json())}
        write_text(workdir / "recipe.json", json.dumps(content, indent=2) + "\n")


def refuse_another_config(config: ConfigDict) -> None:
    """Raises if process 0 has another config."""
    first = json.loads(processes.gather("config", config.to_json())[0])
    changes = identity.config_changes(ConfigDict(first), config).values()
    refuse_differing("another config", changes, "Start all processes with the same flags.")


def refuse_differing(what: str, changes: Collection[str], mend: str) -> None:
    """Raises ValueError if there is a change from process 0 to this one."""
    if changes:
        lines = "\n".join(f"  {line}" for line in changes)
        raise ValueError(
            f"this process has {what} than process 0 (its value -> this one's):\n{lines}\n{mend}"
        )


@contextlib.contextmanager
def opened(
    run: build.Run, session: Session, start: Callable[[], TrainState]
) -> Iterator[tuple[Checkpoints, MetricWriter, TrainState, Resumed]]:
    """Checkpoints, metrics, and what `start_or_resume` gives; at any end of the block the first two are closed."""
    with contextlib.ExitStack() as stack:
        store = Checkpoints(run.workdir, **run.config.checkpoint)
        stack.callback(store.close)
        with session.ledger.spend("restore"):
            state, resumed = start_or_resume(run, store, start)
        writer = open_writer(run, int(state.step), resumed.evaluation_left)
        stack.callback(writer.close)
        yield store, writer, state, resumed


def start_or_resume(
    run: build.Run, store: Checkpoints, start: Callable[[], TrainState]
) -> tuple[TrainState, Resumed]:
    """The state of the newest whole checkpoint, and what was open there; what `start` makes, where there is none."""
    refuse_too_large(run.state_shape)
    processes.meet(run.mesh)
    restored = store.restore(run.state_shape)
    if restored is None:
        return start(), Resumed()
    state, about = restored
    check_rewinds(run, about)
    log.info("resumed from step %d", int(state.step))
    return state, Resumed.of(about)


def open_writer(run: build.Run, start_step: int, evaluation_left: bool) -> MetricWriter:
    """Writes config.json and environment.json, says how large the run is, and opens its metrics."""
    peak, peak_says = run.peak
    if processes.is_main():
        build.write_config(run.config, run.workdir / "config.json")
        write_environment(run.workdir, run, peak_says)
    log.info(
        "%s parameters on %d x %s; MFU divides by %.3g FLOP/s (%s)",
        f"{run.num_params:,}",
        run.mesh.size,
        run.mesh.devices.flat[0].device_kind,
        peak,
        peak_says,
    )
    writer = MetricWriter(
        run.workdir,
        start_step=start_step,
        evaluation_left=evaluation_left,
        tensorboard=run.config.log.tensorboard,
        wandb=run.config.log.wandb,
        config=run.config.to_dict(),
    )
    processes.barrier("metrics.jsonl is cut")  # before another process reads it
    return writer


@contextlib.contextmanager
def begun(config: ConfigDict, workdir: Path, stop: Stop | None = None) -> Iterator[Session]:
    """One process's life of the run: no other run has the workdir meanwhile; at the end it is said where the time went.

    Raises:
      Locked: another run has it.
      NotSaved: its disk is full, read-only or broken.
    """
    try:
        with held(workdir):
            if processes.is_main():
                remove_partials(workdir)
            ledger = Ledger(workdir / "goodput.jsonl" if processes.is_main() else None)
            watchdog = Watchdog(config.guards.watchdog_seconds, workdir)
            try:
                yield Session(stop or Stop(), watchdog, ledger)
            finally:
                with contextlib.suppress(
                    OSError
                ):  # on a full disk that is not what one wants to know
                    log.info("%s", ledger.close())
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError):
            files = [place for place in (workdir, *workdir.parents) if place.is_file()]
            if files:
                raise NotADirectoryError(
                    f"found: {files[0]} is a file; expected: --workdir=FOLDER, of a new run or of one to go on with"
                ) from error
        if error.errno not in DISK_ERRORS:
            raise
        raise NotSaved(
            f"{error}: make room or mend the disk, and start the same command again"
        ) from error


def train(
    run: build.Run,
    state: TrainState,
    store: Checkpoints,
    writer: MetricWriter,
    session: Session,
    profile_steps: str = "",
    **hooks: Any,
) -> TrainState:
    """The loop with all that follows from the run. hooks: its further fields (evaluate, is_over, resumed).

    profile_steps: 'FIRST:LAST' of the steps to trace into `workdir/profile`, '' for none.

    Raises:
      Stopped: a signal asked for it; what was done is saved.
    """
    config, steps = run.config, parse_steps(profile_steps)
    start_step, train_step = int(state.step), run.train_step
    if every := config.guards.self_check_every_steps:
        train_step = SelfCheck(train_step, every, start_step, session.ledger.spend)
    session.leaves_evaluation = not store.best_metric
    loop = Loop(
        train_step=train_step,
        num_train_steps=config.num_train_steps,
        intervals=Intervals(
            config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps
        ),
        work=Work(run.step_tokens, run.step_flops, run.peak[0]),
        checkpoints=store,
        writer=writer,
        describe=lambda step: {
            f"epochs/{name}": value for name, value in run.epochs_seen(step).items()
        },
        manifest=lambda step: manifest(run, step),
        progress=config.log.progress and processes.is_main(),
        profile=Profile(*steps, run.workdir / "profile") if steps and processes.is_main() else None,
        bad_steps=BadSteps(config.guards.max_bad_steps, hooks["resumed"].bad_steps),
        session=session,
        **hooks,
    )
    state = loop.fit(state, run.device_batches(start_step))
    if session.stop.asked:
        raise Stopped(
            f"stopped by {session.stop.asked} after step {int(state.step)} of {config.num_train_steps}, which is saved; the "
            "same command goes on"
        )
    return state


def manifest(run: build.Run, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself, besides its arrays."""
    config = json.loads(run.config.to_json())
    return {
        "step": step,
        "tokens_seen": round(step * run.step_tokens),
        "config": config,
        "config_sha256": sealed.digest(config),
        "tokenizer_sha256": run.tokenizer.sha256,
        "data": run.data_fingerprint,
        "dtype": run.model.config.dtype,
        "rewinds": as_json(run.rewinds),
        "mesh": dict(run.mesh.shape),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """The versions of what a run's numbers depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def git_revision() -> str | None:
    """The commit of the clone that runs; None where there is no clone, or no git."""
    if not (config_files.HOME / ".git").exists() or shutil.which("git") is None:
        return None
    ask = ["git", "-C", str(config_files.HOME), "rev-parse", "HEAD"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip() or None


def write_environment(workdir: Path, run: build.Run, peak_says: str) -> None:
    """environment.json: what one needs to know to run this again."""
    content = {
        "python": platform.python_version(),
        "packages": package_versions(),
        "git_revision": git_revision(),
        "devices": [str(d) for d in jax.devices()],
        "processes": jax.process_count(),
        "mesh": dict(run.mesh.shape),
        "parameters": run.num_params,
        "dtype": run.model.config.dtype,
        "mfu_peak": peak_says,
    }
    write_text(workdir / "environment.json", json.dumps(content, indent=2) + "\n")
