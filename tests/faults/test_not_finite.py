"""Parameters, moments and averages that are not finite: never restored, and never saved."""

import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import build
from jaxlm.exits import Diverged
from jaxlm.pretrain import pretrain
from jaxlm.training.checkpoints import Checkpoints, find_step, find_steps, restore_state
from jaxlm.workdir import manifest, start_or_resume
from tests.faults.bad_data import kept, make_config


def with_nan(state, part, seed=0):
    """The state with one NaN, or infinity, anywhere in one of its parts."""
    rng = random.Random(seed)
    tree = {"params": state.params, "moments": state.opt_state, "ema": state.ema}[part]
    leaves, structure = jax.tree.flatten(tree)
    floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    place = rng.choice(floats)
    bad = np.asarray(leaves[place]).copy()
    bad.flat[rng.randrange(bad.size)] = rng.choice([np.nan, np.inf, -np.inf])
    leaves[place] = jax.device_put(bad, leaves[place].sharding)
    field = {"moments": "opt_state"}.get(part, part)
    return state.replace(**{field: structure.unflatten(leaves)})


def check_nan_is_not_restored(run, part, restore, seed=0):
    """Of two checkpoints of which the newer was saved with a NaN the older is restored, and the log names the array."""
    state = run.init_state()
    store = Checkpoints(run.workdir)
    for step in (3, 6):
        saved = with_nan(state, part, seed) if step == 6 else state
        store.save(step, saved.replace(step=jnp.int32(step)), manifest(run, step) | OPEN, None)
    store.wait()
    restored = restore(run, store)
    store.close()
    assert int(restored.step) == 3, f"seed {seed}"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept(restored)))
    assert find_steps(run.workdir / "checkpoints") == [3]
    (reason,) = (run.workdir / "checkpoints.damaged").glob("6-*.txt")
    assert re.search(
        rf"{'opt_state' if part == 'moments' else part}/.* is not finite", reason.read_text()
    )


OPEN = {"window": {}, "bad_steps": [], "evaluation_left": False}


def resumed(run, store):
    return start_or_resume(run, store, run.init_state)[0]


@pytest.mark.parametrize("part", ["params", "moments", "ema"])
def test_a_checkpoint_with_nan_is_set_aside_and_the_one_before_it_restored(stores, tmp_path, part):
    config = make_config(stores, objective__name="causal", ema_decay=0.9)
    check_nan_is_not_restored(build.make_run(config, tmp_path), part, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("part", ["params", "moments", "ema"])
def test_a_nan_anywhere_in_a_checkpoint_is_found(stores, tmp_path, part, seed):
    config = make_config(stores, objective__name="causal", ema_decay=0.9)
    check_nan_is_not_restored(build.make_run(config, tmp_path), part, resumed, seed)


def test_the_law_of_nan_in_checkpoints_fails_for_a_plain_restore(stores, tmp_path):
    config = make_config(stores, objective__name="causal", ema_decay=0.9)
    plain = lambda run, store: restore_state(find_step(run.workdir), run.state_shape)
    with pytest.raises(AssertionError):
        check_nan_is_not_restored(build.make_run(config, tmp_path), "params", plain)


def test_parameters_that_an_update_made_infinite_end_a_run_before_they_are_saved(stores, tmp_path):
    config = make_config(
        stores,
        objective__name="causal",
        optimizer__learning_rate=1e38,
        optimizer__schedule__warmup_steps=0,
        num_train_steps=6,
        checkpoint_every_steps=1,
    )
    with pytest.raises(Diverged, match="parameters are not finite after step 1"):
        pretrain(config, tmp_path / "run")
    assert find_steps(tmp_path / "run" / "checkpoints") == []
    assert (tmp_path / "run" / "bad_steps" / "1-0" / "batch.npz").is_file()
