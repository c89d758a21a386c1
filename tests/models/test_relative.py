"""T5's relative positions: which distance has which bucket, and which bias comes to which pair of places."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.relative import RelativeBias, find_buckets, spread
from tests.models.tiny import make_config


def published_bucket(offset, causal, buckets=32, furthest=128):
    """As arXiv:1910.10683, section 2.1, and its appendix's code describe it, for one offset, in whole numbers."""
    first = 0
    if not causal:
        buckets //= 2
        first = buckets if offset > 0 else 0
    distance = max(-offset, 0) if causal else abs(offset)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    # The largest k for which exact (furthest / exact)^(k / (buckets - exact)) <= distance.
    more, k = buckets - exact, 0
    while k + 1 < more and distance**more >= exact ** (more - k - 1) * furthest ** (k + 1):
        k += 1
    return first + exact + k


def check_buckets(find, causal):
    offsets = np.arange(-300, 301)
    found = np.asarray(find(jnp.asarray(offsets), 32, 128, causal=causal))
    expected = [published_bucket(int(offset), causal) for offset in offsets]
    np.testing.assert_array_equal(found, expected)
    assert set(expected) == set(range(32)) - ({16} if not causal else set())


@pytest.mark.core
@pytest.mark.parametrize("causal", [True, False])
def test_each_distance_has_its_published_bucket(causal):
    check_buckets(find_buckets, causal)


def test_the_bucket_check_fails_for_the_other_direction_and_for_rounding_down_a_hair():
    with pytest.raises(AssertionError):
        check_buckets(lambda offset, *args, **kw: find_buckets(-offset, *args, **kw), False)
    with pytest.raises(AssertionError):
        check_buckets(lambda offset, *args, **kw: find_buckets(offset + 1, *args, **kw), True)


def check_spread(spread, queries, keys):
    x = np.random.default_rng(0).normal(size=(2, queries + keys))
    expected = np.empty((2, queries, keys))
    for t in range(queries):
        for s in range(keys):
            expected[:, t, s] = x[:, s - t + queries - 1]
    np.testing.assert_allclose(spread(jnp.asarray(x), queries, keys), expected, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 5), (4, 4), (3, 7), (5, 2)])
def test_a_bias_of_each_offset_comes_to_every_pair_of_places(sizes):
    check_spread(spread, *sizes)


def test_the_spread_check_fails_for_the_transpose_of_offsets():
    with pytest.raises(AssertionError):
        check_spread(lambda x, queries, keys: spread(x[:, ::-1], queries, keys), 4, 4)


def test_later_queries_have_the_biases_of_their_places():
    config = make_config(relative_buckets=8, relative_max_distance=6, num_heads=4)
    module = RelativeBias(config, causal=True)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    read = lambda *sizes: module.apply({"params": {"table": table}}, *sizes)
    whole = read(9, 9)
    np.testing.assert_array_equal(read(2, 9, jnp.int32(5)), whole[:, 5:7])
    assert whole.shape == (4, 9, 9) and whole.dtype == jnp.float32
    assert math.isclose(whole[1, 3, 3], table[0, 1], rel_tol=1e-6)


def test_no_gradient_is_scattered_over_pairs():
    """The gradient of (N, T, S) biases is summed along diagonals first; what is scattered has one row for each offset."""
    module = RelativeBias(make_config(), causal=False)
    params = {"params": {"table": jnp.ones((32, 4))}}
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: (module.apply(p, 64, 64) ** 2).sum()))(params)
    from tests.models.tiny import equations

    sizes = [
        equation.invars[2].aval.shape[0]
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "scatter-add"
    ]
    assert sizes == [128]
