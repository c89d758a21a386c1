"""Continuations and filled masks from tiny random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxlm.inference import decode
from tests.models.tiny import MODERN, get_logits, init_params, make_batch, make_bert, make_gpt

MODEL = make_gpt(**MODERN, num_layers=2, final_softcap=5.0)
PARAMS = init_params(MODEL, make_batch())
PROMPTS = [np.array(ids, np.int32) for ids in ([3, 1, 4, 1, 5], [2], [7, 1, 8])]


def generate(prompts=PROMPTS, model=MODEL, **options):
    options = dict(max_new_tokens=6, max_len=16) | options
    return decode.generate(decode.make_apply_logits(model), PARAMS, prompts, **options)


@jax.jit
def last_logits(tokens_BT, place):
    return get_logits(MODEL, PARAMS, {"tokens": tokens_BT})[0, place]


def check_greedy(continuations):
    """Each new token is the likeliest one after all tokens before it, in a row of its own."""
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(prompt)] = prompt
        assert len(continuation) == 6
        for place, token in enumerate(continuation, len(prompt)):
            assert token == int(jnp.argmax(last_logits(row, place - 1))), "not the likeliest"
            row[0, place] = token


@pytest.mark.core
def test_greedy_generation_is_the_repeated_argmax_of_the_whole_forward_pass():
    check_greedy(generate())


def test_the_greedy_check_fails_for_sampled_text():
    with pytest.raises(AssertionError, match="not the likeliest"):
        check_greedy(generate(temperature=3.0))


def check_independence(generate):
    together = generate(PROMPTS)
    for row in range(3):
        others = [PROMPTS[row] if i == row else np.array([9, 9, 9, 9], np.int32) for i in range(3)]
        np.testing.assert_array_equal(generate(others)[row], together[row])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_in_a_batch_do_not_affect_each_other(temperature):
    check_independence(lambda prompts: generate(prompts, temperature=temperature))


def test_the_independence_check_fails_if_rows_are_padded_with_tokens_that_count():
    def padded(prompts):
        longest = max(map(len, prompts))
        return generate([np.pad(p, (longest - len(p), 0)) for p in prompts])

    with pytest.raises(AssertionError):
        check_independence(padded)


def test_rows_of_a_padded_vocabulary_are_never_drawn():
    """With `num_ids` no id past it comes out, however likely the model finds it; without, some do."""

    def draw(num_ids):
        apply_logits = decode.make_apply_logits(MODEL, num_ids)
        options = dict(max_new_tokens=12, max_len=16, temperature=5.0)
        return np.concatenate(decode.generate(apply_logits, PARAMS, PROMPTS, **options))

    assert draw(4).max() < 4
    assert draw(None).max() >= 4


def test_neither_prompt_length_nor_number_of_tokens_compiles_anything_again():
    generate()
    before = decode.decode._cache_size()
    generate([np.arange(n, dtype=np.int32) for n in (1, 9, 2)], max_new_tokens=3, temperature=0.7)
    generate(seed=5, eos_id=3)
    assert decode.decode._cache_size() == before
    generate(top_k=2)
    assert decode.decode._cache_size() == before + 1


def test_a_seed_gives_one_text_and_another_seed_another():
    first, again, other = (generate(temperature=2.0, seed=seed) for seed in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_generation_ends_before_eos_and_at_the_end_of_the_buffer():
    whole = generate()[0]
    eos = int(whole[3])
    first = int(np.flatnonzero(whole == eos)[0])
    np.testing.assert_array_equal(generate(eos_id=eos)[0], whole[:first])
    short = generate(max_new_tokens=50)
    assert [len(p) + len(c) for p, c in zip(PROMPTS, short, strict=True)] == [16, 16, 16]


def check_sampling(sample):
    logits = jnp.tile(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), (4000, 1))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = lambda temperature, k: np.bincount(
        sample(logits, keys, jnp.float32(temperature), k), minlength=3
    )
    np.testing.assert_allclose(draw(1.0, 0) / 4000, [0.1, 0.6, 0.3], atol=0.03)
    np.testing.assert_allclose(draw(1.0, 2) / 4000, [0, 2 / 3, 1 / 3], atol=0.03)
    np.testing.assert_array_equal(draw(0.0, 0), [0, 4000, 0])
    np.testing.assert_array_equal(draw(1.0, 1), [0, 4000, 0])


def test_samples_come_from_the_top_k_in_their_proportions():
    check_sampling(decode.sample)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, keys, temperature, k: (logits, keys, temperature, k and k + 1),
        lambda logits, keys, temperature, k: (logits * 1.3, keys, temperature, k),
        lambda logits, keys, temperature, k: (
            logits,
            jnp.broadcast_to(keys[:1], keys.shape),
            temperature,
            k,
        ),
    ],
    ids=["one too many", "sharper", "one key for all rows"],
)
def test_the_sampling_check_fails(change):
    with pytest.raises(AssertionError):
        check_sampling(lambda *options: decode.sample(*change(*options)))


def test_rows_that_do_not_fit_are_all_listed():
    with pytest.raises(ValueError, match="max_len=16.*row 0 has 17.*row 2 has 0"):
        generate([np.zeros(17, np.int32), np.zeros(3, np.int32), np.zeros(0, np.int32)])


def test_masks_are_filled_with_the_likeliest_tokens():
    model = make_bert(num_layers=2)
    params = init_params(model, make_batch())
    rows = [np.array(ids, np.int32) for ids in ([5, 31, 7, 31, 31, 2], [31, 4], [1, 2, 3])]
    filled = decode.fill_mask(
        decode.make_apply_logits(model), params, rows, mask_id=31, max_len=16, top_k=4
    )
    assert [len(row) for row in filled] == [3, 1, 0]
    get_jitted = jax.jit(lambda batch: get_logits(model, params, batch))
    for row, found in zip(rows, filled, strict=True):
        padded = np.zeros((1, 6), np.int32)
        padded[0, : len(row)] = row
        segment_ids = (np.arange(6) < len(row)).astype(np.int32)[None]
        logits = np.asarray(get_jitted({"tokens": padded, "segment_ids": segment_ids})[0])
        probs = scipy.special.softmax(logits, axis=-1)
        for place, (ids, p) in zip(np.flatnonzero(row == 31), found, strict=True):
            np.testing.assert_array_equal(ids, np.argsort(-probs[place])[:4])
            np.testing.assert_allclose(p, probs[place][ids], rtol=1e-4)
