"""Shardings follow from names: parameters, optimizer state, batch rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.models.layers import LOGICAL_AXES
from jaxlm.parallel import mesh as meshes


def boxed_params():
    box = lambda shape, names: nn.LogicallyPartitioned(
        jax.ShapeDtypeStruct(shape, jnp.float32), names
    )
    return {
        "query": box((2, 8, 4, 2), ("layers", "embed", "heads", "head_dim")),
        "table": box((16, 8), ("vocab", "embed")),
        "scale": box((8,), ("norm",)),
    }


def test_every_logical_axis_of_the_models_has_a_rule():
    assert {name for name, _ in meshes.RULES} == set(LOGICAL_AXES)


def test_batch_comes_before_embed_in_the_rule_table():
    names = [name for name, _ in meshes.RULES]
    assert names.index("batch") < names.index("embed")


def test_parameters_are_sharded_by_their_names():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = meshes.param_shardings(mesh, boxed_params())
    assert shardings["query"].spec == P(None, "fsdp", "tensor", None)
    assert shardings["table"].spec == P("tensor", "fsdp")
    assert shardings["scale"].spec == P(None)


def test_sizes_that_the_mesh_does_not_divide_are_all_named():
    mesh = meshes.make_mesh(data=1, fsdp=1, tensor=8)
    with pytest.raises(
        ValueError, match=r"(?s)axis 'heads' of query is 4, not.* 8 devices.*set tensor to 4"
    ):
        meshes.param_shardings(mesh, boxed_params())


@pytest.mark.parametrize("sizes", [(3, 1), (-1, -1), (-1, 3)])
def test_a_mesh_that_does_not_cover_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="does not cover 8 devices"):
        meshes.make_mesh(*sizes)


def check_mirrors(mirror_shardings):
    """Adam's moments are sharded as the parameters are, counters are replicated."""
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    params = nn.meta.unbox(boxed_params())
    shardings = meshes.param_shardings(mesh, boxed_params())
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    found = mirror_shardings(mesh, state, params, shardings)
    assert found[0].mu["query"].spec == P(None, "fsdp", "tensor", None)
    assert found[0].nu["table"].spec == P("tensor", "fsdp")
    assert found[0].count.spec == P()


def test_optimizer_state_is_sharded_like_its_parameters():
    check_mirrors(meshes.mirror_shardings)


def test_the_mirror_law_fails_for_a_replicated_state():
    def replicate(mesh, tree, params, shardings):
        return jax.tree.map(lambda _: meshes.replicated(mesh), tree)

    with pytest.raises(AssertionError):
        check_mirrors(replicate)


def test_a_process_reads_the_rows_that_its_devices_hold():
    mesh = meshes.make_mesh(data=4, fsdp=1, tensor=2)
    assert meshes.local_rows(mesh, 8).tolist() == list(range(8))  # one process holds every device
    with pytest.raises(
        ValueError, match="batch_size is 6, not divisible by the 4 devices.*make it 4 or 8"
    ):
        meshes.local_rows(mesh, 6)


def test_batches_are_sharded_over_data_and_fsdp():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    rows = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3)}
    on_devices = meshes.put_batch(mesh, rows)["tokens"]
    assert on_devices.sharding.spec == P(("data", "fsdp", "expert"), "context")
    assert {s.data.shape for s in on_devices.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(on_devices, rows["tokens"])
