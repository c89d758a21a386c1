"""An optimizer's state in the host's memory: where it lies, and that it computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gpt
from jaxlm.parallel import offload
from jaxlm.parallel.mesh import make_mesh
from jaxlm.program import make_program
from jaxlm.tokenizers import make_tokenizer
from tests.tiny import OVERRIDES


def tiny_program(offload_optimizer):
    config = gpt.get_config("tiny")
    known = {k: v for k, v in OVERRIDES.items() if not k.startswith("tokenizer")}
    config.update_from_flattened_dict(known | {"offload_optimizer": offload_optimizer})
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    return make_program(config, mesh, make_tokenizer("bytes", num_sentinels=0))


def memories(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def run_steps(program, steps=2):
    state = program.init_state()
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        batch = {
            key: jnp.asarray(
                rng.integers(1, 200, x.shape) if key in ("tokens", "labels") else np.ones(x.shape),
                x.dtype,
            )
            for key, x in program.batch_shape.items()
        }
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["loss"][0]))
    return state, losses


@pytest.fixture(scope="module")
def offloaded():
    return run_steps(tiny_program(True))


def test_the_optimizers_state_stays_in_the_hosts_memory_and_the_parameters_do_not(offloaded):
    state, _ = offloaded
    assert memories(state.opt_state) == {offload.HOST}
    assert offload.HOST not in memories(state.params)


def test_a_state_in_the_hosts_memory_computes_the_same(offloaded):
    state, losses = offloaded
    plain_state, plain_losses = run_steps(tiny_program(False))
    assert losses == plain_losses
    jax.tree.map(np.testing.assert_array_equal, state.params, plain_state.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, plain_state.opt_state)
    assert offload.HOST not in memories(plain_state.opt_state)


def test_devices_without_that_memory_are_refused(monkeypatch):
    monkeypatch.setattr(offload, "HOST", "moon")
    with pytest.raises(ValueError, match="no memory 'moon'.*set it to False"):
        tiny_program(True).state_shape  # noqa: B018
