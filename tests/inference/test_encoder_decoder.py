"""Text from an encoder-decoder: what its decoder would write if it read everything again for each token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlm.inference import decode
from jaxlm.inference.beam import beam_search
from jaxlm.inference.logits import unembed
from jaxlm.inference.sampling import make_sampling
from jaxlm.models import EncoderDecoder, TransformerConfig

V, START, EOS, NEW = 23, 3, 1, 7
SIZES = dict(vocab_size=V, emb_dim=16, num_layers=1, num_decoder_layers=2, num_heads=2)
SIZES |= dict(num_kv_heads=2, head_dim=6, mlp_dim=20, max_len=16, init_std=0.4)
CONFIGS = {
    "t5": dict(norm="rms_norm", position="relative", relative_buckets=8, query_scale=1.0),
    "bart": dict(norm_position="post", position_offset=2, embed_norm=True),
}
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(2, V, n).astype(np.int32) for n in (3, 9, 1, 14)]
GREEDY = make_sampling(temperature=0)


@functools.cache
def make(name):
    model = EncoderDecoder(TransformerConfig(**SIZES, **CONFIGS[name]))
    batch = dict.fromkeys(("tokens", "encoder_tokens"), jnp.ones((1, 2), jnp.int32))
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(1), batch)["params"])
    rng = np.random.default_rng(0)
    draw = lambda x: (rng.standard_normal(x.shape) * 0.4 + (x.shape[-1:] == x.shape)).astype("f")
    return model, jax.tree.map(draw, shapes)


@functools.cache
def make_decoder(name):
    return decode.make_decoder(make(name)[0], start_id=START)


@functools.cache
def scorer(name):
    """(prompt, written) -> log-probabilities (V,) of what comes next, all read anew; of one shape each."""
    model, params = make(name)

    @jax.jit
    def logits(batch, last):
        outputs = model.apply({"params": params}, batch)
        return jax.nn.log_softmax(unembed(outputs, outputs.hidden, V)[0, last])

    def score(prompt, written):
        tokens, segment_ids = decode.pad_right([np.array([START, *written], np.int32)], 16)
        source, source_ids = decode.pad_right([prompt], 16)
        batch = {"tokens": tokens, "segment_ids": segment_ids}
        batch |= {"encoder_tokens": source, "encoder_segment_ids": source_ids}
        return np.asarray(logits(batch, len(written)))

    return score


def write_greedily(name, prompt):
    written = []
    while len(written) < NEW:
        token = int(np.argmax(scorer(name)(prompt, written)))
        if token == EOS:
            break
        written.append(token)
    return written


def write(decoder, params, prompts, **options):
    options = dict(max_new_tokens=NEW, max_len=16, sampling=GREEDY, eos_id=EOS) | options
    return decode.generate(decoder, params, prompts, **options)


def check_greedy(name, decoder):
    """A ragged batch's texts and log-probabilities."""
    found = write(decoder, make(name)[1], PROMPTS)
    expected = [write_greedily(name, prompt) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1
    assert [row.tokens.tolist() for row in found] == expected, "another text"
    for row, prompt, text in zip(found, PROMPTS, expected, strict=True):
        own = [scorer(name)(prompt, text[:n])[text[n]] for n in range(len(text))]
        np.testing.assert_allclose(row.logprobs, own, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_that_of_the_model_without_a_cache(name):
    check_greedy(name, make_decoder(name))


def test_the_check_fails_where_learned_positions_are_those_of_padding_on_the_left(monkeypatch):
    expected = {tuple(prompt): write_greedily("bart", prompt) for prompt in PROMPTS}
    monkeypatch.setitem(globals(), "write_greedily", lambda name, prompt: expected[tuple(prompt)])
    monkeypatch.setattr(decode, "pad_right", decode.pad_left)
    with pytest.raises(AssertionError, match="another text"):
        check_greedy("bart", make_decoder("bart"))


def best_beams(name, prompt, width):
    """Beam search in a few lines, without an eos: (tokens, mean log-probability), the best first."""
    beams = [((), 0.0)]
    for _ in range(4):
        scored = [(text, total, scorer(name)(prompt, list(text))) for text, total in beams]
        candidates = [((*text, t), total + s[t]) for text, total, s in scored for t in range(V)]
        beams = sorted(candidates, key=lambda beam: -beam[1])[:width]
    return [(text, total / 4) for text, total in beams]


def test_beams_are_those_of_the_model_without_a_cache():
    options = dict(num_beams=3, num_return=3, max_new_tokens=4, max_len=16)
    found = beam_search(make_decoder("t5"), make("t5")[1], PROMPTS[:2], **options)
    for prompt, beams in zip(PROMPTS[:2], found, strict=True):
        expected = best_beams("t5", prompt, 3)
        assert [tuple(beam.tokens.tolist()) for beam in beams] == [text for text, _ in expected]
        scores = [score for _, score in expected]
        np.testing.assert_allclose([beam.score for beam in beams], scores, atol=1e-4)


def test_a_first_token_and_an_end_that_are_forced_cost_nothing():
    model, params = make("bart")
    forced = decode.make_decoder(model, start_id=START, first_id=5, must_end=True)
    options = dict(num_beams=2, max_new_tokens=3, max_len=16, length_penalty=0.0, eos_id=EOS)
    ((beam,),) = beam_search(forced, params, PROMPTS[:1], **options)
    assert beam.tokens[0] == 5 and len(beam.tokens) == 2
    own = scorer("bart")(PROMPTS[0], [5])[beam.tokens[1]]
    np.testing.assert_allclose(beam.score, own, atol=1e-4)


def test_learned_positions_bound_what_is_written_and_relative_ones_do_not():
    for name, most in (("bart", 16), ("t5", 40)):
        *_, size, limits = make_decoder(name).lay(PROMPTS, 40, 16)
        assert limits.tolist() == [most] * 4 and size >= most


def test_a_repetition_penalty_knows_what_the_decoder_read_and_not_the_prompt():
    decoder = make_decoder("t5")
    assert np.flatnonzero(decoder.find_seen(PROMPTS)[1]).tolist() == [START]


def test_prepared_parameters_are_those_of_the_decoders_layers_one_by_one():
    decoder, params = make_decoder("t5"), make("t5")[1]
    prepared = decoder.prepare(params)
    if decoder.is_unrolled:
        assert isinstance(prepared["decoder"]["layers"], tuple)
        assert prepared["encoder"] is params["encoder"]
    assert decoder.prepare(prepared) is prepared
