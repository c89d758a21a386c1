"""Fine-tunes a pretrained model for a task: `python -m jaxlm.finetune --config=configs/finetune/classification.py:train=my.csv
--config.init_from=W --workdir=F`, where W is a pretraining run or hf:FOLDER_OR_HUB_ID.

The same command again goes on from the newest checkpoint. At the end the best checkpoint is evaluated on the development
file and on the test file, if there is one. Read `finetune` from top to bottom.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxlm import reports, tuning
from jaxlm.config_checks import need_kind
from jaxlm.entrypoint import launch
from jaxlm.parallel import processes
from jaxlm.rewind import until_done
from jaxlm.training import checkpoints as checkpointing
from jaxlm.training.metrics import read_metrics
from jaxlm.training.plots import plot_run
from jaxlm.training.session import Session
from jaxlm.training.stopping import Stop
from jaxlm.workdir import accept_config, accept_data, begun, note_recipe, opened, train


def finetune(
    config: ConfigDict,
    workdir: Path,
    *,
    recipe: str = "",
    allow_config_change: bool = False,
    profile_steps: str = "",
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Trains for `config.num_epochs`, or until the best metric stands still, and returns what report.json says.

    recipe: what `config` was made of ('configs/gpt.py:tiny'), for the run's page (`jaxlm.page`); '' where nobody knows.

    Raises:
      RunError: where the run ends before; see `exits`. stop: what asks for that.
    """
    need_kind(config, "jaxlm.finetune")
    with begun(config, workdir, stop) as session:
        with processes.main_first("data"):
            prepared = tuning.prepare(config, workdir)
        config = prepared.config
        accept_config(config, workdir, allow_config_change)
        with processes.main_first("run"):
            run = tuning.make_run(prepared, workdir)
        accept_data(run, allow_config_change)
        note_recipe(recipe, workdir)
        tuning.add_reference(run, prepared.source)
        best_dir = until_done(run, lambda: attempt(run, prepared.source, session, profile_steps))
        if processes.is_main():
            plot_run(workdir)
        item = checkpointing.evaluated_item(best_dir)
        params = checkpointing.load_item(best_dir, run.param_shapes, item)
        return reports.write_reports(run, params, int(best_dir.name), workdir)


def attempt(
    run: tuning.TaskRun, source: tuning.Source, session: Session, profile_steps: str
) -> Path:
    """Trains from the newest checkpoint on, if there is one, and returns the folder of the best."""
    config = run.config
    start = lambda: tuning.initial_state(run, source)
    with opened(run, session, start) as (store, writer, state, resumed):
        best = {name: config.checkpoint[name] for name in ("best_metric", "best_mode")}
        stopping = EarlyStopping(config.patience, **best)
        for line in read_metrics(run.workdir):
            if line["split"] == "eval":
                stopping.see(line)

        def evaluate(state, step):
            params, says = run.evaluated_params(state)
            metrics = {"params": says, **run.evaluate(params, session.did_batch)}
            stopping.see(metrics)
            return state, metrics

        if not stopping.is_over:
            train(
                run,
                state,
                store,
                writer,
                session,
                profile_steps,
                evaluate=evaluate,
                is_over=lambda: stopping.is_over,
                resumed=resumed,
            )
        return checkpointing.find_step(run.workdir, store.best_step())


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
        """Takes the metrics of an evaluation; a ValueError if they lack the one that decides."""
        if self.best_metric not in metrics:
            raise ValueError(
                f"checkpoint.best_metric {self.best_metric!r} is not among what evaluation gives, {sorted(metrics)}"
            )
        value = metrics[self.best_metric]
        sign = -1 if self.best_mode == "min" else 1
        if self.best is None or sign * value > sign * self.best:
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    @property
    def is_over(self) -> bool:
        """Whether as many evaluations as `patience` says brought nothing better."""
        return 0 < self.patience <= self.waited


def command() -> None:
    """The console script jaxlm-finetune."""
    launch(finetune, __doc__)


if __name__ == "__main__":
    command()
