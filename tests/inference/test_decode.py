"""Continuations of prompts by tiny random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference import decode
from jaxlm.inference.decode import make_decoder
from jaxlm.inference.sampling import make_sampling
from tests.models.tiny import get_logits, init_params, make_batch, make_bert, make_gpt

# Absolute positions and windows, which padding could disturb; models of all kinds: tests/models/test_cache.py
MODEL = make_gpt(
    num_layers=2, qk_norm=True, activation="swiglu", final_softcap=5.0, attention_windows=(4, 0)
)
PARAMS = init_params(MODEL, make_batch())
PROMPTS = [np.array(ids, np.int32) for ids in ([3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 8])]
GREEDY = make_sampling(temperature=0)


def stream(prompts=PROMPTS, num_ids=None, temperature=0.0, **options):
    options = dict(max_new_tokens=6, max_len=16) | options
    options["sampling"] = options.get("sampling", make_sampling(temperature=temperature))
    return decode.stream(make_decoder(MODEL, num_ids), PARAMS, prompts, **options)


def generate(prompts=PROMPTS, **options):
    """`decode.generate` with the other options of `stream`."""
    chunk = options.pop("chunk", None)
    pieces = list(stream(prompts, chunk=chunk, **options))
    return join(pieces)


def join(pieces):
    return [
        decode.Continuation(
            np.concatenate([piece.tokens for piece in row]),
            np.concatenate([piece.logprobs for piece in row]),
            row[-1].finish,
        )
        for row in zip(*pieces, strict=True)
    ]


def tokens_of(continuations):
    return [continuation.tokens.tolist() for continuation in continuations]


# --- greedy -----------------------------------------------------------------------------------------------------------


@jax.jit
def all_log_probs(tokens_BT, is_prefix_BT):
    batch = {"tokens": tokens_BT, "is_prefix": is_prefix_BT}
    return jax.nn.log_softmax(get_logits(MODEL, PARAMS, batch))


def check_greedy(continuations, is_prefix_lm=False):
    """Each new token is the likeliest one after all tokens before it, in a row of its own, with its log-probability."""
    rows, is_prefix = np.zeros((3, 16), np.int32), np.zeros((3, 16), bool)
    for row, prefix, prompt, new in zip(rows, is_prefix, PROMPTS, continuations, strict=True):
        assert len(new.tokens) == 6 and new.finish == "length"
        row[: len(prompt) + 6] = [*prompt, *new.tokens]
        prefix[: len(prompt)] = is_prefix_lm
    logs_BTV = np.asarray(all_log_probs(rows, is_prefix))
    for logs_TV, prompt, new in zip(logs_BTV, PROMPTS, continuations, strict=True):
        here = logs_TV[len(prompt) - 1 :][:6]
        assert here.argmax(-1).tolist() == new.tokens.tolist(), "not the likeliest"
        np.testing.assert_allclose(new.logprobs, here.max(-1), atol=1e-4)


def generate_greedily(**options):
    return decode.generate(
        make_decoder(MODEL, **options), PARAMS, PROMPTS, max_new_tokens=6, max_len=16, sampling=GREEDY
    )  # fmt: skip


@pytest.mark.core
def test_greedy_generation_is_the_repeated_argmax_of_the_whole_forward_pass():
    check_greedy(generate_greedily())


def test_a_prefix_lm_reads_its_prompt_in_both_directions():
    check_greedy(generate_greedily(is_prefix_lm=True), is_prefix_lm=True)


def test_the_check_of_the_prefix_fails_for_a_prompt_that_is_read_causally():
    with pytest.raises(AssertionError):
        check_greedy(generate_greedily(), is_prefix_lm=True)


def test_the_greedy_check_fails_for_sampled_text():
    with pytest.raises(AssertionError, match="not the likeliest"):
        check_greedy(generate(temperature=3.0))


def test_step_by_step_prefill_and_step_give_the_same_text():
    """As beam search uses them: with parameters as they are, and prepared."""
    decoder = make_decoder(MODEL)
    prepared = decoder.prepare(PARAMS)
    assert decoder.prepare(prepared) is prepared
    expected = tokens_of(generate())
    for params in (PARAMS, prepared):
        tokens, segment_ids = decode.pad_left(PROMPTS, 16)
        logits, cache = decoder.prefill(params, tokens, segment_ids, size=32)
        columns = []
        for _ in range(6):
            columns.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
            logits, cache = decoder.step(params, cache, columns[-1])
        assert np.stack(columns, axis=1).tolist() == expected


# --- rows -------------------------------------------------------------------------------------------------------------


def check_ragged(generate, **options):
    """A batch of prompts of many lengths gives what each gives alone."""
    together = generate(PROMPTS, **options)
    for prompt, continuation in zip(PROMPTS, together, strict=True):
        (alone,) = generate([prompt], **options)
        assert alone.tokens.tolist() == continuation.tokens.tolist()
        assert alone.finish == continuation.finish
        np.testing.assert_allclose(alone.logprobs, continuation.logprobs, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_ragged_prompts_gives_what_each_gives_alone(temperature):
    check_ragged(generate, temperature=temperature)


def test_the_ragged_check_fails_if_rows_are_padded_with_tokens_that_count():
    def padded(prompts, **options):
        longest = max(map(len, prompts))
        return generate([np.pad(p, (longest - len(p), 0)) for p in prompts], **options)

    with pytest.raises(AssertionError):
        check_ragged(padded)


def test_the_ragged_check_fails_if_draws_depend_on_the_row():
    def by_row(prompts, **options):
        return generate(prompts, samples=range(len(prompts)), **options)

    with pytest.raises(AssertionError):
        check_ragged(by_row, temperature=3.0)


def test_equal_prompts_give_samples_that_differ_and_do_not_depend_on_how_they_are_batched():
    prompt = PROMPTS[0]
    three = tokens_of(generate([prompt, prompt, prompt], temperature=2.0))
    assert three[0] != three[1] != three[2] != three[0]
    again = generate([PROMPTS[1], prompt, prompt], temperature=2.0, samples=[0, 2, 1])
    assert tokens_of(again)[1:] == [three[2], three[1]]


def test_a_seed_gives_one_text_and_another_seed_another():
    first, again, other = (tokens_of(generate(temperature=2.0, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_rows_of_a_padded_vocabulary_are_never_drawn():
    """With `num_ids` no id past it comes out, however likely the model finds it; without, some do."""
    prompts = [np.array([3, 1, 2], np.int32)] * 3
    draw = lambda num_ids: np.concatenate(
        tokens_of(generate(prompts, num_ids=num_ids, max_new_tokens=12, temperature=5.0))
    )
    assert draw(4).max() < 4
    assert draw(None).max() >= 4


def test_a_token_that_was_there_is_penalised_whether_prompt_or_new():
    """A penalty so large that no token comes twice, in a model whose logits are positive and negative."""
    sampling = make_sampling(temperature=0, repetition_penalty=1e6)
    for prompt, new in zip(PROMPTS, generate(sampling=sampling), strict=True):
        everything = [*prompt, *new.tokens]
        assert len(set(everything)) == len(set(prompt)) + len(new.tokens)
    assert any(len(set(row)) < len(row) for row in tokens_of(generate()))


# --- the end ----------------------------------------------------------------------------------------------------------


def test_generation_ends_before_eos():
    whole = generate()[0]
    eos = int(whole.tokens[3])
    first = whole.tokens.tolist().index(eos)
    ended = generate(eos_id=eos)[0]
    assert ended.tokens.tolist() == whole.tokens[:first].tolist()
    assert len(ended.logprobs) == first and ended.finish == "eos"


def test_each_row_ends_where_its_own_context_is_full():
    full = generate(max_new_tokens=50, eos_id=99)
    assert [len(p) + len(c.tokens) for p, c in zip(PROMPTS, full, strict=True)] == [16, 16, 16]
    assert {c.finish for c in full} == {"length"}
    none, *_ = generate([np.arange(16, dtype=np.int32), *PROMPTS[1:]])
    assert none.tokens.tolist() == [] and none.finish == "length"


def test_a_row_stops_at_the_token_where_stop_says_so_whatever_the_chunk():
    whole = generate()
    asked = []

    def stop(row, tokens):
        asked.append((row, len(tokens)))
        return row == 1 and len(tokens) == 3

    for chunk in (1, 4, None):
        asked.clear()
        stopped = generate(stop=stop, chunk=chunk)
        assert stopped[1].tokens.tolist() == whole[1].tokens[:3].tolist()
        assert [c.finish for c in stopped] == ["length", "stop", "length"]
        assert sorted(asked) == [(0, n) for n in range(1, 7)] + [(1, n) for n in (1, 2, 3)] + [
            (2, n) for n in range(1, 7)
        ]


def check_stream(pieces, chunk):
    """The first token comes alone, then `chunk` at a time; a row says that it has ended once and for all."""
    assert [len(piece.tokens) for piece, *_ in pieces] == [
        1,
        *[chunk] * (5 // chunk),
        *[5 % chunk] * (5 % chunk > 0),
    ]
    assert [piece.finish for piece, *_ in pieces] == [""] * (len(pieces) - 1) + ["length"]
    assert tokens_of(join(pieces)) == tokens_of(generate())


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_stream_yields_what_is_new(chunk):
    check_stream(list(stream(chunk=chunk)), chunk)


def test_the_stream_check_fails_for_a_stream_that_repeats_itself():
    pieces = list(stream(chunk=1))
    with pytest.raises(AssertionError):
        check_stream([join([pieces[: i + 1]][0]) for i in range(len(pieces))], 1)


def check_alternatives(continuations, num):
    """At each place they are the likeliest tokens after all tokens before it, with their log-probabilities."""
    for prompt, new in zip(PROMPTS, continuations, strict=True):
        row = np.zeros((3, 16), np.int32)
        row[0, : len(prompt) + 6] = [*prompt, *new.tokens]
        here = np.asarray(all_log_probs(row, np.zeros((3, 16), bool)))[0, len(prompt) - 1 :][:6]
        ids, logprobs = new.alternatives
        assert ids.shape == logprobs.shape == (6, num)
        np.testing.assert_allclose(logprobs, -np.sort(-here, axis=-1)[:, :num], atol=1e-4)
        np.testing.assert_allclose(logprobs, np.take_along_axis(here, ids, -1), atol=1e-4)


def test_the_likeliest_alternatives_are_told_and_change_nothing():
    options = dict(max_new_tokens=6, max_len=16, sampling=make_sampling(), seed=2, chunk=4)
    plain = decode.generate(make_decoder(MODEL), PARAMS, PROMPTS, **options)
    told = decode.generate(make_decoder(MODEL), PARAMS, PROMPTS, alternatives=4, **options)
    assert tokens_of(told) == tokens_of(plain) and plain[0].alternatives is None
    check_alternatives(told, 4)
    wrong = [new._replace(alternatives=tuple(x[:, ::-1] for x in new.alternatives)) for new in told]
    with pytest.raises(AssertionError):
        check_alternatives(wrong, 4)


# --- programs ---------------------------------------------------------------------------------------------------------


def count_programs():
    decoder = make_decoder(MODEL)
    jitted = (decoder.prefill, decoder.step, decoder.extend, decode.begin, decode.unstack_layers)
    return sum(function._cache_size() for function in jitted)


OPTIONS = [
    dict(),
    dict(max_new_tokens=3, temperature=0.7, seed=5),
    dict(max_new_tokens=15, eos_id=3, chunk=2),
    dict(stop=lambda row, tokens: len(tokens) > 2, chunk=1),
]


def check_few_programs():
    """Lengths of a bucket, numbers of tokens and values of options share their programs."""
    counts = []
    for lengths, options in zip(
        [(5, 3, 1), (9, 1, 2), (15, 2, 3), (4, 6, 1)], OPTIONS, strict=True
    ):
        generate([np.arange(n, dtype=np.int32) for n in lengths], **options)
        counts.append(count_programs())
        assert counts[-1] == counts[0], "compiled again"


def test_neither_prompt_length_nor_number_of_tokens_nor_options_compile_anything_again():
    check_few_programs()


def test_the_program_check_fails_without_rounding(monkeypatch):
    monkeypatch.setattr(decode, "round_up", lambda length, most: length)
    with pytest.raises(AssertionError, match="compiled again"):
        check_few_programs()


def step_flops(size):
    """Of one new token in each of 3 rows, as XLA counts them, with room for `size` tokens."""
    decoder = make_decoder(MODEL)
    tokens = jax.ShapeDtypeStruct((3, 16), jnp.int32)
    _, cache = jax.eval_shape(lambda p, t: decoder._prefill(p, t, t, size), PARAMS, tokens)
    new = jax.ShapeDtypeStruct((3,), jnp.int32)
    return decoder.step.lower(PARAMS, cache, new).cost_analysis()["flops"]


def check_step_cost(flops):
    """More room costs what attention over it costs, and nothing else: 2 products of N x H for each slot and layer."""
    c, more = MODEL.config, 4096
    attention = 3 * c.num_layers * more * 2 * 2 * c.num_heads * c.head_dim
    assert attention <= flops(64 + more) - flops(64) <= 2 * attention  # mask and softmax, too


def test_a_token_costs_no_more_with_room_for_more_than_attention_does():
    check_step_cost(step_flops)


def test_the_cost_check_fails_if_all_tokens_are_read_again():
    def whole(size):
        batch = {"tokens": jax.ShapeDtypeStruct((3, size), jnp.int32)}
        read = jax.jit(
            lambda p, b: get_logits(MODEL.clone(config=make_decoder(MODEL).model.config), p, b)
        )
        return read.lower(PARAMS, batch).cost_analysis()["flops"]

    with pytest.raises(AssertionError):
        check_step_cost(whole)


# --- what cannot be done ----------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_the_prompts_is_listed():
    prompts = [np.zeros(17, np.int32), np.array([3, 32, -1]), np.zeros(0, np.int32)]
    with pytest.raises(ValueError) as error:
        generate(prompts, max_new_tokens=0)
    for part in (
        "max_new_tokens=0",
        "row 0 has 17 tokens",
        "row 1 has ids [-1, 32]",
        "row 2 has 0",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no prompts"):
        generate([])
    with pytest.raises(ValueError, match="max_len=17: the model has 16 positions"):
        generate(max_len=17)


def test_models_that_do_not_continue_text_are_refused():
    with pytest.raises(ValueError, match="BERT writes no text"):
        make_decoder(make_bert())
