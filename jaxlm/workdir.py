"""A run and its workdir, alike for pretraining and fine-tuning: what it writes about itself (config.json,
environment.json, checkpoint manifests), where it goes on, and the loop over it.
"""

import importlib.metadata
import json
import logging
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm.files import write_text
from jaxlm.flags import define_config_flag, define_process_flags
from jaxlm.parallel import processes
from jaxlm.training.checkpoints import Checkpoints, find_step, read_manifest, restore_state
from jaxlm.training.guards import BadSteps
from jaxlm.training.loop import Intervals, Work, fit
from jaxlm.training.metrics import MetricSums, MetricWriter
from jaxlm.training.profile import Profile, parse_steps
from jaxlm.training.state import TrainState

log = logging.getLogger("jaxlm")


def accept_config(config: ConfigDict, workdir: Path, allow_change: bool) -> None:
    """Writes config.json; on a resume, refuses a config that would make it another run.

    Of several processes the first one writes; the others refuse another config than that, and a folder of their own.
    """
    path = workdir / "config.json"
    if path.exists():
        identity, execution = build.config_changes(build.saved_config(path), config)
        for line in execution:
            log.info("config changed since this run began: %s", line)
        if identity and not allow_change:
            raise ValueError(
                f"{workdir} holds a run with another config:\n"
                + "\n".join(f"  {line}" for line in identity)
                + "\nTake another --workdir, undo the change, or pass --allow_config_change."
            )
    processes.barrier("config.json is read")
    if processes.is_main():
        build.write_config(config, path)
    processes.barrier("config.json is written")
    refuse_another_config(config, path)


def refuse_another_config(config: ConfigDict, path: Path) -> None:
    """Raises if config.json is not there, or says something else."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there although process 0 has written it: --workdir must be on a disk or bucket that all "
            "processes share"
        )
    differing = [
        line for lines in build.config_changes(build.saved_config(path), config) for line in lines
    ]
    if differing:
        raise ValueError(
            "this process has another config than process 0 (its value -> this one's):\n"
            + "\n".join(f"  {line}" for line in differing)
            + "\nStart all processes with the same flags."
        )


def start_or_resume(
    run: build.Run, store: Checkpoints, start: Callable[[], TrainState]
) -> tuple[TrainState, MetricSums | None]:
    """(state, open log window) of the newest checkpoint; what `start` makes, and None, where there is none."""
    processes.meet(run.mesh)
    latest = store.latest_step()
    if latest is None:
        return start(), None
    step_dir = find_step(run.workdir, latest)
    state = restore_state(step_dir, run.state_shape)
    log.info("resumed from step %d", latest)
    return state, MetricSums(read_manifest(step_dir)["window"])


def open_writer(run: build.Run, start_step: int) -> MetricWriter:
    """Writes environment.json, says how large the run is, and opens its metrics."""
    peak, peak_says = run.peak
    if processes.is_main():
        write_environment(run.workdir, run, peak_says)
    log.info(
        "%s parameters on %d devices; MFU divides by %.3g FLOP/s (%s)",
        f"{run.num_params:,}",
        run.mesh.size,
        peak,
        peak_says,
    )
    writer = MetricWriter(
        run.workdir,
        start_step=start_step,
        tensorboard=run.config.log.tensorboard,
        wandb=run.config.log.wandb,
        config=run.config.to_dict(),
    )
    processes.barrier("metrics.jsonl is cut")  # before another process reads it
    return writer


def train(
    run: build.Run,
    state: TrainState,
    store: Checkpoints,
    writer: MetricWriter,
    profile_steps: str = "",
    **hooks: Any,
) -> TrainState:
    """`fit` with all that follows from the run. hooks: its further arguments (evaluate, callbacks, window, …).

    profile_steps: 'FIRST:LAST' of the steps to trace into `workdir/profile`, '' for none.
    """
    config, steps = run.config, parse_steps(profile_steps)
    return fit(
        state,
        train_step=run.train_step,
        batches=run.device_batches(int(state.step)),
        num_train_steps=config.num_train_steps,
        intervals=Intervals(
            config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps
        ),
        work=Work(run.step_tokens, run.step_flops, run.peak[0]),
        checkpoints=store,
        writer=writer,
        describe=lambda step: {
            f"epochs/{name}": value for name, value in run.train_batches.epochs_seen(step).items()
        },
        manifest=lambda step: manifest(run, step),
        progress=config.log.progress and processes.is_main(),
        profile=Profile(*steps, run.workdir / "profile") if steps and processes.is_main() else None,
        bad_steps=BadSteps(config.guards.max_bad_steps),
        **hooks,
    )


def manifest(run: build.Run, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    return {
        "step": step,
        "tokens_seen": round(step * run.step_tokens),
        "config": json.loads(run.config.to_json()),
        "tokenizer_sha256": run.tokenizer.sha256,
        "data": run.data_fingerprint,
    }


def write_environment(workdir: Path, run: build.Run, peak_says: str) -> None:
    """environment.json: what one needs to know to run this again."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    )
    content = {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "git_revision": git.stdout.strip() or None,
        "devices": [str(d) for d in jax.devices()],
        "processes": jax.process_count(),
        "mesh": dict(run.mesh.shape),
        "parameters": run.num_params,
        "dtype": run.model.config.dtype,
        "mfu_peak": peak_says,
    }
    write_text(workdir / "environment.json", json.dumps(content, indent=2) + "\n")


def define_flags() -> None:
    define_config_flag()
    define_process_flags()
    flags.DEFINE_string(
        "workdir", None, "Folder of the run, or gs://…: all that it makes lies there."
    )
    flags.DEFINE_bool(
        "allow_config_change", False, "Resume although fields that define the run have changed."
    )
    flags.DEFINE_string(
        "profile_steps",
        "",
        "FIRST:LAST: traces these steps into W/profile, for xprof (TensorBoard).",
    )
    flags.mark_flags_as_required(["config", "workdir"])
