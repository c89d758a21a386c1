"""Schedules and reduce-on-plateau."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.training.schedules import DECAYS, SCHEDULES, Plateau, make_schedule

pytestmark = pytest.mark.core

RATE, WARMUP, STEPS = 0.3, 10, 110
OPTIONS = {
    "constant": {},
    "linear": dict(final_ratio=0.1),
    "cosine": dict(final_ratio=0.1),
    "inverse_sqrt": {},
    "wsd": dict(final_ratio=0.1, cooldown_fraction=0.2, cooldown_shape="one_minus_sqrt"),
}
FINAL = {"constant": 1.0, "inverse_sqrt": np.sqrt(WARMUP / STEPS)}  # 0.1 for the others


def make(name, **changes):
    options = dict(learning_rate=RATE, warmup_steps=WARMUP, num_train_steps=STEPS, **OPTIONS[name])
    return make_schedule(name, **(options | changes))


def rates(schedule, steps=STEPS):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps + 1)))


def check_schedule(schedule, final):
    """Warm-up is linear and never 0, the peak is the learning rate, then it never rises, and ends at `final`."""
    values = rates(schedule)
    expected = RATE * (np.arange(WARMUP) + 1) / WARMUP
    np.testing.assert_allclose(values[:WARMUP], expected, rtol=1e-5)
    np.testing.assert_allclose(values[WARMUP], RATE, rtol=1e-6)
    assert np.all(np.diff(values[WARMUP:]) <= 1e-7)
    np.testing.assert_allclose(values[STEPS], RATE * final, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_warms_up_and_falls_to_its_final_rate(name):
    check_schedule(make(name), FINAL.get(name, 0.1))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda step: make("cosine", warmup_steps=0)(step),
        lambda step: make("cosine")(step + 1),
        lambda step: make("cosine", num_train_steps=STEPS // 2)(step) * (step < 60),
    ],
)
def test_a_wrong_schedule_breaks_that_law(wrong):
    with pytest.raises(AssertionError):
        check_schedule(wrong, 0.1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_rate_is_the_full_one(name):
    values = rates(make(name, warmup_steps=0))
    np.testing.assert_allclose(values[0], RATE, rtol=1e-6)
    assert np.all(np.isfinite(values))


def test_linear_and_cosine_are_half_way_down_in_the_middle():
    for name in ("linear", "cosine"):
        middle = make(name, final_ratio=0.0)(WARMUP + (STEPS - WARMUP) // 2)
        np.testing.assert_allclose(middle, RATE / 2, rtol=1e-5)


@pytest.mark.parametrize("shape", DECAYS)
def test_wsd_is_stable_until_its_cooldown(shape):
    values = rates(make("wsd", cooldown_shape=shape))
    start = STEPS - STEPS // 5
    np.testing.assert_allclose(values[WARMUP : start + 1], RATE, rtol=1e-6)
    assert np.all(np.diff(values[start:]) < 0)


def test_a_longer_wsd_run_has_the_same_stable_part():
    """So a cooldown can be forked from any step of it."""
    longer = rates(make("wsd", num_train_steps=2 * STEPS), STEPS)
    stable = STEPS - STEPS // 5
    np.testing.assert_array_equal(longer[:stable], rates(make("wsd"))[:stable])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_is_a_float32_scalar_inside_a_compiled_step(name):
    rate = jax.jit(make(name))(jnp.int32(3))
    assert rate.shape == () and rate.dtype == jnp.float32


def test_wrong_options_are_all_listed():
    with pytest.raises(ValueError) as error:
        make_schedule(
            "wsd",
            learning_rate=1.0,
            warmup_steps=-1,
            num_train_steps=10,
            final_ratio=2.0,
            cooldown_shape="square",
            power=2,
        )
    for word in (
        "cooldown_fraction is missing",
        "power=2",
        "final_ratio",
        "square",
        "warmup_steps",
    ):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="constant, linear, cosine, inverse_sqrt, wsd"):
        make_schedule("step", learning_rate=1.0, warmup_steps=0, num_train_steps=10)


# --- plateau ----------------------------------------------------------------------------------------------------------

PLATEAU = Plateau(patience=2, factor=0.5, rtol=0.01, min_scale=0.2)


def check_plateau(update):
    """The scale halves at each second evaluation in a row that is not at least 1% better, down to 0.2."""
    state, scales = PLATEAU.init(), []
    assert state.scale == 1
    losses = [3.0, 2.0, 1.999, 1.0, 1.0, 1.5, float("nan"), 1.0, 2.0, 2.0, 0.5, 0.5]
    for loss in losses:
        state = update(state, loss)
        scales.append(float(state.scale))
    np.testing.assert_allclose(scales, [1, 1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2])


def test_the_scale_falls_after_patience_evaluations_without_improvement():
    check_plateau(jax.jit(PLATEAU.update))


def test_another_patience_breaks_that_law():
    wrong = Plateau(patience=1, factor=0.5, rtol=0.01, min_scale=0.2)
    with pytest.raises(AssertionError):
        check_plateau(wrong.update)


def test_a_plateau_goes_on_from_its_saved_arrays():
    """Written out as plain numpy arrays and read back in the middle, as a checkpoint does."""

    def through_numpy(state, loss):
        leaves, structure = jax.tree.flatten(state)
        assert all(np.shape(leaf) == () for leaf in leaves)
        saved = [np.asarray(leaf).tobytes() for leaf in leaves]
        read = [np.frombuffer(s, leaf.dtype)[0] for s, leaf in zip(saved, leaves, strict=True)]
        return PLATEAU.update(jax.tree.unflatten(structure, read), loss)

    check_plateau(through_numpy)
