"""A gradient that is fifty times as large as usual: a model that has learned documents of one letter meets a batch of text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import build
from jaxlm.parallel.mesh import make_mesh
from jaxlm.training.checkpoints import Checkpoints, find_step, restore_state
from tests.faults.bad_data import kept, make_config, same

SPIKE, WINDOW, FACTOR = 61, 16, 20.0


def check_spikes(run, times):
    """Steps whose gradient is over FACTOR times the median of those before change nothing and are counted, all others train;
    and that of step SPIKE is over `times` the median."""
    state, norms, spikes = run.init_state(), [], []
    batches = run.device_batches(0)
    for step in range(1, SPIKE + 4):
        before, usual = kept(state), np.median(norms[-WINDOW:]) if norms else np.nan
        state, metrics = run.train_step(state, next(batches))
        norms.append(float(metrics["grad_norm"][0]))
        spikes += [step] if step > WINDOW and norms[-1] > FACTOR * usual else []
        if step == SPIKE:
            assert norms[-1] > times * usual, f"seed {run.config.seed}: {norms}"
        untouched = same(before, kept(state))
        assert untouched == (step in spikes), f"seed {run.config.seed}, step {step}: {norms}"
    assert (int(state.spikes.skipped), int(state.skipped)) == (len(spikes), 0)
    assert int(state.spikes.seen) == len(norms)


def spiking_run(stores, folder, devices, **overrides):
    """A model that has learned documents of one letter, and meets one batch of text."""
    config = make_config(
        stores[::-1],  # letters, but for one step
        [(SPIKE, SPIKE + 1)],
        objective__name="causal",
        optimizer__learning_rate=3e-2,
        guards__spike_factor=FACTOR,
        guards__spike_window=WINDOW,
        num_train_steps=100,
        **overrides,
    )
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:devices])
    return build.make_run(config, folder, mesh=mesh)


VARIANTS = {
    "one device": (1, {}),
    "eight devices, state sharded": (8, {"mesh__fsdp": 4}),
    "four micro-batches": (2, {"accumulation_steps": 4}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_of_fifty_times_the_usual_norm_is_left_out(stores, tmp_path, variant):
    devices, overrides = VARIANTS[variant]
    check_spikes(spiking_run(stores, tmp_path / "run", devices, **overrides), times=50)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("variant", VARIANTS)
def test_spikes_are_left_out_whatever_the_seed(stores, tmp_path, variant, seed):
    devices, overrides = VARIANTS[variant]
    run = spiking_run(stores, tmp_path / "run", devices, seed=seed, **overrides)
    check_spikes(run, times=FACTOR)


def test_the_law_of_spikes_fails_for_a_guard_that_finds_none(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.training.spikes.is_spike", lambda *_: jnp.zeros((), bool))
    with pytest.raises(AssertionError, match=f"step {SPIKE}"):
        check_spikes(spiking_run(stores, tmp_path / "run", 1), times=50)


def check_resume_finds_the_spike(run, restore):
    """A run that goes on from a checkpoint within the window of the spike ends, bit by bit, as the one that was not stopped."""

    def go_on(state, stop):
        batches = run.device_batches(int(state.step))
        for _ in range(int(state.step), stop):
            state, _ = run.train_step(state, next(batches))
        return state

    state, store = go_on(run.init_state(), SPIKE - 5), Checkpoints(run.workdir)
    store.save(SPIKE - 5, state, {"step": SPIKE - 5}, None)
    store.close()
    unbroken = go_on(state, SPIKE + 3)
    resumed = go_on(restore(find_step(run.workdir), run.state_shape), SPIKE + 3)
    assert int(unbroken.spikes.skipped) == 1
    assert same(jax.device_get(unbroken), jax.device_get(resumed))


def test_a_resumed_run_finds_the_spike_that_the_unbroken_one_finds(stores, tmp_path):
    check_resume_finds_the_spike(spiking_run(stores, tmp_path / "run", 1), restore_state)


def test_the_resume_law_fails_for_a_window_that_begins_anew(stores, tmp_path):
    def forgets(step_dir, shape):
        state = restore_state(step_dir, shape)
        return state.replace(spikes=jax.tree.map(jnp.zeros_like, state.spikes))

    with pytest.raises(AssertionError):
        check_resume_finds_the_spike(spiking_run(stores, tmp_path / "run", 1), forgets)
