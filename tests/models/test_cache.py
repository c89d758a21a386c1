"""A decoder with a cache says what it says without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference.logits import unembed
from jaxlm.models import attention, cache, transformer
from jaxlm.models.cache import make_cache
from tests.models.tiny import CLASSIC, MODERN, get_logits, init_params, make_gpt

ROWS, LENGTH, SIZE = 3, 12, 16
PADDING = (4, 0, 6)  # on the left of each row
GEMMA = dict(
    norm="rms_norm",
    norm_position="sandwich",
    norm_scale_offset=1.0,
    position="rotary",
    activation="geglu_tanh",
    scale_embeddings=True,
    attention_softcap=2.0,
    final_softcap=3.0,
    query_scale=0.3,
)
FAMILIES = {
    "gpt2": CLASSIC | dict(num_kv_heads=4, num_layers=2),
    "llama3": MODERN | dict(rope_scaling=(8.0, 1.0, 4.0, 8.0), tie_embeddings=False, num_layers=2),
    "gemma3": GEMMA
    | dict(attention_windows=(3, 3, 0), rope_local_theta=100.0, rope_scaling=(4.0,)),
    "experts": MODERN | dict(num_experts=4, expert_capacity_factor=0.5, num_layers=2),
    "shared layers": dict(share_layers=True, norm_position="post", position="sinusoidal"),
}


def make_inputs(seed=0):
    """Rows padded on the left, with the positions that they have without padding."""
    tokens = np.random.default_rng(seed).integers(0, 32, (ROWS, LENGTH)).astype(np.int32)
    place = np.arange(LENGTH)[None] - np.array(PADDING)[:, None]
    segment_ids = (place >= 0).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": np.maximum(place, 0)}


@functools.lru_cache
def read_whole(model):
    """(parameters, logits (B, T, V)) of the whole rows at once."""
    params = init_params(model, make_inputs())
    return params, jax.jit(lambda p: get_logits(model, p, make_inputs()))(params)


def read_in_parts(model, params, batch, prompt):
    """Logits (B, T - prompt + 1, V): of the last of `prompt` tokens read at once, then of one token at a time."""

    def read(stored, part):
        out = model.apply({"params": params}, part, cache=stored)
        return out.cache, unembed(out, out.hidden[:, -1:])[:, 0]

    first = {name: batch[name][:, :prompt] for name in ("tokens", "segment_ids")}
    rest = {name: batch[name][:, prompt:].T[:, :, None] for name in first}
    stored, logits_BV = read(make_cache(model.config, ROWS, SIZE), first)
    _, logits_TBV = jax.lax.scan(read, stored, rest)
    return jnp.concatenate([logits_BV[:, None], logits_TBV.swapaxes(0, 1)], axis=1)


def check_cached_logits(prompt=7, **fields):
    model, batch = make_gpt(**fields), make_inputs()
    params, whole = read_whole(model)
    cached = jax.jit(lambda p: read_in_parts(model, p, batch, prompt))(params)
    whole, real = whole[:, prompt - 1 :], batch["segment_ids"][:, prompt - 1 :] > 0
    assert np.abs(whole[real]).max() > 0.1
    np.testing.assert_allclose(cached[real], whole[real], atol=1e-4, rtol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_with_a_cache_are_those_without_at_each_step(name):
    check_cached_logits(**FAMILIES[name])


def no_window(real):
    return lambda stored, segment_ids, window, prefix: real(stored, segment_ids, 0, prefix)


def sees_padding(real):
    def mask(stored, segment_ids, window, prefix):
        everywhere = stored.replace(segment_ids=jnp.ones_like(stored.segment_ids))
        return real(everywhere, jnp.ones_like(segment_ids), window, prefix)

    return mask


def sees_the_next_slot(real):
    def mask(stored, segment_ids, window, prefix):
        return real(stored.replace(end=stored.end + 1), segment_ids, window, prefix)

    return mask


def counts_slots(real):
    def positions(stored, segment_ids):
        return stored.end + jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)

    return positions


def one_layer_for_all(real):
    return lambda stored, layer, *rest: real(stored, jnp.zeros_like(layer), *rest)


def always_the_first_slots(real):
    def write(stored, *rest):
        return real(stored.replace(end=jnp.int32(0)), *rest).replace(end=stored.end)

    return write


WRONG = {
    "no window": (transformer, "slot_mask", no_window),
    "padding is seen": (transformer, "slot_mask", sees_padding),
    "an empty slot is seen": (transformer, "slot_mask", sees_the_next_slot),
    "padding is counted": (transformer, "next_positions", counts_slots),
    "all layers write into one": (attention, "write_layer", one_layer_for_all),
    "new tokens replace the first": (attention, "write_layer", always_the_first_slots),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_check_fails_for_a_wrong_cache(name, monkeypatch):
    module, function, change = WRONG[name]
    monkeypatch.setattr(module, function, change(getattr(module, function)))
    with pytest.raises(AssertionError, match="Not equal"):
        check_cached_logits(num_layers=2, attention_windows=(5,))


def check_heads(make):
    """Of 4 heads that share 2 kv heads, the cache holds 2: (L, B, K, S, H), twice."""
    config = make_gpt(num_heads=4, num_kv_heads=2).config
    made = jax.eval_shape(lambda: make(config, 5, 8))
    assert made.key.shape == made.value.shape == (3, 5, 2, 8, 4)
    assert made.segment_ids.shape == (5, 8)


def test_the_cache_holds_kv_heads_only():
    check_heads(make_cache)


def test_the_heads_check_fails_for_a_cache_of_all_heads():
    with pytest.raises(AssertionError):
        check_heads(lambda config, *sizes: make_cache(make_gpt(num_kv_heads=4).config, *sizes))


def test_a_grown_cache_keeps_what_it_has_and_taken_rows_are_those_asked_for():
    stored = make_cache(make_gpt().config, 2, 4)
    stored = stored.replace(
        key=stored.key + jnp.arange(4.0)[None, None, None, :, None],
        segment_ids=jnp.array([[0, 1, 1, 0], [1, 1, 1, 0]]),
        end=jnp.int32(3),
    )
    grown = cache.grow(stored, 6)
    np.testing.assert_array_equal(grown.key[0, 0, 0, :, 0], [0, 1, 2, 3, 0, 0])
    np.testing.assert_array_equal(grown.segment_ids[0], [0, 1, 1, 0, 0, 0])
    assert grown.size == 6 and grown.end == 3
    taken = cache.take_rows(stored, jnp.array([1, 1, 0]))
    np.testing.assert_array_equal(taken.segment_ids[:, 0], [1, 1, 0])
    assert taken.key.shape[1] == 3


def test_positions_count_the_tokens_of_a_row_and_not_its_padding():
    stored = make_cache(make_gpt().config, 2, 8)
    stored = cache.add_segments(stored, jnp.array([[0, 0, 1], [1, 1, 1]]))
    new = jnp.array([[1, 1], [1, 1]])
    np.testing.assert_array_equal(cache.next_positions(stored, new), [[1, 2], [3, 4]])
    first = cache.next_positions(make_cache(make_gpt().config, 2, 8), jnp.array([[0, 0, 1]]))
    np.testing.assert_array_equal(first[0], [0, 0, 0])
