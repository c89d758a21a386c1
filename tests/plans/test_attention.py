"""Attention kernels with the real compilers: what is in memory, how often kernels run, and the host's memory."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from configs import gpt
from jaxlm.models.kernels import FUSED
from jaxlm.parallel import mesh as meshes
from jaxlm.planning.chips import CHIPS
from jaxlm.planning.compiling import compile_program, plan_program
from jaxlm.planning.memory import device_bytes
from jaxlm.planning.topologies import parse_topology, topology_devices
from jaxlm.program import in_mesh

pytestmark = pytest.mark.plans


def compile_gradient(
    kernel, topology, *, length, rows=1, heads=2, kv_heads=1, head_dim=64, window=0, **sizes
):
    """The compiled gradients of one attention for a topology, its inputs as the rule table lays them."""
    mesh = meshes.make_mesh(devices=topology_devices(parse_topology(topology)), **sizes)
    attend = FUSED[kernel].attend

    def shape(axes, *sizes, dtype=jnp.bfloat16):
        spec = nn.logical_to_mesh_axes(axes, meshes.RULES)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    def total(query, key, value, segments):
        out = attend(query, key, value, segments, causal=True, window=window, softcap=0.0)
        return (out.astype(jnp.float32) ** 2).sum()

    query = shape(("batch", "length", "act_heads", None), rows, length, heads, head_dim)
    key = shape(("batch", "length", "act_kv", None), rows, length, kv_heads, head_dim)
    segments = shape(("batch", "length"), rows, length, dtype=jnp.int32)
    platform = {"gpu": "cuda"}.get(mesh.devices.flat[0].platform, "tpu")
    options = {"xla_gpu_autotune_level": "0"} if platform == "cuda" else {}
    trace = in_mesh(mesh, jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace)
    lower = in_mesh(mesh, trace(query, key, key, segments).lower)
    return lower(lowering_platforms=(platform,)).compile(compiler_options=options)


def has_scores(text, length):
    return bool(re.search(rf"\b(f32|bf16|pred)\[([\d,]*,)?{length},{length}\]", text))


@pytest.mark.parametrize("topology", ["v4-8", "v5e-1", "v5p-8", "v6e-1"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_splash_compiles_on_every_generation_with_its_largest_blocks(topology, head_dim):
    sizes = {} if topology.endswith("-1") else dict(data=1, fsdp=1, context=-1)
    compiled = compile_gradient("splash", topology, length=8192, head_dim=head_dim, **sizes)
    assert "splash_mha_fwd" in compiled.as_text() and not has_scores(compiled.as_text(), 8192)


def test_two_backward_kernels_and_windows_compile_for_rows_that_are_long():
    compiled = compile_gradient("splash", "v5e-1", length=16384)
    assert "splash_mha_dq" in compiled.as_text()
    compiled = compile_gradient(
        "splash", "v5e-8", length=16384, rows=2, window=512, data=2, context=4
    )
    assert "splash_mha_dkv" in compiled.as_text()


def test_triton_compiles_for_h100_without_a_mask_in_memory_and_cudnn_with_one():
    common = dict(length=2048, rows=8, heads=4, kv_heads=2, head_dim=128, data=4, tensor=2)
    triton = compile_gradient("triton", "h100x8", **common)
    assert "triton" in triton.as_text() and not has_scores(triton.as_text(), 2048)
    cudnn = compile_gradient("cudnn", "h100x8", **common)
    assert "__cudnn$fmha" in cudnn.as_text() and has_scores(cudnn.as_text(), 2048)


def small(**changes):
    config = gpt.get_config("tiny")
    config.model.num_layers, config.unroll = 2, 1
    config.optimizer = gpt.get_config("nanogpt").optimizer
    config.batch_size, config.seq_len = 4, 1024
    config.update(changes)
    return config


def compiled(**changes):
    program = plan_program(small(**changes), parse_topology("v5e-1"))
    return program, compile_program(program, CHIPS["v5e"])


@pytest.fixture(scope="module")
def dots():
    return compiled(remat="dots")


def kernels_of(outcome, phase):
    """The Pallas calls of a phase; a loop over layers holds one for all of them."""
    calls = re.findall(r"%(splash_mha_\w+?)[.\d]* = .*tpu_custom_call", outcome.text)
    return sum(phase in call for call in calls)


@pytest.mark.smoke
def test_the_compiled_step_runs_the_forward_kernel_once_and_under_full_rematerialisation_twice(
    dots,
):
    _, full = compiled(remat="full")
    assert (kernels_of(dots[1], "fwd"), kernels_of(dots[1], "dkv")) == (1, 1)
    assert (kernels_of(full, "fwd"), kernels_of(full, "dkv")) == (2, 1)


def test_a_state_in_the_hosts_memory_is_no_argument_of_the_devices(dots):
    program, plain = dots
    _, offloaded = compiled(remat="dots", offload_optimizer=True)
    state = device_bytes(program.state_shape.opt_state)
    assert plain.argument_bytes - offloaded.argument_bytes == pytest.approx(state, rel=0.05)
