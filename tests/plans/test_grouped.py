"""The kernels of experts with the real compilers: that they compile, in what dtype, and what a plan says they cost."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm.models.grouped import TILE_ROWS, grouped_matmul
from jaxlm.parallel import mesh as meshes
from jaxlm.planning import cost, hlo
from jaxlm.planning.chips import CHIPS
from jaxlm.planning.kernels import Sparsity
from jaxlm.planning.topologies import parse_topology, topology_devices

pytestmark = pytest.mark.plans
GROUPS = 4


def compile_gradient(topology, rows, inner, outer, dtype):
    """(mesh, compiled value and gradients) of one product on the first chip of a topology."""
    devices = topology_devices(parse_topology(topology))[:1]
    mesh = meshes.make_mesh(devices=devices, data=1)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def total(x, kernels, sizes):
        return (grouped_matmul(x, kernels, sizes).astype(jnp.float32) ** 2).sum()

    trace = jax.jit(jax.value_and_grad(total, (0, 1))).trace
    shapes = (shape(rows, inner), shape(GROUPS, inner, outer), shape(GROUPS, dtype=jnp.int32))
    return mesh, trace(*shapes).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("topology", ["v4-8", "v5e-1", "v5p-8", "v6e-1"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sizes", [(8192, 2048, 5632), (7, 768, 3072), (1000, 1000, 1500)])
def test_they_compile_on_every_generation_in_any_size(topology, dtype, sizes):
    _, compiled = compile_gradient(topology, *sizes, dtype)
    assert "gmm" in compiled.as_text() and "ragged" not in compiled.as_text()


@pytest.mark.parametrize("num_experts", [GROUPS, 8 * GROUPS])
def test_a_plan_charges_three_products_of_the_rows_that_are_here(num_experts):
    rows, inner, outer = 64 * TILE_ROWS, 1024, 2048
    mesh, compiled = compile_gradient("v5e-1", rows, inner, outer, jnp.bfloat16)
    module = hlo.parse(compiled.as_text())
    sparsity = Sparsity(causal=True, num_experts=num_experts)
    found = cost.estimate(module, mesh, CHIPS["v5e"], sparsity).operations
    kernels = [operation for operation in found if operation.kind == "kernel"]
    needed = 2 * rows * inner * outer * GROUPS / num_experts
    assert [kernel.flops for kernel in kernels] == [pytest.approx(needed)] * 3
    for kernel in kernels:
        least = (needed + 2 * GROUPS * TILE_ROWS * inner * outer) / CHIPS["v5e"].peak_flops
        assert least <= kernel.seconds[0] <= 3 * least
