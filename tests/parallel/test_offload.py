"""An optimizer's state in the host's memory: where it lies, and that it computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


SPECS = {  # of arrays of (8, 6) on data=2, fsdp=2: how often a copy holds each element
    "repeated": (P(), 1),
    "sharded once": (P("fsdp"), 1),
    "sharded twice": (P("data", "fsdp"), 1),
    "both in one": (P(("fsdp", "data"), None), 1),
    "the other one": (P(None, "fsdp"), 1),
}


def placed(spec, memory_kind="device", shape=(8, 6)):
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, spec, memory_kind=memory_kind)
    return jax.device_put(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), sharding)


def held(x):
    return sum(shard.data.size for shard in x.addressable_shards) / x.size


@pytest.mark.parametrize("spec, times", SPECS.values(), ids=SPECS)
def test_a_copy_on_the_host_has_every_byte_once(spec, times):
    (copy,) = offload.start_copy([placed(spec)])
    assert copy.sharding.memory_kind == offload.HOST and held(copy) == times
    np.testing.assert_array_equal(copy, placed(spec))


@pytest.mark.parametrize("shape, times", {(): 4, (7, 3): 4, (2, 3): 2, (0, 3): None}.items())
def test_what_no_axis_divides_is_copied_by_each_device(shape, times):
    (copy,) = offload.start_copy([placed(P(), shape=shape)])
    np.testing.assert_array_equal(copy, placed(P(), shape=shape))
    assert times is None or held(copy) == times


@pytest.mark.parametrize("memory_kind", ["device", offload.HOST])
def test_a_copy_keeps_its_values_when_the_original_is_donated(memory_kind):
    copies, state = [], placed(P("fsdp"), memory_kind)
    device = offload.on_device(state.sharding)
    add = lambda x: jax.device_put(x, device) + 1
    step = jax.jit(add, donate_argnums=0, out_shardings=state.sharding)
    for _ in range(20):
        copies += offload.start_copy([state])
        state = step(state)
    for i, copy in enumerate(copies):
        np.testing.assert_array_equal(copy, i + np.arange(48).reshape(8, 6))


def test_only_the_first_copy_compiles(caplog):
    state = [placed(P()), placed(P("fsdp"), shape=(16, 6))]
    with jax.log_compiles():
        for expected in (1, 1):
            offload.start_copy(state)
            assert caplog.text.count("Compiling jit(_same)") == expected
