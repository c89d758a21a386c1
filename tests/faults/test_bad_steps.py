"""Steps whose loss or gradient is not finite, because of their data: left out, counted, and the end of the run."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import build
from jaxlm.exits import DIVERGED, Diverged
from jaxlm.pretrain import pretrain
from jaxlm.training.checkpoints import find_step, restore_state
from tests import tiny
from tests.faults.bad_data import check_dump, kept, make_config, same
from tests.faults.bad_labels import check_lines, tuning_command


def check_bad_steps(run, bad):
    """The steps in `bad` leave parameters, moments and averages bit by bit and are counted; all others train."""
    state, count = run.init_state(), 0
    batches = run.device_batches(0)
    for step in range(1, max(bad) + 3):
        before = kept(state)
        state, metrics = run.train_step(state, next(batches))
        count += step in bad
        says = f"seed {run.config.seed}, step {step}"
        assert float(metrics["skipped"][0]) == (step in bad), says
        assert same(before, kept(state)) == (step in bad), says
        assert int(state.skipped) == count and int(state.step) == step
        assert np.isfinite(metrics["loss"][0]) == (step not in bad), says
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept(state)))


SPANS = [(3, 4), (6, 9)]  # one bad step, and three in a row
BAD = {3, 6, 7, 8}


@pytest.fixture
def bad_run(stores, per_spread, tmp_path):
    return build.make_run(make_config(stores, SPANS, ema_decay=0.9), tmp_path / "run")


def test_one_bad_step_and_three_in_a_row_leave_the_state_and_training_goes_on(bad_run):
    check_bad_steps(bad_run, BAD)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.smoke), *range(1, 30)])
def test_any_steps_may_be_bad(stores, per_spread, tmp_path, seed):
    rng = random.Random(seed)
    bad = set(rng.sample(range(1, 15), rng.randint(1, 10)))
    spans = [(step, step + 1) for step in sorted(bad)]
    config = make_config(stores, spans, ema_decay=0.9, seed=seed, num_train_steps=20)
    check_bad_steps(build.make_run(config, tmp_path / "run"), bad)


def test_the_law_of_bad_steps_fails_for_a_step_that_takes_every_gradient(bad_run, monkeypatch):
    monkeypatch.setattr("jaxlm.training.step.jnp.isfinite", lambda x: jnp.ones((), bool))
    with pytest.raises(AssertionError):
        check_bad_steps(bad_run, BAD)


def test_a_run_ends_at_ten_bad_steps_in_a_row_also_over_a_resume_and_leaves_what_made_them(
    stores, per_spread, tmp_path
):
    config = make_config(stores, [(4, 100)], num_train_steps=8, checkpoint_every_steps=3)
    workdir = tmp_path / "run"
    pretrain(config, workdir)  # ends, and is saved, among the bad steps
    config.num_train_steps = 100
    with pytest.raises(Diverged, match="10 steps in a row, up to step 13.*bad_steps/4-3") as error:
        pretrain(config, workdir)
    assert error.value.status == DIVERGED
    check_dump(workdir, first=4, count=10, source="letters")
    evaluated = restore_state(find_step(workdir, 12), build.make_run(config, workdir).state_shape)
    before = restore_state(find_step(workdir, 3), build.make_run(config, workdir).state_shape)
    assert same(kept(before), kept(evaluated)) and int(evaluated.skipped) == 9
    documents = workdir / "bad_steps" / "4-3" / "documents.json"
    said = json.loads(documents.read_text())
    said[0]["rows"] = said[1]["rows"]  # of the batch after it
    documents.write_text(json.dumps(said))
    with pytest.raises(AssertionError):  # the law, of another step's rows
        check_dump(workdir, first=4, count=10, source="letters")


def test_fine_tuning_on_labels_that_no_float_can_square_ends_with_its_status_and_names_their_lines(
    stores, tmp_path
):
    bad_rows = set(range(40, 80))
    command = tuning_command(stores[0], tmp_path, bad_rows)
    result = tiny.run(command, check=False)
    assert result.returncode == DIVERGED, result.stderr[-4000:]
    assert "3 steps in a row" in result.stderr and "Traceback" not in result.stderr
    (folder,) = (tmp_path / "run" / "bad_steps").iterdir()
    check_lines(folder, bad_rows, count=3)
    with pytest.raises(AssertionError):
        check_lines(folder, set(range(40)), count=3)
