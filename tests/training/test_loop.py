"""The loop: logs each window once, evaluates before it saves, resumes in the middle of a window."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.training import loop
from jaxlm.training.checkpoints import Checkpoints, find_step, restore_state
from jaxlm.training.metrics import MetricWriter, read_metrics
from jaxlm.training.session import Session
from jaxlm.training.state import new_state
from jaxlm.training.stored import read_manifest

WORK = loop.Work(tokens_per_step=8, flops_per_step=1e3, peak_flops=1e9)


def make_state():
    return new_state({"w": jnp.zeros(2)}, optax.sgd(0.1))


@jax.jit
def train_step(state, batch):
    """Loss of step s is s + 1 over a weight of batch; a negative batch is a step without finite loss."""
    finite = batch >= 0
    loss = jnp.where(finite, (state.step + 1.0) * batch, jnp.nan)
    params = jax.tree.map(lambda w: w + batch, state.params)
    metrics = {
        "loss": (loss, jnp.float32(batch)),
        "learning_rate": (0.5, 1.0),
        "skipped": (1.0 - finite, 1.0),
    }
    return state.replace(step=state.step + 1, params=params), metrics


def run(tmp_path, *, steps, state=None, batches=None, save_every=3, step=train_step, **options):
    state = make_state() if state is None else state
    writer = MetricWriter(tmp_path, start_step=int(state.step), tensorboard=False)
    checkpoints = Checkpoints(tmp_path, keep_last=10)
    batches = itertools.islice(batches or itertools.repeat(jnp.float32(2)), int(state.step), None)
    try:
        return loop.Loop(
            train_step=step,
            num_train_steps=steps,
            intervals=loop.Intervals(log=4, evaluate=5, checkpoint=save_every),
            work=WORK,
            checkpoints=checkpoints,
            writer=writer,
            progress=False,
            **options,
        ).fit(state, batches)
    finally:
        writer.close()
        checkpoints.close()


def train_lines(tmp_path):
    return [(m["step"], m["loss"]) for m in read_metrics(tmp_path) if m["split"] == "train"]


def test_each_window_is_logged_once_as_its_mean(tmp_path):
    state = run(tmp_path, steps=10)
    assert int(state.step) == 10
    assert train_lines(tmp_path) == [(4, 2.5), (8, 6.5), (10, 9.5)]


def test_the_first_line_says_how_long_a_step_takes_without_the_compilation(tmp_path):
    def compile_first(state, batch):
        if int(state.step) == 0:
            time.sleep(1.0)
        return train_step(state, batch)

    run(tmp_path, steps=8, step=compile_first)
    first = next(line for line in read_metrics(tmp_path) if line["split"] == "train")
    assert first["step"] == 4 and first["step_seconds"] < 0.25


def check_resumed_log(tmp_path, read_open):
    """A run that stops between two log lines and resumes writes the lines of the unbroken run."""
    run(tmp_path / "whole", steps=10)
    run(tmp_path / "broken", steps=7)
    step_dir = find_step(tmp_path / "broken", 6)
    state = restore_state(step_dir, jax.eval_shape(make_state))
    run(tmp_path / "again", steps=10, state=state, resumed=read_open(step_dir))
    expected = [line for line in train_lines(tmp_path / "whole") if line[0] > 6]
    assert train_lines(tmp_path / "again") == expected


def test_a_resumed_run_logs_what_the_unbroken_run_logs(tmp_path):
    check_resumed_log(tmp_path, lambda step_dir: loop.Resumed.of(read_manifest(step_dir)))


def test_the_resume_law_fails_without_the_saved_window(tmp_path):
    with pytest.raises(AssertionError):
        check_resumed_log(tmp_path, lambda step_dir: loop.Resumed())


def test_evaluation_comes_before_the_checkpoint_and_after_the_step(tmp_path):
    seen = []

    def evaluate(state, step):
        assert int(state.step) == step
        seen.append(step)
        return state.replace(skipped=state.skipped + 100), {"loss": 1.0}

    run(tmp_path, steps=10, save_every=5, evaluate=evaluate)
    assert seen == [5, 10]
    restored = restore_state(find_step(tmp_path, 5), jax.eval_shape(make_state))
    assert int(restored.skipped) == 100  # what the evaluation changed is in the checkpoint


def test_a_step_without_finite_loss_leaves_the_mean_of_the_others(tmp_path):
    batches = [jnp.float32(x) for x in (2, -1, 2, 2)]
    run(tmp_path, steps=4, batches=batches, save_every=0)
    ((_, loss),) = train_lines(tmp_path)
    assert loss == pytest.approx((1 + 3 + 4) / 3)
    (line,) = (m for m in read_metrics(tmp_path) if m["split"] == "train")
    assert line["skipped"] == 0.25


def test_a_run_that_only_makes_nan_stops_with_advice(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite in 20 steps in a row.*learning_rate"):
        run(tmp_path, steps=50, batches=itertools.repeat(jnp.float32(-1)), save_every=0)


def test_nothing_is_done_when_the_run_is_complete(tmp_path):
    state = run(tmp_path, steps=4)
    again = run(tmp_path, steps=4, state=state)
    np.testing.assert_array_equal(again.params["w"], state.params["w"])


def check_left_evaluation(tmp_path, read_open):
    """A stop that is asked for in the midst of an evaluation: it is made where the run goes on, so that both logs are equal."""

    def evaluate(session):
        def run_batches(state, step):
            for _ in range(4):
                session.did_batch()
            return state.replace(skipped=state.skipped + 1), {"loss": float(state.params["w"][0])}

        return run_batches

    session = Session()
    run(tmp_path / "whole", steps=10, evaluate=evaluate(session), session=session)

    session = Session()
    did_batch, seen = session.did_batch, []

    def interrupted():
        seen.append(1)
        if len(seen) == 2:
            session.stop.agree("SIGTERM")
        did_batch()

    session.did_batch = interrupted
    state = run(tmp_path / "broken", steps=10, evaluate=evaluate(session), session=session)
    assert int(state.step) == 5 and len(seen) == 2
    assert not [line for line in read_metrics(tmp_path / "broken") if line["split"] == "eval"]

    step_dir, session = find_step(tmp_path / "broken"), Session()
    state = restore_state(step_dir, jax.eval_shape(make_state))
    resumed = read_open(step_dir)
    state = run(
        tmp_path / "broken",
        steps=10,
        state=state,
        resumed=resumed,
        evaluate=evaluate(session),
        session=session,
    )
    assert int(state.skipped) == 2
    evaluations = [
        [
            (line["step"], line["loss"])
            for line in read_metrics(tmp_path / name)
            if line["split"] == "eval"
        ]
        for name in ("whole", "broken")
    ]
    assert evaluations[0] == evaluations[1]
    assert train_lines(tmp_path / "broken") == train_lines(tmp_path / "whole")


def test_an_evaluation_that_a_stop_leaves_is_made_by_the_resumed_run(tmp_path):
    check_left_evaluation(tmp_path, lambda step_dir: loop.Resumed.of(read_manifest(step_dir)))


def test_the_law_of_left_evaluations_fails_if_nobody_knows_of_them(tmp_path):
    def forgetful(step_dir):
        return loop.Resumed.of(read_manifest(step_dir) | {"evaluation_left": False})

    with pytest.raises(AssertionError):
        check_left_evaluation(tmp_path, forgetful)


def test_an_evaluation_that_decides_which_checkpoint_is_best_is_not_left(tmp_path):
    session = Session(leaves_evaluation=False)

    def evaluate(state, step):
        session.stop.agree("SIGTERM")
        session.did_batch()
        session.did_batch()
        return state, {"loss": 1.0}

    state = run(tmp_path, steps=10, evaluate=evaluate, session=session)
    assert int(state.step) == 5
    assert [line["step"] for line in read_metrics(tmp_path) if line["split"] == "eval"] == [5]
    assert not read_manifest(find_step(tmp_path))["evaluation_left"]
