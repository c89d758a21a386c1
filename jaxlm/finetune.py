"""Fine-tunes a pretrained model for a task: `python -m jaxlm.finetune --config=configs/finetune/classification.py:train=my.csv
--config.init_from=W --workdir=F`, where W is a pretraining run or hf:FOLDER_OR_HUB_ID.

The same command again goes on from the newest checkpoint. At the end the best checkpoint is evaluated on the development
file and on the test file, if there is one. Read `finetune` from top to bottom.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from absl import app
from absl import flags as absl_flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from jaxlm import reports, tuning
from jaxlm.compiled import keep_compiled_programs
from jaxlm.files import as_path
from jaxlm.flags import process_options
from jaxlm.host import keep_freed_memory
from jaxlm.parallel import processes
from jaxlm.training import checkpoints as checkpointing
from jaxlm.training.metrics import read_metrics
from jaxlm.training.plots import plot_run
from jaxlm.workdir import accept_config, define_flags, open_writer, start_or_resume, train

log = logging.getLogger("jaxlm")


def finetune(
    config: ConfigDict,
    workdir: Path,
    *,
    allow_config_change: bool = False,
    profile_steps: str = "",
) -> dict[str, Any]:
    """Trains for `config.num_epochs`, or until the best metric stands still, and returns what report.json says."""
    with processes.main_first("data"):
        prepared = tuning.prepare(config, workdir)
    config = prepared.config
    accept_config(config, workdir, allow_config_change)
    with processes.main_first("run"):
        run = tuning.make_run(prepared, workdir)
    tuning.add_reference(run, prepared.source)
    best = {name: config.checkpoint[name] for name in ("best_metric", "best_mode")}
    store = checkpointing.Checkpoints(workdir, **config.checkpoint)
    state, window = start_or_resume(run, store, lambda: tuning.initial_state(run, prepared.source))
    writer = open_writer(run, int(state.step))
    stopping = EarlyStopping(config.patience, **best)
    for line in read_metrics(workdir):
        if line["split"] == "eval":
            stopping.see(line)

    def evaluate(state, step):
        params, says = run.evaluated_params(state)
        metrics = {"params": says, **run.evaluate(params)}
        stopping.see(metrics)
        return metrics

    if not stopping.is_over:
        train(
            run,
            state,
            store,
            writer,
            evaluate=evaluate,
            should_stop=lambda: stopping.is_over,
            window=window,
            profile_steps=profile_steps,
        )
    best_dir = checkpointing.find_step(workdir, store.best_step())
    store.close()
    writer.close()
    if processes.is_main():
        plot_run(workdir)
    item = checkpointing.evaluated_item(best_dir)
    params = checkpointing.load_item(best_dir, run.param_shapes, item)
    return reports.write_reports(run, params, int(best_dir.name), workdir)


@dataclasses.dataclass
class EarlyStopping:
    """Over when the metric has not become better in `patience` evaluations in a row; patience 0 never is.

    It is a function of the evaluations alone, so a resumed run stops where the unbroken one does.
    """

    patience: int
    best_metric: str
    best_mode: str
    best: float | None = None
    waited: int = 0

    def see(self, metrics) -> None:
        value = metrics[self.best_metric]
        sign = -1 if self.best_mode == "min" else 1
        if self.best is None or sign * value > sign * self.best:
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    @property
    def is_over(self) -> bool:
        return 0 < self.patience <= self.waited


def main(argv):
    del argv
    args = absl_flags.FLAGS
    # Of libraries: Orbax warns of a file that nothing needs.
    absl_logging.set_verbosity(absl_logging.ERROR)
    keep_freed_memory()
    keep_compiled_programs(args.workdir)
    log.setLevel(logging.INFO)
    with processes.joined(**process_options(args)):
        finetune(
            args.config,
            as_path(args.workdir),
            allow_config_change=args.allow_config_change,
            profile_steps=args.profile_steps,
        )


if __name__ == "__main__":
    define_flags()
    app.run(main)
