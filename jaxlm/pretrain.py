"""Pretrains a language model: `python -m jaxlm.pretrain --config=configs/gpt.py:tiny --workdir=W`.

The same command again goes on from the newest checkpoint. Started by srun, mpirun, xpk and so on, the processes of a run
find one another (jaxlm/parallel/launchers.py). Read `main` from top to bottom.
"""

import logging
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm.compiled import keep_compiled_programs
from jaxlm.files import as_path
from jaxlm.flags import process_options
from jaxlm.host import keep_freed_memory
from jaxlm.inference.samples import make_sampler
from jaxlm.parallel import processes
from jaxlm.training import checkpoints as checkpointing
from jaxlm.training.metrics import drop_after
from jaxlm.training.plots import plot_run
from jaxlm.workdir import accept_config, define_flags, open_writer, start_or_resume, train

log = logging.getLogger("jaxlm")


def pretrain(
    config: ConfigDict,
    workdir: Path,
    *,
    allow_config_change: bool = False,
    profile_steps: str = "",
) -> dict[str, float]:
    """Trains to `config.num_train_steps` and returns the last held-out metrics."""
    workdir.mkdir(parents=True, exist_ok=True)
    accept_config(config, workdir, allow_config_change)
    with processes.main_first("data"):
        run = build.make_run(config, workdir)
    store = checkpointing.Checkpoints(workdir, **config.checkpoint)
    state, window = start_or_resume(run, store, lambda: build.initial_state(run))
    start_step = int(state.step)
    writer = open_writer(run, start_step)
    if processes.is_main():
        drop_after(workdir / "samples.jsonl", start_step)
    last_eval: dict[str, Any] = {}

    def evaluate(state, step):
        params, says = run.evaluated_params(state)
        metrics = run.evaluate(params)
        last_eval.update(metrics)
        return {"params": says, **metrics}

    def on_evaluation(state, metrics):
        return run.update_plateau(state, metrics["loss"]) if run.plateau else state

    train(
        run,
        state,
        store,
        writer,
        evaluate=evaluate,
        on_evaluation=on_evaluation,
        callbacks=[make_sampler(run, writer)],
        window=window,
        profile_steps=profile_steps,
    )
    store.close()
    writer.close()
    if processes.is_main():
        plot_run(workdir)
    return last_eval


def main(argv):
    del argv
    args = flags.FLAGS
    absl_logging.set_verbosity(absl_logging.WARNING)  # of libraries: Orbax writes dozens of lines
    keep_freed_memory()
    keep_compiled_programs(args.workdir)
    log.setLevel(logging.INFO)
    with processes.joined(**process_options(args)):
        pretrain(
            args.config,
            as_path(args.workdir),
            allow_config_change=args.allow_config_change,
            profile_steps=args.profile_steps,
        )


if __name__ == "__main__":
    define_flags()
    app.run(main)
