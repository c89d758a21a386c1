"""The fused attention kernels beside the reference: the same numbers, no scores in memory, each run only once."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.interpreters.partial_eval import dce_jaxpr

from jaxlm import program
from jaxlm.models import attention, kernels
from jaxlm.models.cache import make_cache
from jaxlm.models.kernels import splash
from jaxlm.models.layers import attention_mask, window_mask
from jaxlm.parallel import mesh as meshes
from tests.models.tiny import equations, get_loss, init_params, is_close, make_config, make_gpt


@dataclass(frozen=True)
class Case:
    """Sizes and masks of one comparison; rows are packed, and end in padding."""

    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    length: int = 256
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    rows: int = 1

    def inputs(self):
        rng = np.random.default_rng(0)
        draw = lambda heads: jnp.asarray(
            rng.normal(size=(self.rows, self.length, heads, self.head_dim)), jnp.float32
        )
        ends = np.array([0.3, 0.35, 0.9]) * self.length  # two documents that meet within a block
        segments = (np.arange(self.length)[:, None] >= ends[None, :]).sum(1) + 1
        segments = np.where(segments == len(ends) + 1, 0, segments)
        segments = np.tile(segments.astype(np.int32), (self.rows, 1))
        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads), jnp.asarray(segments)

    def attend(self, kernel):
        options = dict(causal=self.causal, window=self.window, softcap=self.softcap)
        return functools.partial(kernel, **options)


def reference(query, key, value, segments, *, causal, window, softcap):
    mask = attention_mask(segments, causal=causal)
    if window:
        mask &= window_mask(segments.shape[1], window)[None]
    return attention.attend_xla(query, key, value, mask, softcap=softcap)


def outputs_and_gradients(attend, inputs):
    query, key, value, segments = inputs

    def total(query, key, value):
        out = attend(query, key, value, segments)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    grad = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(grad)(query, key, value)
    return np.asarray(out), jax.tree.map(np.asarray, grads)


def check_kernel(kernel, case, expected=reference):
    inputs = case.inputs()
    out, grads = outputs_and_gradients(case.attend(kernel), inputs)
    right, right_grads = outputs_and_gradients(case.attend(expected), inputs)
    np.testing.assert_allclose(out, right, atol=1e-5, rtol=1e-5, err_msg="outputs")
    for name, a, b in zip("query key value".split(), grads, right_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=f"gradient of the {name}")


SPLASH = kernels.FUSED["splash_interpret"].attend
TRITON = kernels.FUSED["triton_interpret"].attend
CASES = {
    "causal": (SPLASH, Case()),
    "causal, capped, a length of no whole blocks": (SPLASH, Case(softcap=3.0, length=200)),
    "local": (SPLASH, Case(window=70)),
    "encoder": (SPLASH, Case(causal=False, heads=1)),
    "local encoder": (SPLASH, Case(causal=False, window=70, heads=1)),
    "triton": (TRITON, Case(length=200)),
    "triton, encoder": (TRITON, Case(causal=False, heads=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_the_references_outputs_and_gradients(name):
    check_kernel(*CASES[name])


def wrong_reference(**changes):
    """The reference with another mask, or other segments."""

    def attend(query, key, value, segments, **options):
        if changes.get("segments") is False:
            segments = jnp.ones_like(segments)
        kept = {name: value for name, value in changes.items() if name != "segments"}
        return reference(query, key, value, segments, **options | kept)

    return attend


@pytest.mark.parametrize(
    "changes",
    [dict(causal=False), dict(window=69), dict(window=0), dict(segments=False), dict(softcap=5.0)],
)
def test_the_kernel_check_fails_for_a_wrong_mask(changes):
    inputs = Case(window=70)
    kernel = wrong_reference(**changes)
    with pytest.raises(AssertionError, match="outputs"):
        check_kernel(kernel, inputs)


# --- on a mesh --------------------------------------------------------------------------------------------------------


def in_mesh(function, **sizes):
    mesh = meshes.make_mesh(**sizes)

    def run(*args):
        with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
            return function(*args)

    return run


SHARDED = dict(data=2, context=2, tensor=2)
LAYERS = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, position="rotary")


def packed_batch(rows=2, length=256):
    segments = Case(rows=rows, length=length).inputs()[3]
    tokens = np.random.default_rng(1).integers(0, 32, (rows, length))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": segments}


def loss_and_gradient(config_fields, **sizes):
    model, batch = make_gpt(**LAYERS, **config_fields), packed_batch()
    params = init_params(make_gpt(**LAYERS), batch)
    step = jax.jit(jax.value_and_grad(lambda p, b: get_loss(model, p, b)))
    return (in_mesh(step, **sizes) if sizes else step)(params, batch)


def check_model(fields, other_fields, **sizes):
    (loss, grads), (other_loss, other_grads) = (
        loss_and_gradient(fields, **sizes),
        loss_and_gradient(other_fields),
    )
    assert is_close(loss, other_loss), "the loss differs"
    assert is_close(grads, other_grads, 1e-4), "the gradient differs"


def test_local_and_global_layers_by_splash_on_a_mesh_are_those_of_the_reference_on_one_device():
    windows = dict(attention_windows=(70, 0))
    check_model(windows | dict(attention_kernel="splash_interpret"), windows, **SHARDED)


def test_the_model_check_fails_for_layers_in_another_order():
    with pytest.raises(AssertionError, match="differs"):
        check_model(dict(attention_windows=(70, 0)), dict(attention_windows=(0, 70)))


@pytest.mark.parametrize("kernel", [SPLASH, TRITON])
def test_a_kernel_runs_on_each_devices_part(kernel):
    case = Case(causal=False, rows=2, kv_heads=2, head_dim=16)
    sizes = SHARDED if kernel is SPLASH else dict(data=4, tensor=2)
    query, *rest = case.inputs()
    out = in_mesh(jax.jit(case.attend(kernel)), **sizes)(query, *rest)
    np.testing.assert_allclose(out, case.attend(reference)(query, *rest), atol=1e-5, rtol=1e-5)


# --- what is saved, and what is refused -------------------------------------------------------------------------------


def kernel_calls(remat, **fields):
    """How often a layer runs its forward and its backward kernel in a train step."""
    fields = dict(attention_kernel="splash_interpret", remat=remat, **LAYERS, **fields)
    model, batch = make_gpt(**fields), packed_batch(rows=1, length=128)
    params = init_params(make_gpt(**LAYERS), batch)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: get_loss(model, p, batch)))(params).jaxpr
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as the compiler will
    names = [str(e.params["name"]) for e in equations(jaxpr) if e.primitive.name == "pallas_call"]
    return sum("fwd" in name for name in names), sum("dkv" in name for name in names)


@pytest.mark.parametrize(
    "remat, forward", [("none", 1), ("attention", 1), ("dots", 1), ("full", 2)]
)
def test_only_full_rematerialisation_runs_the_forward_kernel_again(remat, forward):
    assert kernel_calls(remat) == (forward, 1)


def test_layers_that_differ_in_their_windows_have_a_kernel_for_each():
    assert kernel_calls("dots", attention_windows=(70, 0)) == (2, 2)


def test_without_the_name_of_what_it_saves_the_forward_kernel_would_run_twice(monkeypatch):
    monkeypatch.setattr(splash, "RESIDUALS", "unknown")
    assert kernel_calls("dots") == (2, 1)


def test_blocks_divide_what_they_cut():
    for length in (128, 200, 640, 1536, 2560, 5000, 8192, 32768):
        padded = splash.padded_length(length)
        for shards, window in ((1, 0), (1, 300)):
            sizes = splash.choose_blocks(padded // shards, padded, window)
            assert padded - length < 512 and padded % sizes.block_q == padded % sizes.block_kv == 0
            assert sizes.block_kv % sizes.block_kv_compute == 0 and sizes.block_kv <= 1024
            assert not window or sizes.block_kv <= 384
    assert splash.choose_blocks(8192, 8192, 0).use_fused_bwd_kernel
    assert not splash.choose_blocks(16384, 16384, 0).use_fused_bwd_kernel


@pytest.mark.parametrize(
    "kernel, fields, mesh, found",
    [
        ("splash", dict(attention_dropout_rate=0.1), {}, ["attention_dropout_rate=0.1"]),
        (
            "cudnn",
            dict(attention_softcap=5.0, head_dim=8),
            dict(stage=2),
            ["dtype='float32'", "attention_softcap=5.0", "mesh.stage=2"],
        ),
        ("cudnn", dict(head_dim=12, dtype="bfloat16"), dict(stage=1), ["head_dim=12"]),
        (
            "triton",
            dict(attention_windows=(4,)),
            dict(context=2, stage=2),
            ["attention_windows=(4,)", "mesh.context=2"],
        ),
        ("flash", {}, {}, ["use one of xla, splash, cudnn, triton"]),
        (
            "splash",
            dict(attention_windows=(4,), attention_softcap=5.0, head_dim=12),
            dict(context=4),
            [],
        ),
    ],
)
def test_a_kernel_lists_all_that_it_cannot_do(kernel, fields, mesh, found):
    config = make_config(**fields, attention_kernel=kernel)
    limits = kernels.find_limits(config, mesh)
    assert len(limits) == len(found)
    assert all(part in limit for part, limit in zip(found, limits, strict=True))


def gpu(capability):
    """A mesh of what program.py looks at."""
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    return SimpleNamespace(devices=np.array([device]), shape={})


@pytest.mark.parametrize(
    "capability, head_dim, dtype, kernel",
    [
        ("7.5", 64, "float32", "xla"),  # T4: no bfloat16, and no attention of cuDNN
        ("8.0", 64, "bfloat16", "cudnn"),
        ("8.9", 256, "bfloat16", "xla"),
        ("9.0", 256, "bfloat16", "cudnn"),
        ("gfx942", 64, "bfloat16", "cudnn"),
    ],
)
def test_what_auto_is_on_a_gpu_follows_from_its_generation(capability, head_dim, dtype, kernel):
    mesh = gpu(capability)
    assert program.resolve_dtype("auto", mesh) == dtype
    config = make_config(head_dim=head_dim, dtype=dtype, attention_kernel="auto")
    assert program.resolve_kernel(config, mesh).attention_kernel == kernel


def test_cudnn_by_name_is_refused_where_the_gpu_is_too_old():
    config = make_config(dtype="float16", head_dim=64, attention_kernel="cudnn")
    with pytest.raises(ValueError, match="from Ampere on"):
        program.resolve_kernel(config, gpu("7.5"))


def test_xlnet_is_left_to_the_reference():
    """Its scores have terms of distances and segments."""
    config = make_config(head_dim=64, dtype="bfloat16", attention_kernel="auto")
    chosen = {f: program.resolve_kernel(config, gpu("9.0"), family=f) for f in ("bert", "xlnet")}
    assert {f: c.attention_kernel for f, c in chosen.items()} == {"bert": "cudnn", "xlnet": "xla"}
    named = make_config(attention_kernel="splash_interpret")
    with pytest.raises(ValueError, match="family 'xlnet'"):
        program.resolve_kernel(named, gpu("9.0"), family="xlnet")


def test_a_cache_is_read_by_the_reference_whatever_the_kernel():
    batch = {"tokens": jnp.arange(6, dtype=jnp.int32)[None]}
    model = make_gpt(**LAYERS)
    params = init_params(model, batch)
    fused = make_gpt(**LAYERS, attention_kernel="splash")
    cached = fused.apply({"params": params}, batch, cache=make_cache(fused.config, 1, 8)).hidden
    assert is_close(cached, model.apply({"params": params}, batch).hidden)
