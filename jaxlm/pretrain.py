"""Pretrains a language model: `python -m jaxlm.pretrain --config=configs/gpt.py:tiny --workdir=W`.

The same command again goes on from the newest checkpoint. Read `main` from top to bottom.
"""

import importlib.metadata
import json
import logging
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm.flags import define_config_flag
from jaxlm.host import keep_freed_memory
from jaxlm.inference.samples import make_sampler
from jaxlm.training import checkpoints as checkpointing
from jaxlm.training.loop import Intervals, Work, fit
from jaxlm.training.metrics import MetricSums, MetricWriter, drop_after
from jaxlm.training.plots import plot_run

log = logging.getLogger("jaxlm")


def pretrain(
    config: ConfigDict, workdir: Path, *, allow_config_change: bool = False
) -> dict[str, float]:
    """Trains to `config.num_train_steps` and returns the last held-out metrics."""
    workdir.mkdir(parents=True, exist_ok=True)
    accept_config(config, workdir, allow_config_change)
    run = build.make_run(config, workdir)
    store = checkpointing.Checkpoints(workdir, **config.checkpoint)
    latest = store.latest_step()
    window: MetricSums | None = None
    if latest is None:
        state = build.initial_state(run)
    else:
        step_dir = checkpointing.find_step(workdir, latest)
        state = checkpointing.restore_state(step_dir, run.state_shape)
        window = MetricSums(checkpointing.read_manifest(step_dir)["window"])
        log.info("resumed from step %d", latest)
    start_step = int(state.step)

    peak, peak_says = run.peak
    write_environment(workdir, run, peak_says)
    log.info(
        "%s parameters on %d devices; MFU divides by %.3g FLOP/s (%s)",
        f"{run.num_params:,}",
        run.mesh.size,
        peak,
        peak_says,
    )
    writer = MetricWriter(
        workdir,
        start_step=start_step,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        config=config.to_dict(),
    )
    drop_after(workdir / "samples.jsonl", start_step)
    last_eval: dict[str, Any] = {}

    def evaluate(state, step):
        use_ema = state.ema is not None
        metrics = run.evaluate(state.ema if use_ema else state.params)
        last_eval.update(metrics)
        return {"params": "ema" if use_ema else "raw", **metrics}

    def on_evaluation(state, metrics):
        return run.update_plateau(state, metrics["loss"]) if run.plateau else state

    fit(
        state,
        train_step=run.train_step,
        batches=run.device_batches(start_step),
        num_train_steps=config.num_train_steps,
        intervals=Intervals(
            config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps
        ),
        work=Work(config.batch_size * config.seq_len, run.step_flops, peak),
        evaluate=evaluate,
        on_evaluation=on_evaluation,
        callbacks=[make_sampler(run, writer)],
        checkpoints=store,
        writer=writer,
        describe=lambda step: {
            f"epochs/{name}": value for name, value in run.train_batches.epochs_seen(step).items()
        },
        manifest=lambda step: manifest(run, step),
        window=window,
        progress=config.log.progress,
    )
    store.close()
    writer.close()
    plot_run(workdir)
    return last_eval


def accept_config(config: ConfigDict, workdir: Path, allow_change: bool) -> None:
    """Writes config.json; on a resume, refuses a config that would make it another run."""
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
    build.write_config(config, path)


def manifest(run: build.Run, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    return {
        "step": step,
        "tokens_seen": step * run.config.batch_size * run.config.seq_len,
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
        "mesh": dict(run.mesh.shape),
        "parameters": run.num_params,
        "dtype": run.model.config.dtype,
        "mfu_peak": peak_says,
    }
    (workdir / "environment.json").write_text(
        json.dumps(content, indent=2) + "\n", encoding="utf-8"
    )


def define_flags() -> None:
    define_config_flag()
    flags.DEFINE_string("workdir", None, "Folder of the run: everything it makes lies there.")
    flags.DEFINE_bool(
        "allow_config_change", False, "Resume although fields that define the run have changed."
    )
    flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    del argv
    args = flags.FLAGS
    absl_logging.set_verbosity(absl_logging.WARNING)  # of libraries: Orbax writes dozens of lines
    keep_freed_memory()
    log.setLevel(logging.INFO)
    pretrain(args.config, Path(args.workdir), allow_config_change=args.allow_config_change)


if __name__ == "__main__":
    define_flags()
    app.run(main)
