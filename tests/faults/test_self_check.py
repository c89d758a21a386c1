"""A machine that computes wrong numbers: a run that checks itself ends, and names the arrays; one that does not goes on.

The wrong computation is a real one: in the jitted step a callback to the host flips one bit of one parameter, at one call.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import build
from jaxlm.exits import CORRUPTED, Corrupted
from jaxlm.parallel.mesh import make_mesh
from jaxlm.pretrain import pretrain
from jaxlm.training import step as steps
from jaxlm.training.checkpoints import find_steps
from jaxlm.training.self_check import SelfCheck
from tests import tiny


class Flips:
    """Counts its calls, and returns 1 at those of `at`, else 0: the bit to flip."""

    def __init__(self, *at):
        self.at, self.calls = at, 0

    def __call__(self):
        self.calls += 1
        return np.uint32(self.calls in self.at)


def flipping(make_train_step, flips):
    """`make_train_step` whose step flips the lowest bit of one number of the final norm, where `flips` says so."""

    def make(*args, **options):
        plain = make_train_step(*args, **options)

        def train_step(state, batch):
            state, metrics = plain(state, batch)
            bit = jax.experimental.io_callback(flips, jax.ShapeDtypeStruct((), jnp.uint32))
            scale = state.params["final_norm"]["scale"]
            bits = jax.lax.bitcast_convert_type(scale, jnp.uint32).at[3].add(bit)
            scale = jax.lax.bitcast_convert_type(bits, scale.dtype)
            return state.replace(params=state.params | {"final_norm": {"scale": scale}}), metrics

        return train_step

    return make


def make_config(store, **overrides):
    return tiny.tiny_config(
        "configs/gpt.py:tiny,optimizer=adamw", store, ema_decay=0.9, **overrides
    )


@pytest.fixture(scope="module")
def wrong_runs(store, tmp_path_factory):
    """Devices -> (a run on a machine that computes wrong numbers where its flips say so, and these)."""
    made = {}
    for devices in (1, 8):
        flips, folder = Flips(), tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jaxlm.program.make_train_step", flipping(steps.make_train_step, flips))
            mesh = make_mesh(devices=jax.devices()[:devices])
            run = build.make_run(make_config(store), folder, mesh=mesh)
            _ = run.train_step  # is made with this step
        made[devices] = run, flips
    return made


def run_steps(run, train_step, count):
    state, batches = run.init_state(), run.device_batches(0)
    for _ in range(count):
        state, metrics = train_step(state, next(batches))
    return jax.block_until_ready(state)


def check_a_flipped_bit_is_found(run, flips, at, wrap):
    """Steps 1 to 6, of which 3 and 6 are computed twice; a bit flips in one computation of step 6, the 7th or 8th in all."""
    flips.at, flips.calls = (at,), 0
    with pytest.raises(Corrupted) as error:
        run_steps(run, wrap(run.train_step), 6)
    assert error.value.status == CORRUPTED
    text = str(error.value)
    assert "step 6 was computed twice" in text and "params/final_norm/scale, on " in text
    assert "since step 3" in text
    assert "layers" not in text  # no other array differs
    assert flips.calls == 8


@pytest.mark.parametrize("devices, at", [(1, 7), (8, 8)])
def test_a_bit_that_flips_in_a_checked_step_is_found(wrong_runs, devices, at):
    check_a_flipped_bit_is_found(*wrong_runs[devices], at, lambda step: SelfCheck(step, 3, 0))


def test_the_law_fails_without_the_self_check(wrong_runs):
    with pytest.raises(pytest.fail.Exception):
        check_a_flipped_bit_is_found(*wrong_runs[1], 6, lambda step: step)


def test_a_checked_run_is_bit_by_bit_the_one_that_is_not_and_compiles_its_step_once(wrong_runs):
    run, flips = wrong_runs[8]
    flips.at = ()
    plain = run_steps(run, run.train_step, 4)
    checked = run_steps(run, SelfCheck(run.train_step, 2, 0), 4)
    jax.tree.map(np.testing.assert_array_equal, plain, checked)
    assert run.jitted_train_step._cache_size() == 1


def test_a_run_that_checks_itself_ends_before_it_saves_what_is_wrong(store, tmp_path, monkeypatch):
    make = flipping(steps.make_train_step, Flips(8))
    monkeypatch.setattr("jaxlm.program.make_train_step", make)
    config = make_config(
        store, guards__self_check_every_steps=3, checkpoint_every_steps=3, eval_every_steps=0
    )
    with pytest.raises(Corrupted, match="step 6 was computed twice"):
        pretrain(config, tmp_path / "run")
    assert find_steps(tmp_path / "run" / "checkpoints") == [3]
