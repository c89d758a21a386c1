"""The fused attention kernels beside the reference: the same numbers, no scores in memory, each run only once."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlm.models import attention, kernels
from jaxlm.models.kernels import splash
from jaxlm.models.layers import attention_mask, window_mask
from jaxlm.parallel import mesh as meshes


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
