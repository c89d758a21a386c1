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
CASES = [(4, 0.0, 0.0), (2, 0.0, 0.0), (1, 3.0, 0.0), (2, 0.0, 0.4), (2, 3.0, 0.4)]


def formula(query, key, value, mask, rng, *, softcap, dropout_rate):
    """softmax(softcap(q k / sqrt(H))) v with kv heads repeated, and dropout of the probabilities."""
    kv_heads = key.shape[2]
    groups = N // kv_heads
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = apply_softcap(jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(H), softcap)
    probs = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    kept = dropout(jnp.ones((B, kv_heads, groups, T, T)), dropout_rate, rng)
    return jnp.einsum("bnts,bsnh->btnh", probs * kept.reshape(B, N, T, T), value)


def gradients(attend, kv_heads, softcap, rate):
    keys = jax.random.split(jax.random.key(0), 5)
    query, weight = (jax.random.normal(k, (B, T, N, H)) for k in keys[:2])
    key, value = (jax.random.normal(k, (B, T, kv_heads, H)) for k in keys[2:4])
    mask = attention_mask(SEGMENTS, causal=True)

    def total(query, key, value):
        out = attend(query, key, value, mask, keys[4], softcap=softcap, dropout_rate=rate)
        return (out * weight).sum()

    return jax.value_and_grad(total, argnums=(0, 1, 2))(query, key, value)


def check_gradient(attend, kv_heads, softcap, rate):
    got, expected = (gradients(f, kv_heads, softcap, rate) for f in (attend, formula))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, expected)


@pytest.mark.parametrize("kv_heads, softcap, rate", CASES)
def test_attention_has_the_gradient_of_its_formula(kv_heads, softcap, rate):
    check_gradient(attention.attend_xla, kv_heads, softcap, rate)


def without_row_sums(softcap, residuals, grad):
    *rest, out = residuals
    return attention._attend_backward(softcap, (*rest, jnp.zeros_like(out)), grad)


def without_dropout(softcap, residuals, grad):
    (query, key, value, _, bias), *rest = residuals
    return attention._attend_backward(softcap, ((query, key, value, None, bias), *rest), grad)


def without_softcap(softcap, residuals, grad):
    return attention._attend_backward(0.0, residuals, grad)


@pytest.mark.parametrize("backward", [without_row_sums, without_dropout, without_softcap])
def test_the_gradient_check_fails_without_row_sums_dropout_or_softcap(backward, monkeypatch):
    wrong = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))(
        lambda *inputs: attention._attend_forward(*inputs)[0]
    )
    wrong.defvjp(attention._attend_forward, backward)
    monkeypatch.setattr(attention, "_attend", wrong)
    with pytest.raises(AssertionError):
        check_gradient(attention.attend_xla, 2, 3.0, 0.4)
