"""The gradient that attention writes out itself, beside the one that JAX derives from the formula."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import attention
from jaxlm.models.layers import apply_softcap, attention_mask, dropout

B, T, N, H = 2, 6, 4, 8
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
# (kv heads, softcap, rate of dropout, whether scores are biased)
CASES = [
    (4, 0.0, 0.0, False),
    (2, 0.0, 0.0, True),
    (1, 3.0, 0.0, False),
    (2, 0.0, 0.4, False),
    (2, 3.0, 0.4, True),
]


def formula(query, key, value, mask, rng, bias, *, softcap, dropout_rate):
    """softmax(softcap(q k / sqrt(H))) v with kv heads repeated, and dropout of the probabilities."""
    kv_heads = key.shape[2]
    groups = N // kv_heads
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = apply_softcap(jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(H), softcap)
    scores = scores if bias is None else scores + bias[None]
    probs = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    kept = dropout(jnp.ones((B, kv_heads, groups, T, T)), dropout_rate, rng)
    return jnp.einsum("bnts,bsnh->btnh", probs * kept.reshape(B, N, T, T), value)


def gradients(attend, kv_heads, softcap, rate, biased):
    keys = jax.random.split(jax.random.key(0), 6)
    query, weight = (jax.random.normal(k, (B, T, N, H)) for k in keys[:2])
    key, value = (jax.random.normal(k, (B, T, kv_heads, H)) for k in keys[2:4])
    mask = attention_mask(SEGMENTS, causal=True)
    bias = jax.random.normal(keys[5], (N, T, T)) if biased else None

    def total(query, key, value, bias):
        rest = mask, keys[4], bias
        out = attend(query, key, value, *rest, softcap=softcap, dropout_rate=rate)
        return (out * weight).sum()

    return jax.value_and_grad(total, argnums=(0, 1, 2, 3))(query, key, value, bias)


def check_gradient(attend, *case):
    got, expected = (gradients(f, *case) for f in (attend, formula))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, expected)


@pytest.mark.parametrize("case", CASES)
def test_attention_has_the_gradient_of_its_formula(case):
    check_gradient(attention.attend_xla, *case)


def without_row_sums(softcap, residuals, grad):
    *rest, out = residuals
    return attention._attend_backward(softcap, (*rest, jnp.zeros_like(out)), grad)


def without_dropout(softcap, residuals, grad):
    (query, key, value, _, bias), *rest = residuals
    return attention._attend_backward(softcap, ((query, key, value, None, bias), *rest), grad)


def without_softcap(softcap, residuals, grad):
    return attention._attend_backward(0.0, residuals, grad)


def without_bias(softcap, residuals, grad):
    *rest, bias_grad = attention._attend_backward(softcap, residuals, grad)
    return *rest, jnp.zeros_like(bias_grad)


def of_capped_bias(softcap, residuals, grad):
    (*inputs, bias), probs, capped, out = residuals
    *rest, bias_grad = attention._attend_backward(softcap, residuals, grad)
    return *rest, bias_grad * (1 - (capped / softcap) ** 2).mean(0, keepdims=True)


@pytest.mark.parametrize(
    "backward",
    [without_row_sums, without_dropout, without_softcap, without_bias, of_capped_bias],
)
def test_the_gradient_check_fails_without_one_of_its_parts(backward, monkeypatch):
    wrong = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))(
        lambda *inputs: attention._attend_forward(*inputs)[0]
    )
    wrong.defvjp(attention._attend_forward, backward)
    monkeypatch.setattr(attention, "_attend", wrong)
    with pytest.raises(AssertionError):
        check_gradient(attention.attend_xla, 2, 3.0, 0.4, True)
