"""What is hidden can be told from the pair, exactly as much as asked is hidden, and T5's procedure gives the same pair."""

import dataclasses
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.objectives import SpanCorruption
from jaxlm.objectives.span_corruption import count, draw_spans, fit
from jaxlm.objectives.spans import Runs, Spans, cut, place, share
from tests.objectives.documents import LENGTHS, check_decoder_row, many_windows, window_of

T = 64


def restore(row, tokenizer):
    """The documents of a pair, {segment: tokens}: each sentinel of the encoder's row is replaced by what follows it in the labels."""
    documents = {}
    sources, segments = row["encoder_tokens"], row["encoder_segment_ids"]
    labels = {s: row["labels"][row["segment_ids"] == s].tolist() for s in np.unique(segments)}
    for segment in np.unique(segments[segments > 0]):
        answers: dict[int, list[int]] = {}
        for token in labels[segment]:
            if token in tokenizer.sentinel_ids:
                assert token == tokenizer.sentinel_ids[len(answers)], "sentinels out of order"
                answers[token] = []
            elif token != tokenizer.eos_id:
                answers[list(answers)[-1]].append(token)
        restored = []
        for token in sources[segments == segment].tolist():
            is_sentinel = token in tokenizer.sentinel_ids
            assert token in answers or not is_sentinel, "a sentinel without its target"
            restored += answers.pop(token) if is_sentinel else [token]
        assert not answers, "a target without its sentinel in the encoder's row"
        documents[int(segment)] = restored
    return documents


def check_round_trip(objective, example, seq_len, tokenizer, whole=True):
    """The pair gives back every document of the example, but for [bos]; if not `whole`, up to some token.

    As sentinels are looked for in their own document, this fails for a span in two documents, too.
    """
    row = objective.corrupt(np.random.default_rng(0), example, seq_len)
    expected = {
        int(s): [t for t in example["tokens"][example["segment_ids"] == s].tolist() if t != 1]
        for s in np.unique(example["segment_ids"])
    }
    # A document of which the window has [bos] alone leaves nothing, so [eos] ends the one before it.
    expected = {s: tokens for s, tokens in expected.items() if tokens} or {1: []}
    last = list(expected)[-1]
    if expected[last][-1:] != [tokenizer.eos_id]:
        expected[last].append(tokenizer.eos_id)
    found = restore(row, tokenizer)
    if whole:
        assert found == expected
    found = sum(found.values(), [])
    assert found[:-1] == sum(expected.values(), [])[: len(found) - 1]
    check_decoder_row(row, tokenizer.bos_id)
    return row


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.15, 0.5]), st.integers(1, 5))
@hypothesis.example(lengths=[13, 56, 13], seed=29987, density=0.15, span=3)  # ends with a [bos]
def test_the_pair_gives_back_the_documents(tokenizer, make_example, lengths, seed, density, span):
    objective = SpanCorruption(tokenizer, noise_density=density, mean_span=float(span))
    rng, size = np.random.default_rng(seed), objective.window(T).length
    example = window_of(make_example, rng, lengths, size, skip=int(rng.integers(lengths[0])))
    check_round_trip(objective, example, T, tokenizer, whole=min(lengths) > 12)


def one_run(tokens, segment_ids, tables):
    """Wrong on purpose: the text of a row as one, whatever its documents are."""
    return Runs(np.zeros(1, np.int64), np.array([len(tokens)]))


def test_the_round_trip_fails_for_spans_in_two_documents(tokenizer, make_example, monkeypatch):
    monkeypatch.setattr("jaxlm.objectives.span_corruption.Runs.of", one_run)
    objective, rng = SpanCorruption(tokenizer, noise_density=0.5), np.random.default_rng(0)
    with pytest.raises((AssertionError, IndexError)):
        for _ in range(20):
            check_round_trip(objective, make_example(rng, (30, 35, 20)), T, tokenizer)


def test_the_picture(tokenizer):
    bos, eos, s0, s1 = 1, 2, *tokenizer.sentinel_ids[:2]
    the, cat, sat, on, it, a, dog, ran = range(10, 18)
    example = {
        "tokens": np.array([bos, the, cat, sat, on, it, eos, bos, a, dog, ran], np.int32),
        "segment_ids": np.array([1] * 7 + [2] * 4, np.int32),
    }
    objective = SpanCorruption(tokenizer, decoder_start="pad")
    hidden = Spans(np.array([1, 4, 7]), np.array([2, 1, 1]))  # without [bos]
    keep = example["tokens"] != bos
    row = objective.hide(example["tokens"][keep], example["segment_ids"][keep], hidden, T)
    real, read = row["segment_ids"] > 0, row["encoder_segment_ids"] > 0
    assert row["encoder_tokens"][read].tolist() == [the, s0, on, s1, eos, a, s0, ran, eos]
    assert row["encoder_segment_ids"][read].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert row["encoder_positions"][read].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert row["labels"][real].tolist() == [s0, cat, sat, s1, it, s0, dog, eos]
    assert row["tokens"][real].tolist() == [0, s0, cat, sat, s1, 0, s0, dog]
    assert row["segment_ids"][real].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    assert row["positions"][real].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert {k: (v.shape, str(v.dtype)) for k, v in row.items()} == {
        **{f"encoder_{k}": ((T,), "int32") for k in ("tokens", "segment_ids", "positions")},
        **{k: ((14,), "int32") for k in ("tokens", "segment_ids", "positions", "labels")},
        "weights": ((14,), "float32"),
    }
    for start, first in (("bos", bos), ("eos", eos)):
        other = dataclasses.replace(objective, tokenizer=tokenizer, decoder_start=start)
        row = other.corrupt(np.random.default_rng(0), example, T)
        assert row["tokens"][0] == first


# --- T5's procedure, written from the description in the paper and of its published preprocessors -------------------------


def t5_lengths(seq_len, density, mean_span):
    """(raw tokens, target tokens): the most raw tokens that fit, spans and [eos] counted on both sides."""

    def sizes(raw):
        noise = int(np.round(raw * density))
        spans = int(np.round(noise / mean_span))
        return raw - noise + spans + 1, noise + spans + 1

    raw = seq_len
    while sizes(raw + 1)[0] <= seq_len:
        raw += 1
    return raw, sizes(raw)[1]


def t5_sentinels(tokens, mask, sentinels):
    """Each stretch of the mask becomes the next sentinel; what is not masked stays."""
    out, used = [], 0
    for i, token in enumerate(tokens):
        if not mask[i]:
            out.append(token)
        elif i == 0 or not mask[i - 1]:
            out.append(sentinels[used])
            used += 1
    return out


def test_lengths_are_those_of_the_published_helper():
    assert (fit(0.15, 3.0, 512).raw, fit(0.15, 3.0, 512).hidden) == (568, 85)  # targets of 114
    for seq_len in (32, 64, 128, 500, 512, 1024):
        for density, span in ((0.15, 3.0), (0.15, 8.0), (0.3, 2.0), (0.5, 3.0)):
            ours = fit(density, span, seq_len)
            theirs = t5_lengths(seq_len, density, span)
            assert (ours.raw, ours.hidden + ours.spans + 1) == theirs, (seq_len, density, span)


# kept and hidden tokens in turns, kept ones first: the masks that T5's procedure draws
SEGMENTATION = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(SEGMENTATION)
def test_given_segmentations_give_the_pair_of_the_published_procedure(tokenizer, pairs):
    kept, hidden = map(np.array, zip(*pairs, strict=True))
    mask = np.repeat([False, True] * len(pairs), np.array(pairs).ravel())
    run = Runs(np.zeros(1, np.int64), np.array([len(mask)]))
    spans = place(run, np.append(kept, 0), hidden, np.array([len(hidden)]))
    np.testing.assert_array_equal(spans.mask(len(mask)), mask)

    tokens = np.random.default_rng(0).integers(7, 100, len(mask)).astype(np.int32)
    size, names = 2 * len(mask) + 2, tokenizer.sentinel_ids
    objective = SpanCorruption(tokenizer, noise_density=0.5, mean_span=1.0)
    row = objective.hide(tokens, np.ones(len(mask), np.int32), spans, size)
    sources = row["encoder_tokens"][row["encoder_segment_ids"] > 0]
    labels = row["labels"][row["segment_ids"] > 0]
    assert sources.tolist() == [*t5_sentinels(tokens, mask, names), tokenizer.eos_id]
    assert labels.tolist() == [*t5_sentinels(tokens, ~mask, names), tokenizer.eos_id]


def test_cuts_are_equally_likely():
    rng, seen = np.random.default_rng(0), {}
    for _ in range(3000):
        parts = tuple(cut(rng, np.array([5, 0, 2]), np.array([3, 0, 1])).tolist())
        seen[parts] = seen.get(parts, 0) + 1
    assert len(seen) == 6 and all(parts[3] == 2 and sum(parts) == 7 for parts in seen)
    assert (
        sum((n - 500) ** 2 / 500 for n in seen.values()) < 20.5
    )  # chi-squared, 5 degrees: p 0.001


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1), st.integers(0, 99))
def test_shares_are_within_one_of_their_part_and_nothing_is_lost(pairs, total):
    weights, most = map(np.array, zip(*pairs, strict=True))
    most = np.where(weights > 0, most, 0)
    parts = share(np.random.default_rng(total), total, weights, most)
    assert (parts >= 0).all() and (parts <= most).all()
    assert parts.sum() == min(total, most.sum())
    free = share(np.random.default_rng(total), total, weights, np.full(len(most), 10**6))
    assert (abs(free - total * weights / max(1, weights.sum())) <= 1).all()


# --- rates ----------------------------------------------------------------------------------------------------------------


def check_rates(objective, make_example, tokenizer):
    """In each row of 10,000 documents the hidden tokens and the spans are exactly what was asked, and rows are full."""
    hidden, is_sentinel = [], np.isin(np.arange(tokenizer.vocab_size), tokenizer.sentinel_ids)
    for i, example in enumerate(many_windows(make_example, objective.window(512).length)):
        row = objective.corrupt(np.random.default_rng([1, i]), example, 512)
        real = row["segment_ids"] > 0
        spans = is_sentinel[row["labels"][real]].sum()
        num_bos = (example["tokens"] == tokenizer.bos_id).sum()
        wanted = count(
            len(example["tokens"]) - num_bos, objective.noise_density, objective.mean_span
        )
        assert (real.sum() - spans - 1, spans) == (wanted.hidden, wanted.spans)
        assert (row["encoder_segment_ids"] > 0).sum() >= 512 - num_bos - 1
        assert is_sentinel[row["encoder_tokens"]].sum() == spans
        hidden.append(wanted.hidden / wanted.raw)
    assert len(hidden) > 600 and abs(np.mean(hidden) - objective.noise_density) < 1e-3


def test_rates_are_exact_over_10000_documents(tokenizer, make_example):
    check_rates(SpanCorruption(tokenizer), make_example, tokenizer)


def test_the_rates_fail_for_a_coin_for_each_token(tokenizer, make_example, monkeypatch):
    def coins(rng, runs, wanted):
        where = np.flatnonzero(rng.random(wanted.raw - 1) < wanted.hidden / wanted.raw)
        return Spans(where, np.ones(len(where), np.int64))

    monkeypatch.setattr("jaxlm.objectives.span_corruption.draw_spans", coins)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check_rates(SpanCorruption(tokenizer), make_example, tokenizer)


def test_every_token_of_a_document_is_hidden_equally_often(tokenizer, make_example):
    objective, rng = SpanCorruption(tokenizer), np.random.default_rng(0)
    counts, example = np.zeros(120), make_example(rng, (122,))
    for _ in range(3000):
        runs = Runs.of(example["tokens"], example["segment_ids"], objective.tables)
        counts += draw_spans(rng, runs, count(122, 0.15, 3.0)).mask(122)[1:-1]
    assert abs(counts.mean() / 3000 - 0.15) < 0.001
    assert abs(counts[3:-3] / 3000 - 0.15).max() < 0.035


# --- the rest --------------------------------------------------------------------------------------------------------------


def test_documents_too_short_to_hide_much_lose_the_end_of_their_row(tokenizer, make_example):
    objective = SpanCorruption(tokenizer, noise_density=0.5)
    example = make_example(np.random.default_rng(0), (3,) * 30)
    row = check_round_trip(objective, example, T, tokenizer, whole=False)
    assert row["encoder_segment_ids"].max() > 25


def test_a_row_of_one_token_and_of_none_are_rows(tokenizer):
    for tokens in ([0], [1], [2], [9]):
        example = {"tokens": np.array(tokens, np.int32), "segment_ids": np.ones(1, np.int32)}
        row = SpanCorruption(tokenizer).corrupt(np.random.default_rng(0), example, T)
        assert row["weights"].sum() >= 1 and row["encoder_segment_ids"].sum() >= 1


def test_wrong_options_and_missing_sentinels_are_named(tokenizer):
    with pytest.raises(ValueError) as error:
        SpanCorruption(tokenizer, noise_density=0.0, mean_span=0.5, decoder_start="cls")
    found = str(error.value)
    assert all(part in found for part in ("noise_density 0.0", "mean_span 0.5", "'cls'"))
    with pytest.raises(ValueError, match="found 60 sentinels; expected 64"):
        SpanCorruption(tokenizer, noise_density=0.25, mean_span=2.0).window(448)


def test_span_corruption_is_fast_enough_to_feed_a_chip(tokenizer, make_example):
    objective, seconds = SpanCorruption(tokenizer), []
    example = make_example(np.random.default_rng(0), (100, 41))
    for _ in range(5):
        start = time.process_time()
        for i in range(100):
            objective.corrupt(np.random.default_rng([0, i]), example, 128)
        seconds.append(time.process_time() - start)
    assert 100 / min(seconds) > 800, f"{100 / min(seconds):.0f} rows a second"
