"""Shardings follow from names: parameters, optimizer state, batch rows."""

import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm import config_checks, config_files
from jaxlm.models.layers import LOGICAL_AXES
from jaxlm.parallel import mesh as meshes
from jaxlm.planning import topologies
from tests import tiny


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
    assert shardings["query"].spec == P("stage", "fsdp", "tensor", None)
    assert shardings["table"].spec == P("tensor", "fsdp")
    assert shardings["scale"].spec == P(None)


def test_sizes_that_the_mesh_does_not_divide_are_all_named():
    mesh = meshes.make_mesh(data=1, fsdp=1, tensor=8)
    boxed = {**boxed_params(), "other": boxed_params()["query"], "small": boxed_params()["table"]}
    boxed["small"] = boxed["small"].replace(value=jax.ShapeDtypeStruct((12, 8), jnp.float32))
    expected = (
        r"(?s)axis 'heads' of other and 1 more is 4, not divisible by the 8 devices of mesh axis tensor: "
        r"make it 8, or set tensor to 4.*axis 'vocab' of small is 12.*make it 16 \(rows that no token has"
    )
    with pytest.raises(ValueError, match=expected):
        meshes.param_shardings(mesh, boxed)


UNEVEN = {
    "model.vocab_size": (5001, "make it 5004 .*, or set tensor to 1"),
    "model.num_heads": (6, "make it 4 or 8, or set tensor to 2"),
    "model.num_kv_heads": (2, "make it 4, or set tensor to 2"),
    "model.mlp_dim": (1022, "make it 1020 or 1024, or set tensor to 2"),
    "model.num_layers": (3, "make it 2 or 4, or set stage to 1"),
    "model.emb_dim": (257, "make it 256 or 258, or set fsdp to 1"),
    "seq_len": (255, "make it 254 or 256, or set context to 1"),
    "eval.batch_size": (6, "make it 4 or 8, or set fsdp x stage to 2"),
}


class Mesh:
    """What `misfits` asks of a mesh, larger than this machine has devices for."""

    shape = dict(data=1, stage=2, fsdp=2, expert=1, context=2, tensor=4)
    size = 32


def test_everything_in_a_config_that_a_mesh_does_not_divide_is_refused_at_once():
    config = config_files.read_config(
        str(tiny.ROOT / "configs/gpt.py:tiny"),
        {field: size for field, (size, _) in UNEVEN.items()}
        | {"batch_size": 12, "accumulation_steps": 4},
    )
    tokenizer = types.SimpleNamespace(vocab_size=300)
    with pytest.raises(ValueError) as error:
        config_checks.check_config(config, Mesh(), tokenizer, 0)
    lines = str(error.value).splitlines()[1:]
    expected = {"batch_size / accumulation_steps": (3, "make it 4, or"), **UNEVEN}
    for field, (size, repair) in expected.items():
        found = [line for line in lines if re.search(f"- {field} is {size}, .*{repair}", line)]
        assert len(found) == 1, (field, lines)
    assert len(lines) == len(expected)


def test_even_sizes_are_not_refused():
    config = config_files.read_config(str(tiny.ROOT / "configs/gpt.py:tiny"))
    assert (
        meshes.misfits(
            meshes.make_mesh(data=2, fsdp=2, context=2), config_checks.shared_sizes(config)
        )
        == []
    )


class Device:
    """As TPU devices describe themselves: the slice, and where in its square of four chips."""

    platform, device_kind, process_index, core_on_chip = "tpu", "imagined", 0, 0

    def __init__(self, place, slice_index):
        self.coords, self.slice_index = (place % 2, place // 2, 0), slice_index


def devices_of(slices):
    """From slice to slice in turn, so that their order alone does not put a slice together."""
    return [Device(place, index) for place in range(4) for index in range(slices)]


def check_slices(lay_out, outer):
    """Going along any axis but `outer`, and within a slice's share of `outer`, one stays in a slice."""
    sizes = dict(data=1, stage=1) | {outer: 4} | dict(fsdp=2, expert=1, context=1, tensor=1)
    devices = lay_out(np.array(devices_of(2)), sizes)
    assert devices.shape == tuple(sizes.values())
    found = np.vectorize(lambda device: device.slice_index)(devices).reshape(4, 2)
    assert found.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]], found


@pytest.mark.parametrize("outer", ["data", "stage"])
def test_only_the_data_axis_or_else_the_stages_go_from_slice_to_slice(outer):
    check_slices(meshes.lay_out, outer)
    with pytest.raises(AssertionError):
        check_slices(lambda devices, sizes: devices.reshape(tuple(sizes.values())), outer)


def test_a_data_axis_that_slices_cannot_share_is_refused():
    with pytest.raises(
        ValueError, match="data=2 is not divisible by the 4 slices .* multiple of 4"
    ):
        meshes.make_mesh(data=2, fsdp=8, devices=devices_of(4))


@pytest.mark.plans
def test_the_slices_of_a_real_topology_are_split_over_data():
    devices = topologies.topology_devices(topologies.parse_topology("2xv5e-4"))
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
    found = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert found[0].tolist() == np.zeros_like(found[0]).tolist()
    assert found[1].tolist() == np.ones_like(found[1]).tolist()


def check_mirrors(mirror_shardings):
    """Adam's moments are sharded as the parameters are, counters are replicated."""
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    params = nn.meta.unbox(boxed_params())
    shardings = meshes.param_shardings(mesh, boxed_params())
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    found = mirror_shardings(mesh, state, params, shardings)
    assert found[0].mu["query"].spec == P("stage", "fsdp", "tensor", None)
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
    assert on_devices.sharding.spec == P(("data", "fsdp", "expert", "stage"), "context")
    assert {s.data.shape for s in on_devices.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(on_devices, rows["tokens"])
