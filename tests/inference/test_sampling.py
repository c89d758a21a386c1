"""Drawn tokens follow the distribution that the options describe."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxlm.inference import sampling
from jaxlm.inference.sampling import Sampling, draw, make_sampling
from tests.models.tiny import equations

V, DRAWS = 11, 1 << 14
LOGITS = np.array([1.0, -0.5, 2.0, 0.3, 0.1, -2.0, 1.4, 0.7, -0.1, 1.9, -1.1], np.float32)
SEEN = np.isin(np.arange(V), [2, 3, 5])


@jax.jit
def draw_many(options):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    rows = lambda x: jnp.broadcast_to(x, (DRAWS, V))
    return draw(rows(LOGITS), keys, rows(SEEN) if options.needs_seen else None, options)


def distribution(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The probabilities (V,), by sorting, in float64."""
    logits = LOGITS.astype(np.float64)
    logits = np.where(SEEN & (logits > 0), logits / repetition_penalty, logits)
    logits = np.where(SEEN & (logits < 0), logits * repetition_penalty, logits) / temperature
    order = np.argsort(-logits)
    probs = np.exp(logits)
    probs[order[top_k or V :]] = 0
    probs /= probs.sum()
    kept = np.searchsorted(np.cumsum(probs[order]), top_p) + 1
    probs[order[kept:]] = 0
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


def check_distribution(draw_many, **options):
    """No token that is filtered out, and a chi-squared test of the others."""
    counts = np.bincount(draw_many(), minlength=V)
    expected = DRAWS * distribution(**options)
    assert not counts[expected == 0].any(), "a token that is filtered out"
    found, expected = counts[expected > 0], expected[expected > 0]
    assert scipy.stats.chisquare(found, expected).pvalue > 1e-3, "another distribution"


def all_on(**options):
    """`make_sampling`, but with every filter in the program, at the value where it removes nothing: one compile."""
    neutral = Sampling(np.float32(1), np.int32(V), np.float32(1), np.float32(0), np.float32(1))
    made = make_sampling(**options)
    return neutral.replace(**{name: getattr(made, name) for name in options})


# In each of these every option changes the distribution: a filter's only through the next one where that is stricter.
OPTIONS = [
    dict(temperature=0.6),
    dict(top_k=4),
    dict(top_p=0.8),
    dict(min_p=0.2),
    dict(repetition_penalty=1.8),
    dict(temperature=1.4, top_k=7, top_p=0.7, repetition_penalty=1.8),
]


@pytest.mark.core
@pytest.mark.parametrize("options", [*OPTIONS, dict(top_k=9, top_p=0.95, min_p=0.2)], ids=str)
def test_draws_follow_the_distribution_of_temperature_and_filters(options):
    check_distribution(lambda: draw_many(all_on(**options)), **options)


@pytest.mark.core
def test_draws_without_filters_follow_the_softmax():
    check_distribution(lambda: draw_many(make_sampling()))


def test_the_check_fails_if_a_filter_or_the_temperature_is_forgotten():
    for options in OPTIONS:
        for name in options:
            others = {k: v for k, v in options.items() if k != name}
            with pytest.raises(AssertionError, match="filtered out|another distribution"):
                check_distribution(lambda o=others: draw_many(all_on(**o)), **options)


def test_the_check_fails_if_block_and_token_are_drawn_with_the_same_noise(monkeypatch):
    """The two steps of a draw must be independent of each other."""
    gumbel = jax.random.gumbel
    monkeypatch.setattr(
        jax.random, "gumbel", lambda key, shape: jnp.tile(gumbel(key, (4,)), 2)[: shape[0]]
    )
    keys, rows = jax.random.split(jax.random.key(0), DRAWS), jnp.broadcast_to(LOGITS, (DRAWS, V))
    with pytest.raises(AssertionError, match="another distribution"):
        check_distribution(lambda: jax.jit(sampling.choose)(rows, keys))


def test_a_vocabulary_that_fills_its_blocks_and_one_of_one_token_are_drawn_from_whole():
    for vocab in (16, 1):
        keys = jax.random.split(jax.random.key(1), 160)
        drawn = jax.jit(sampling.choose)(jnp.zeros((160, vocab)), keys)
        assert sorted(set(drawn.tolist())) == list(range(vocab))


def test_temperature_zero_is_the_likeliest_token_after_the_penalty():
    greedy = all_on(temperature=0, top_k=3, top_p=0.5)
    assert set(draw_many(greedy).tolist()) == {2}
    greedy = all_on(temperature=0, repetition_penalty=1.5)
    assert set(draw_many(greedy).tolist()) == {9}
    with pytest.raises(ValueError, match="seen_BV"):
        sampling.penalise(jnp.zeros((1, V)), None, make_sampling(repetition_penalty=1.5))


def test_equal_logits_are_filtered_together():
    logits, warp = jnp.array([[1.0, 3.0, 2.0, 2.0, 3.0, -0.0, 0.0]]), jax.jit(sampling.warp)
    kept = lambda **options: np.flatnonzero(
        np.isfinite(warp(logits, all_on(**options))[0])
    ).tolist()
    assert kept(top_k=1) == kept(top_p=1e-9) == kept(min_p=1.0) == [1, 4]
    assert kept(top_k=3) == kept(top_p=0.8) == [1, 2, 3, 4]
    assert kept(top_k=6) == kept(top_k=100) == kept() == list(range(7))


def test_other_values_compile_nothing():
    draw_many(all_on(temperature=0.3))
    before = draw_many._cache_size()
    draw_many(all_on(temperature=0.0, top_k=2, top_p=0.1, min_p=0.9, repetition_penalty=3.0))
    assert draw_many._cache_size() == before


def test_the_program_holds_only_the_filters_that_are_on_and_none_of_them_sorts():
    rows = jnp.zeros((3, V)), jax.random.split(jax.random.key(0), 3), None

    def primitives(options):
        return {e.primitive.name for e in equations(jax.make_jaxpr(draw)(*rows, options).jaxpr)}

    on, off = primitives(make_sampling(0.5, 3, 0.9, 0.1)), primitives(make_sampling())
    assert "scan" in on and "scan" not in off
    assert not {"sort", "top_k", "cumsum"} & on


def test_options_out_of_range_are_named_all_at_once():
    with pytest.raises(ValueError) as error:
        make_sampling(-1.0, top_k=2.5, top_p=0.0, min_p=math.nan, repetition_penalty=0.0)
    for wrong in ("temperature=-1.0", "top_k=2.5", "top_p=0.0", "min_p=nan", "penalty=0.0"):
        assert wrong in str(error.value)
    for wrong in (math.nan, math.inf, 1e-9):
        with pytest.raises(ValueError, match="temperature"):
            make_sampling(wrong)
    assert make_sampling() == Sampling(np.float32(1))
