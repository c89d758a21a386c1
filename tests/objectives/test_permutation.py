"""Permutation language modelling: the picture, the rate, spans within documents, every order as likely as any other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.objectives import OBJECTIVES, PermutationLM

T, SPECIAL = 64, frozenset(range(7))


def rows(objective, make_example, count, lengths=(20, 42)):
    for i in range(count):
        rng = np.random.default_rng(i)
        example = make_example(rng, lengths)
        yield example, objective.corrupt(rng, example, T)


def test_the_picture(tokenizer):
    the, cat, sat, on, a, dog = 7, 9, 11, 13, 15, 17
    example = {
        "tokens": np.array([1, the, cat, sat, on, 2, 1, a, dog], np.int32),
        "segment_ids": np.array([1] * 6 + [2] * 3, np.int32),
    }
    objective = OBJECTIVES["permutation"](tokenizer=tokenizer, partial=3, max_span=2)
    row = objective.corrupt(np.random.default_rng(4), example, 12)
    assert row["tokens"].tolist() == [1, the, cat, sat, on, 2, 1, a, dog, 5, 4, 0]
    assert row["segment_ids"].tolist() == [1] * 6 + [2] * 5 + [0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0]
    check_row(row, objective)


def check_row(row, objective):
    """Labels are the tokens at their places, which have the orders 1 to M in some way, and all others 0."""
    slots = row["weights"] > 0
    places = row["masked_positions"][slots]
    assert (np.diff(places) > 0).all() and not row["masked_positions"][~slots].any()
    assert (row["tokens"][places] == row["labels"][slots]).all() and not row["labels"][~slots].any()
    assert not SPECIAL & set(row["labels"][slots].tolist())
    assert sorted(row["order"][places]) == list(range(1, len(places) + 1))
    assert (row["order"] > 0).sum() == len(places)
    assert len(slots) == objective.num_predictions(len(row["tokens"]))


@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=2),
    partial=st.integers(1, 8),
    max_span=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_the_text_stays_and_every_place_to_predict_has_its_label(
    tokenizer, make_example, seed, lengths, partial, max_span
):
    rng = np.random.default_rng(seed)
    example = make_example(rng, lengths)
    objective = PermutationLM(tokenizer=tokenizer, partial=partial, max_span=max_span)
    row = objective.corrupt(rng, example, T)
    count = sum(lengths)
    assert (row["tokens"][:count] == example["tokens"]).all()
    assert (
        row["tokens"][count : count + 2].tolist() == [5, 4] and not row["tokens"][count + 2 :].any()
    )
    check_row(row, objective)


def check_rate(objective, make_example):
    """One of K ordinary tokens over many documents, whatever their place; runs as long as P(L) ~ 1 / L says."""
    chosen, ordinary, at_place = 0, 0, np.zeros(T)
    for example, row in rows(objective, make_example, 4000):
        ordinary += (~np.isin(example["tokens"], list(SPECIAL))).sum()
        places = row["masked_positions"][row["weights"] > 0]
        chosen += len(places)
        at_place[places] += 1
    assert chosen / ordinary == pytest.approx(1 / objective.partial, rel=0.05)
    inner = at_place[25:50] / 4000
    np.testing.assert_allclose(inner, 1 / objective.partial, atol=0.04)


def test_one_of_k_tokens_is_predicted_wherever_it_stands(tokenizer, make_example):
    check_rate(PermutationLM(tokenizer=tokenizer), make_example)


def test_the_rate_law_fails_for_spans_at_the_start_of_their_stretch(tokenizer, make_example):
    class First(PermutationLM):
        def choose(self, rng, tokens, segment_ids):
            return np.arange(0, len(tokens), self.partial)[1:]

    with pytest.raises(AssertionError):
        check_rate(First(tokenizer=tokenizer), make_example)


def check_spans(objective, tokenizer):
    """No span goes on in the next document."""
    tokens = np.full(24, 9, np.int32)  # one stretch, so one span
    documents = np.repeat(np.arange(1, 13), 2).astype(np.int32)
    longest = 0
    for seed in range(300):
        places = objective.choose(np.random.default_rng(seed), tokens, documents)
        assert len(set(documents[places])) <= 1, seed
        longest = max(longest, len(places))
    assert longest == 2


def test_no_span_crosses_documents(tokenizer):
    check_spans(PermutationLM(tokenizer=tokenizer, partial=24, max_span=3), tokenizer)


def test_the_document_law_fails_for_spans_cut_from_the_row(tokenizer):
    class Across(PermutationLM):
        def choose(self, rng, tokens, segment_ids):
            return super().choose(rng, tokens, np.ones_like(segment_ids))

    with pytest.raises(AssertionError):
        check_spans(Across(tokenizer=tokenizer, partial=24, max_span=3), tokenizer)


def test_every_order_is_as_likely(tokenizer, make_example):
    objective = PermutationLM(tokenizer=tokenizer)
    first = [
        row["order"][row["masked_positions"][0]] / row["weights"].sum()
        for _, row in rows(objective, make_example, 2000)
    ]
    assert np.mean(first) == pytest.approx(0.55, abs=0.03)  # (n + 1) / 2 n, of 9 or 10


def test_options_that_cannot_be_are_listed(tokenizer):
    with pytest.raises(ValueError) as error:
        PermutationLM(tokenizer=tokenizer, partial=0, max_span=-1)
    assert "partial 0" in str(error.value) and "max_span -1" in str(error.value)
