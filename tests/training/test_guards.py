"""What a run does about itself going wrong: steps without finite numbers, spikes of the gradient, steps computed twice."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import common
from jaxlm import config_checks
from jaxlm.exits import Corrupted, Diverged
from jaxlm.parallel import offload
from jaxlm.parallel.mesh import make_mesh
from jaxlm.training import self_check, spikes
from jaxlm.training.checkpoints import Checkpoints, find_step, restore_state
from jaxlm.training.guards import BadSteps, finite_problems
from jaxlm.training.self_check import SelfCheck
from jaxlm.training.state import new_state
from jaxlm.training.step import make_train_step


def one(loss=1.0, skipped=0.0, param_norm=3.0):
    values = {"loss": loss, "skipped": skipped, "param_norm": param_norm, "learning_rate": 0.1}
    return {name: (np.float32(value), np.float32(1)) for name, value in values.items()}


def see_all(guard, losses, start=1):
    for step, loss in enumerate(losses, start):
        guard.see(step, one(loss, skipped=float(not math.isfinite(loss))))


# --- bad steps --------------------------------------------------------------------------------------------------------


def test_bad_steps_in_a_row_end_a_run_at_the_limit_and_not_before():
    guard = BadSteps(3)
    see_all(guard, [1, math.nan, math.inf, 1, math.nan, math.nan])
    with pytest.raises(Diverged, match="3 steps in a row, up to step 7.*learning_rate") as error:
        guard.see(7, one(math.nan, skipped=1.0))
    assert [record["step"] for record in error.value.bad_steps] == [5, 6, 7]
    assert error.value.bad_steps[0]["loss"] == "nan"  # as JSON has it
    assert error.value.bad_steps[0]["learning_rate"] == pytest.approx(0.1)


def test_a_resume_in_the_middle_of_bad_steps_goes_on_counting():
    guard = BadSteps(3)
    see_all(guard, [1, math.nan, math.nan])
    again = BadSteps(3, guard.row)
    with pytest.raises(Diverged) as error:
        again.see(4, one(math.nan, skipped=1.0))
    assert [record["step"] for record in error.value.bad_steps] == [2, 3, 4]


def test_parameters_that_are_not_finite_end_a_run_at_once():
    with pytest.raises(Diverged, match="parameters are not finite after step 9"):
        BadSteps(20).see(9, one(param_norm=math.inf))


def test_a_bad_step_says_nothing_that_would_spoil_a_mean():
    counted = BadSteps(3).see(1, one(math.nan, skipped=1.0))
    assert set(counted) == {"skipped", "param_norm", "learning_rate"}


def test_arrays_that_are_not_finite_are_named():
    mesh = make_mesh(fsdp=8, data=1)
    bad = np.ones((8, 2), np.float32)
    bad[6, 1] = np.inf
    tree = {
        "a": {"kernel": jax.device_put(bad, NamedSharding(mesh, PartitionSpec("fsdp")))},
        "b": jnp.array([1.0, jnp.nan], jnp.bfloat16),
        "good": jnp.full(3, 3e38),
        "count": jnp.int32(2**31 - 1),
        "waits": jax.device_put(
            bad, NamedSharding(mesh, PartitionSpec(), memory_kind=offload.HOST)
        ),
    }
    expected = [f"{name} is not finite" for name in ("a/kernel", "b", "waits")]
    assert finite_problems(tree) == expected
    assert finite_problems({"good": tree["good"], "count": tree["count"]}) == []


def test_fields_of_the_guards_that_cannot_be_meant_are_all_named():
    guards = common.guards()
    assert config_checks.guard_problems(guards) == []
    guards.update(skip_batches=19, spike_factor=0.5)
    problems = config_checks.guard_problems(guards)
    assert len(problems) == 2 and "set it to 20 or more" in problems[0]


# --- spikes -----------------------------------------------------------------------------------------------------------

WINDOW, FACTOR = 8, 4.0


def judge(norms, factor=FACTOR, window=WINDOW):
    """Which of these norms, one a step, are spikes; and the state at the end."""
    state, found = spikes.new_spikes(window), []
    for norm in np.asarray(norms, np.float32):
        spike = spikes.is_spike(state, norm, factor)
        state = spikes.see(state, norm, spike)
        found.append(bool(spike))
    return found, state


def plain_judgement(norms, factor=FACTOR, window=WINDOW):
    """The same in plain Python: the oracle."""
    past, found = [], []
    for norm in norms:
        full, finite = len(past) >= window, math.isfinite(norm)
        found.append(full and finite and norm > factor * float(np.median(past[-window:])))
        past += [np.float32(norm)] * finite
    return found


def check_judgement(judgement, seed):
    """Spikes are found as plain Python finds them, whatever norms are not finite."""
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(0, 0.5, 60)
    norms[rng.integers(60, size=4)] *= 50
    norms[rng.integers(60, size=4)] = [np.nan, np.inf, np.nan, -np.inf]
    expected = plain_judgement(norms)
    assert judgement(norms) == expected, f"seed {seed}"
    return sum(expected)


def test_spikes_are_norms_far_over_the_median_of_the_window():
    assert sum(check_judgement(lambda norms: judge(norms)[0], seed) for seed in range(4)) >= 4


def test_the_law_of_spikes_fails_for_a_mean_and_for_norms_that_are_not_finite_in_the_window():
    def mean(norms):
        return [
            t >= WINDOW and bool(norm > FACTOR * np.mean(norms[t - WINDOW : t]))
            for t, norm in enumerate(norms)
        ]

    def all_norms(norms):
        return [
            t >= WINDOW and bool(norm > FACTOR * np.median(norms[t - WINDOW : t]))
            for t, norm in enumerate(norms)
        ]

    for wrong in (mean, all_norms):
        with pytest.raises(AssertionError):
            for seed in range(4):
                check_judgement(wrong, seed)


def test_where_norms_rise_for_good_half_a_window_is_left_out():
    found, state = judge([1.0] * WINDOW + [50.0] * WINDOW)
    assert found == [False] * WINDOW + [True] * (WINDOW // 2) + [False] * (WINDOW // 2)
    assert int(state.skipped) == WINDOW // 2


class Scaled:
    """A model of one weight vector: the batch scales the gradient, and NaN in it is NaN in the loss."""

    def apply(self, variables, batch, deterministic, rngs):
        return batch["x"] @ variables["params"]["w"]


def mean_loss(outputs, batch):
    total, weight = outputs.sum(), jnp.float32(outputs.size)
    return (total, weight), {"loss": (total, weight)}


def scaled_step(factor):
    return make_train_step(
        Scaled(), mean_loss, optax.scale_by_adam(), lambda step: 0.1, seed=0, ema_decay=0.9,
        spike_factor=factor,
    )  # fmt: skip


def scaled_state(window):
    return new_state({"w": jnp.ones(4)}, optax.scale_by_adam(), ema=True, spike_window=window)


def check_a_spike_changes_nothing(factor):
    """A step with 50 times the gradient leaves parameters, moments and averages bit by bit; those around it train."""
    step = jax.jit(scaled_step(factor))
    state = scaled_state(WINDOW)
    kept = lambda s: jax.tree.map(np.asarray, (s.params, s.opt_state, s.ema))
    for number in range(1, 16):
        before = kept(state)
        scale = {10: 50.0, 12: np.nan}.get(number, 1.0)
        state, metrics = step(state, {"x": jnp.full((2, 4), scale)})
        same = jax.tree.map(np.array_equal, before, kept(state))
        assert all(jax.tree.leaves(same)) == (number in (10, 12)), number
        assert float(metrics["spikes"][0]) == (number == 10)
        assert float(metrics["skipped"][0]) == (number == 12)
    assert (int(state.step), int(state.skipped), int(state.spikes.skipped)) == (15, 1, 1)


def test_a_spike_changes_neither_parameters_nor_moments_nor_averages():
    check_a_spike_changes_nothing(FACTOR)


def test_the_law_fails_for_a_factor_that_lets_the_spike_through():
    with pytest.raises(AssertionError):
        check_a_spike_changes_nothing(100.0)


def test_the_guard_may_be_turned_on_or_off_where_a_run_goes_on(tmp_path):
    on, off = scaled_state(WINDOW), scaled_state(0)
    mesh = make_mesh()
    place = lambda state: jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    abstract = lambda state: jax.eval_shape(lambda s: s, place(state))
    seen = on.replace(spikes=on.spikes.replace(seen=on.spikes.seen + 7))
    for name, state in {"on": seen, "off": off}.items():
        store = Checkpoints(tmp_path / name)
        store.save(1, place(state), {"step": 1}, None)
        store.wait()
        store.close()
    restored = lambda name, state: restore_state(find_step(tmp_path / name), abstract(state))
    assert int(restored("on", on).spikes.seen) == 7
    assert restored("on", off).spikes is None
    fresh = restored("off", on).spikes
    assert int(fresh.seen) == int(fresh.skipped) == 0 and fresh.norms.tolist() == [0.0] * WINDOW
    with pytest.raises(
        ValueError, match=r"spikes/norms: stored float32\[8\], expected float32\[9\]"
    ):
        restored("on", scaled_state(9))


def test_without_the_guard_the_step_is_as_it_was():
    batch = {"x": jnp.ones((2, 4))}
    off, on = (
        str(jax.make_jaxpr(scaled_step(factor))(scaled_state(window), batch))
        for factor, window in ((0.0, 0), (FACTOR, WINDOW))
    )
    assert " sort[" in on and " sort[" not in off
    assert f"f32[{WINDOW}]" in on and f"f32[{WINDOW}]" not in off
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(scaled_state(0))]
    assert not any("spikes" in jax.tree_util.keystr(path) for path in paths)


# --- a step computed twice --------------------------------------------------------------------------------------------


def sharded_state():
    mesh = make_mesh(data=2, fsdp=4)
    params = {
        "whole": jax.device_put(jnp.ones(3), NamedSharding(mesh, PartitionSpec())),
        "shared": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, PartitionSpec("fsdp"))),
        "waits": jax.device_put(
            jnp.ones((4, 2)), NamedSharding(mesh, PartitionSpec("fsdp"), memory_kind=offload.HOST)
        ),
    }
    state = new_state(params, optax.identity())
    place = lambda x: x if x.ndim else jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(place, state)


def test_differences_name_arrays_and_the_devices_that_hold_other_bits():
    state = sharded_state()
    copy = self_check.copy(state)
    assert self_check.differences(state, copy) == {}
    assert copy.params["waits"].sharding == state.params["waits"].sharding
    shared = np.ones((8, 2), np.float32)
    shared[5, 1] = np.nextafter(np.float32(1), np.float32(2))
    mesh, sharding = state.step.sharding.mesh, state.params["shared"].sharding
    other = state.replace(params=state.params | {"shared": jax.device_put(shared, sharding)})
    found = self_check.differences(state, other)
    assert found == {"params/shared": list(mesh.devices[:, :, 2].ravel())}


def test_equal_nan_are_no_difference_and_zeros_of_two_signs_are_one():
    state = sharded_state()
    with_value = lambda x: state.replace(
        params=state.params
        | {"whole": jax.device_put(np.full(3, x, np.float32), state.params["whole"].sharding)}
    )
    assert self_check.differences(with_value(np.nan), with_value(np.nan)) == {}
    assert list(self_check.differences(with_value(0.0), with_value(-0.0))) == ["params/whole"]


def test_a_checked_step_runs_twice_on_the_same_state_and_the_others_once():
    seen = SimpleNamespace(calls=0)

    def step(state, batch):
        seen.calls += 1
        return jax.jit(
            lambda s, b: (s.replace(step=s.step + 1), {"loss": (s.step + b, jnp.float32(1))}),
            donate_argnums=0,
        )(state, batch)

    checked, state = SelfCheck(step, every=3, step=4), sharded_state()
    for _ in range(4):  # steps 5, 6, 7, 8
        state, _ = checked(state, jnp.float32(2))
    assert seen.calls == 5 and int(state.step) == 4


def test_a_metric_that_differs_is_corruption():
    values = iter([1.0, 2.0])
    step = lambda state, batch: (state, {"loss": (jnp.float32(next(values)), jnp.float32(1))})
    with pytest.raises(Corrupted, match="metric loss"):
        SelfCheck(step, every=1, step=0)(sharded_state(), None)
