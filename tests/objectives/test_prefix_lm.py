"""What follows a prefix is predicted, and nothing else; the prefix is seen whole."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import gpt
from jaxlm.models.transformer import make_view
from jaxlm.objectives import CausalLM, PrefixLM, Seq2SeqPrefixLM
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.compiling import stand_in_tokenizer
from jaxlm.program import make_program, resolve_kernel
from tests.models.test_laws import Ignoring
from tests.models.tiny import init_params, make_gpt, run
from tests.objectives.documents import (
    LENGTHS,
    check_decoder_row,
    documents_of,
    many_windows,
    window_of,
)

T = 64


def test_the_picture(tokenizer):
    the, cat, sat, on, a, dog = range(10, 16)
    raw = np.array([1, the, cat, sat, on, 2, 1, a, dog], np.int32)
    segment_ids = np.array([1] * 6 + [2] * 3, np.int32)
    example = {"tokens": raw, "segment_ids": segment_ids}
    example["positions"] = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2], np.int32)
    lengths = set()
    for seed in range(60):
        row = PrefixLM(tokenizer).corrupt(np.random.default_rng(seed), example, 8)
        prefix = row["is_prefix"].astype(int).tolist()
        if prefix == [1, 1, 1, 0, 0, 0, 1, 0]:
            assert row["tokens"].tolist() == [1, the, cat, sat, on, 2, 1, a]
            assert row["labels"].tolist() == [the, cat, sat, on, 2, 1, a, dog]
            assert row["weights"].tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
        lengths.add((sum(prefix[:6]), sum(prefix[6:])))
    assert lengths == {(m, n) for m in (1, 2, 3, 4, 5) for n in (1, 2)}

    for seed in range(200):
        row = Seq2SeqPrefixLM(tokenizer, "pad").corrupt(np.random.default_rng(seed), example, 8)
        if row["encoder_tokens"].tolist() == [the, cat, a, 0, 0, 0, 0, 0]:
            break
    assert row["encoder_segment_ids"].tolist() == [1, 1, 2, 0, 0, 0, 0, 0]
    assert row["labels"].tolist() == [sat, on, 2, dog, 0, 0, 0, 0]
    assert row["tokens"].tolist() == [0, sat, on, 0, 0, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 0, 0, 0, 0]


def check_prefixes(objective, example, seq_len):
    """The row is that of causal modelling; each document begins with a prefix, and all that follows it is predicted."""
    row = objective.corrupt(np.random.default_rng(0), example, seq_len)
    causal = CausalLM.corrupt(objective, None, example, seq_len)
    for key in ("tokens", "labels", "segment_ids", "positions"):
        np.testing.assert_array_equal(row[key], causal[key])
    for segment in np.unique(example["segment_ids"]):
        prefix = row["is_prefix"][row["segment_ids"] == segment].astype(int)
        assert not prefix.size or prefix[0] == 1
        assert (np.diff(prefix) <= 0).all(), "a prefix in two parts"
    follows = np.append(row["is_prefix"][1:], False)
    np.testing.assert_array_equal(row["weights"] > 0, (causal["weights"] > 0) & ~follows)
    assert not row["is_prefix"][row["segment_ids"] == 0].any()


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 2**32 - 1))
def test_a_decoder_predicts_all_that_follows_a_prefix(tokenizer, make_example, lengths, seed):
    example = window_of(make_example, np.random.default_rng(seed), lengths, T + 1)
    check_prefixes(PrefixLM(tokenizer), example, T)


def test_the_law_of_prefixes_fails_for_labels_within_them(tokenizer, make_example):
    class Wrong(PrefixLM):
        def corrupt(self, rng, example, seq_len):
            row = super().corrupt(rng, example, seq_len)
            return {**row, "weights": row["weights"] * ~row["is_prefix"]}

    example = window_of(make_example, np.random.default_rng(1), (30, 40), T + 1)
    check_prefixes(PrefixLM(tokenizer), example, T)
    with pytest.raises(AssertionError):
        check_prefixes(Wrong(tokenizer), example, T)


def check_pair(objective, example, seq_len, tokenizer):
    """Encoder's row and labels, document by document, are the documents without [bos]."""
    row = objective.corrupt(np.random.default_rng(0), example, seq_len)
    check_decoder_row(row, tokenizer.bos_id)
    sources = documents_of(row["encoder_tokens"], row["encoder_segment_ids"])
    labels = documents_of(row["labels"], row["segment_ids"])
    expected = documents_of(example["tokens"], example["segment_ids"], skip={tokenizer.bos_id})
    found = {s: tokens + labels.get(s, []) for s, tokens in sources.items()}
    assert found == {s: tokens for s, tokens in expected.items() if tokens}
    return row


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.25, 0.5]))
def test_the_pair_gives_back_the_documents(tokenizer, make_example, lengths, seed, rate):
    objective, rng = Seq2SeqPrefixLM(tokenizer, rate=rate), np.random.default_rng(seed)
    lengths = [max(8, n) for n in lengths]
    size, skip = objective.window(T).length, int(rng.integers(lengths[0]))
    example = window_of(make_example, rng, lengths, size, skip)
    check_pair(objective, example, T, tokenizer)


def test_the_round_trip_fails_for_one_prefix_for_all_documents(tokenizer, make_example):
    class Wrong(Seq2SeqPrefixLM):
        def corrupt(self, rng, example, seq_len):
            row = super().corrupt(rng, example, seq_len)
            return {**row, "segment_ids": np.minimum(row["segment_ids"], 1)}

    with pytest.raises(AssertionError):
        example = window_of(make_example, np.random.default_rng(1), (30, 34), T)
        check_pair(Wrong(tokenizer), example, T, tokenizer)


def check_rates(objective, make_example, tokenizer, rate, tolerance):
    """Over 10,000 documents the predicted share of the tokens is `rate`; with a rate of its own a row's, exactly."""
    predicted = total = 0
    for example in many_windows(make_example, objective.window(512).length):
        row = objective.corrupt(np.random.default_rng([1, total]), example, 512)
        tokens = len(example["tokens"])
        if isinstance(objective, Seq2SeqPrefixLM):
            tokens -= (example["tokens"] == tokenizer.bos_id).sum()
        if getattr(objective, "rate", 0):
            assert row["weights"].sum() == round(objective.rate * tokens)
        predicted, total = predicted + row["weights"].sum(), total + tokens
    assert abs(predicted / total - rate) < tolerance, predicted / total


def test_half_of_the_text_or_the_asked_share_is_predicted(tokenizer, make_example):
    check_rates(PrefixLM(tokenizer), make_example, tokenizer, 0.5, 0.01)
    check_rates(Seq2SeqPrefixLM(tokenizer), make_example, tokenizer, 0.49, 0.01)  # no empty prefix
    quarter = Seq2SeqPrefixLM(tokenizer, rate=0.25)
    check_rates(quarter, make_example, tokenizer, 0.25, 0.001)
    assert quarter.window(512).length == 683 and quarter.target_len(512) == 171
    with pytest.raises(AssertionError):
        check_rates(CausalLM(tokenizer), make_example, tokenizer, 0.5, 0.01)


SEGMENTS = np.array([1] * 7 + [2] * 5)
PREFIX = np.array([1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0], bool)
SEES = np.tril(np.ones((12, 12), bool)) | (PREFIX[:, None] & PREFIX[None])
SEES &= SEGMENTS[:, None] == SEGMENTS[None]


def check_prefix_is_seen_whole(model):
    """An output changes with those tokens that it may see: the prefix's with all of it, nothing with another segment's.

    Row s of a batch has another token at s; the last row has none.
    """
    tokens = np.tile(np.arange(12), (13, 1))
    tokens[np.arange(12), np.arange(12)] += 12
    rows = {"tokens": tokens, "segment_ids": SEGMENTS[None], "is_prefix": PREFIX[None]}
    batch = {key: jnp.asarray(np.broadcast_to(value, (13, 12))) for key, value in rows.items()}
    hidden = np.asarray(run(model, init_params(model, batch), batch).hidden)
    changed = abs(hidden[:12] - hidden[12]).max(-1).T  # (T, S)
    assert (changed[SEES] > 1e-4).all(), "a place of a prefix is not seen"
    assert (changed[~SEES] < 1e-6).all(), "a place sees what it should not"


def test_a_decoder_sees_its_prefix_whole():
    check_prefix_is_seen_whole(make_gpt(num_layers=2, unroll=0))
    with pytest.raises(AssertionError):
        check_prefix_is_seen_whole(Ignoring(make_gpt(num_layers=1), "is_prefix"))


def test_fused_kernels_give_way_to_the_reference_where_there_is_a_prefix():
    segments, prefix = jnp.asarray(SEGMENTS[None]), jnp.asarray(PREFIX[None])
    config = make_gpt(attention_kernel="splash").config
    view = make_view(config, 0, segments, segments, True, is_prefix_BT=prefix)
    np.testing.assert_array_equal(view.mask_BTS[0], SEES)
    assert make_view(config, 0, segments, segments, True).mask_BTS is None


@pytest.mark.parametrize("objective", ["prefix_lm", "mixture"])
def test_a_run_with_prefixes_says_that_the_reference_attends(objective, caplog):
    config = gpt.get_config(f"tiny,objective={objective}")
    mesh = make_mesh(devices=jax.devices()[:1])
    tokenizer = stand_in_tokenizer(config.model.vocab_size, config.tokenizer.num_sentinels)
    config.attention_kernel = "splash_interpret"
    with pytest.raises(ValueError, match="only the reference lets a prefix.*\n.*'auto'"):
        make_program(config, mesh, tokenizer)
    chip = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]), shape={})
    options = make_gpt(attention_kernel="auto").config
    assert resolve_kernel(options, chip).attention_kernel == "splash"
    with caplog.at_level("INFO", logger="jaxlm"):
        assert resolve_kernel(options, chip, has_prefix=True).attention_kernel == "xla"
    assert "not by splash:\n  objective 'prefix_lm'" in caplog.text
