"""What a run asks of the machine before it starts: accelerators that jax does not see, and room for its state."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.exits import RunError
from jaxlm.parallel import accelerators, memory
from jaxlm.parallel.mesh import make_mesh


def shapes(**sizes):
    """float32 arrays whose first axis is shared out over eight devices; `whole` is on each."""
    mesh = make_mesh(data=1, fsdp=8)
    spec = lambda name: PartitionSpec() if name == "whole" else PartitionSpec("fsdp")
    return {
        name: jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec(name)))
        for name, size in sizes.items()
    }


def test_the_bytes_of_a_device_are_those_that_arrays_take_there():
    state = shapes(weights=(16, 5), moments=(8, 3, 2), whole=(7,))
    made = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), state)
    first = jax.devices()[0]
    there = [
        shard.data.nbytes
        for x in jax.tree.leaves(made)
        for shard in x.addressable_shards
        if shard.device == first
    ]
    assert memory.resident_bytes(state) == sum(there) == 4 * (2 * 5 + 3 * 2 + 7)


def test_a_state_that_fits_is_let_through_and_one_that_does_not_is_refused():
    memory.refuse_too_large(shapes(weights=(1024, 1024)))
    room = memory.device_bytes(jax.devices()[0]) // 4
    memory.refuse_too_large(shapes(weights=(8 * (room - 1024),)))  # each holds an eighth
    with pytest.raises(RunError, match=r"does not fit: .* GiB of each device, .* has .* GiB"):
        memory.refuse_too_large(shapes(weights=(8 * (room + 1024),)))
    with pytest.raises(RunError, match="does not fit"):
        memory.refuse_too_large(shapes(whole=(8 * (room - 1024),)))


def test_accelerators_that_jax_does_not_see_are_named_unless_the_cpu_is_asked_for(
    tmp_path, monkeypatch
):
    (tmp_path / "nvidia0").touch()
    files = [
        ("NVIDIA GPUs", (f"{tmp_path}/a*", f"{tmp_path}/nvidia[0-9]*"), "cuda12"),
        ("TPU chips", (f"{tmp_path}/a*", f"{tmp_path}/b*"), "tpu"),
    ]
    monkeypatch.setattr(accelerators, "FILES", files)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert accelerators.unseen_accelerators() == []
    monkeypatch.delenv("JAX_PLATFORMS")
    [(found, mend)] = accelerators.unseen_accelerators()
    assert (
        "NVIDIA GPUs, and jax does not see them" in found and mend == "pip install 'jaxlm[cuda12]'"
    )
