"""Pretrains a language model: `python -m jaxlm.pretrain --config=configs/gpt.py:tiny --workdir=W`.

The same command again goes on from the newest checkpoint. Read `main` from top to bottom.
"""

import logging
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm.host import keep_freed_memory
from jaxlm.inference.samples import make_sampler
from jaxlm.training import checkpoints as checkpointing
from jaxlm.training.loop import Intervals, Work, fit
from jaxlm.training.metrics import MetricSums, MetricWriter, drop_after
from jaxlm.training.plots import plot_run
from jaxlm.workdir import accept_config, define_flags, manifest, write_environment

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
        params, says = run.evaluated_params(state)
        metrics = run.evaluate(params)
        last_eval.update(metrics)
        return {"params": says, **metrics}

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
        work=Work(run.step_tokens, run.step_flops, peak),
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
