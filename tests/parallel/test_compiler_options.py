"""What the compiler is told, by the kind of the mesh's devices."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.parallel.compiler_options import compiler_options, known_options, wanted_options
from jaxlm.parallel.mesh import make_mesh


def mesh_of(kind, slices=1):
    devices = [SimpleNamespace(device_kind=kind, slice_index=i % slices) for i in range(4)]
    return SimpleNamespace(devices=np.array(devices, object))


def test_options_follow_the_kind_of_device_and_the_number_of_slices():
    v5e, v6e, gpu = (
        set(wanted_options(mesh_of(kind)))
        for kind in ("TPU v5 lite", "TPU v6 lite", "NVIDIA H100 80GB HBM3")
    )
    assert v5e < v6e and not v6e & gpu
    slices = set(wanted_options(mesh_of("TPU v5 lite", slices=2))) - v5e
    assert slices and all("data_parallel" in name for name in slices)
    assert wanted_options(mesh_of("cpu")) == {} == compiler_options(make_mesh())


def test_an_option_that_a_release_does_not_know_is_left_out():
    asked = (("xla_no_such_option", "1"), ("xla_cpu_enable_fast_math", False))
    assert known_options(asked, jax.devices()[0]) == dict(asked[1:])


def test_an_option_with_a_wrong_value_is_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_enable_fast_math"):
        known_options((("xla_cpu_enable_fast_math", "perhaps"),), jax.devices()[0])


def test_none_is_none_and_anything_else_is_refused():
    assert compiler_options(make_mesh(), "none") == {}
    with pytest.raises(ValueError, match="'fast': expected one of auto, none"):
        compiler_options(make_mesh(), "fast")


@pytest.mark.plans
@pytest.mark.parametrize("topology", ["v4-8", "v5e-4", "v5p-8", "v6e-4", "2xv5e-4", "h100x8"])
def test_every_option_is_one_of_the_compiler(topology):
    from jaxlm.planning.topologies import parse_topology, topology_devices

    devices = topology_devices(parse_topology(topology))
    mesh = SimpleNamespace(devices=devices)
    assert compiler_options(mesh) == wanted_options(mesh) != {}
