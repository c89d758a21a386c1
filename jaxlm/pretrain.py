"""Pretrains a language model: `python -m jaxlm.pretrain --config=configs/gpt.py:tiny --workdir=W`.

The same command again goes on from the newest checkpoint. Started by srun, mpirun, xpk and so on, the processes of a run
find one another (jaxlm/parallel/launchers.py). Read `pretrain` from top to bottom.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxlm import build
from jaxlm.config_checks import need_kind
from jaxlm.entrypoint import launch
from jaxlm.inference.samples import make_sampler
from jaxlm.parallel import processes
from jaxlm.rewind import until_done
from jaxlm.training.metrics import drop_after
from jaxlm.training.plots import plot_run
from jaxlm.training.session import Session
from jaxlm.training.stopping import Stop
from jaxlm.workdir import accept_config, accept_data, begun, note_recipe, opened, train


def pretrain(
    config: ConfigDict,
    workdir: Path,
    *,
    recipe: str = "",
    allow_config_change: bool = False,
    profile_steps: str = "",
    stop: Stop | None = None,
) -> dict[str, float]:
    """Trains to `config.num_train_steps` and returns the last held-out metrics.

    recipe: what `config` was made of ('configs/gpt.py:tiny'), for the run's page (`jaxlm.page`); '' where nobody knows.

    Raises:
      RunError: where the run ends before; see `exits`. stop: what asks for that.
    """
    need_kind(config, "jaxlm.pretrain")
    with begun(config, workdir, stop) as session:
        accept_config(config, workdir, allow_config_change)
        with processes.main_first("data"):
            run = build.make_run(config, workdir, allow_change=allow_config_change)
        accept_data(run, allow_config_change)
        note_recipe(recipe, workdir)
        metrics = until_done(run, lambda: attempt(run, session, profile_steps))
        if processes.is_main():
            plot_run(workdir)
        return metrics


def attempt(run: build.Run, session: Session, profile_steps: str) -> dict[str, float]:
    """Trains from the newest checkpoint on, if there is one, and returns the last held-out metrics."""
    start = lambda: build.initial_state(run)
    with opened(run, session, start) as (store, writer, state, resumed):
        if processes.is_main():
            samples = run.workdir / "samples.jsonl"
            drop_after(samples, int(state.step), evaluation_left=resumed.evaluation_left)
        sample, last_eval = make_sampler(run, writer), dict[str, Any]()

        def evaluate(state, step):
            params, says = run.evaluated_params(state)
            metrics = run.evaluate(params, session.did_batch)
            last_eval.update(metrics)
            if run.plateau:
                state = run.update_plateau(state, metrics["loss"])
            sample(state, step)
            return state, {"params": says, **metrics}

        train(
            run,
            state,
            store,
            writer,
            session,
            profile_steps,
            evaluate=evaluate,
            resumed=resumed,
        )
        return last_eval


def command() -> None:
    """The console script jaxlm-pretrain."""
    launch(pretrain, __doc__)


if __name__ == "__main__":
    command()
