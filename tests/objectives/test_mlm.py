"""Masked language modelling: exact counts, whole words, runs, replacements; MaskedLM's picture."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.objectives import MaskedLM
from jaxlm.objectives.masking import Masking, _fill

T = 64


def rows(objective, make_example, count=200, lengths=(20, 42), seed=0):
    """`count` (example, row) of different noise."""
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        example = make_example(rng, lengths)
        yield example, objective.corrupt(rng, example, T)


def restored(row):
    """The row's tokens before masking: labels put back where weights say so."""
    tokens, slots = row["tokens"].copy(), row["weights"] > 0
    tokens[row["masked_positions"][slots]] = row["labels"][slots]
    return tokens


def check_exact_count(objective, make_example, tokenizer):
    """round(rate * maskable) different positions per row, none special, the rest weight-0 at 0."""
    for example, row in rows(objective, make_example, 20):
        maskable = sum(int(t) not in tokenizer.special_ids for t in example["tokens"])
        slots = row["weights"] > 0
        positions = row["masked_positions"][slots]
        assert len(positions) == round(objective.rate * maskable)
        assert (np.diff(positions) > 0).all()
        assert not row["masked_positions"][~slots].any() and not row["labels"][~slots].any()
        assert len(slots) == objective.num_predictions(T)
        assert not tokenizer.special_ids & set(row["labels"][slots].tolist())


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.4, 0.999, 1.0])
@pytest.mark.parametrize("max_ngram", [1, 3])
def test_the_count_of_predictions_is_exact(tokenizer, make_example, rate, max_ngram):
    objective = MaskedLM(tokenizer=tokenizer, rate=rate, max_ngram=max_ngram)
    check_exact_count(objective, make_example, tokenizer)


def test_the_count_law_fails_for_bernoulli_masking(tokenizer, make_example):
    class Bernoulli(Masking):
        def choose(self, rng, tokens, segment_ids, tables):
            chosen = ~tables.special[tokens] & (rng.random(len(tokens)) < self.rate)
            return np.flatnonzero(chosen)[:9]

    wrong = MaskedLM(tokenizer=tokenizer)
    object.__setattr__(wrong, "masking", Bernoulli())
    with pytest.raises(AssertionError):
        check_exact_count(wrong, make_example, tokenizer)


def test_the_picture(tokenizer):
    the, cat, sat, a, dog = 7, 9, 11, 13, 15
    example = {
        "tokens": np.array([1, the, cat, sat, 2, 1, a, dog], np.int32),
        "segment_ids": np.array([1, 1, 1, 1, 1, 2, 2, 2], np.int32),
    }
    objective = MaskedLM(tokenizer=tokenizer, rate=0.3)
    row = objective.corrupt(np.random.default_rng(0), example, 10)
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert restored(row).tolist() == [4, the, cat, sat, 2, 1, a, dog, 5, 0]
    assert row["weights"].tolist() == [1, 1, 0]  # round(0.3 * 5) of round(0.3 * 10) slots

    middle = {"tokens": example["tokens"][1:4], "segment_ids": np.array([1, 1, 1], np.int32)}
    row = objective.corrupt(np.random.default_rng(0), middle, 10)
    assert restored(row).tolist() == [4, the, cat, sat, 5, 0, 0, 0, 0, 0]


def test_a_full_window_fills_the_row(tokenizer, make_example):
    objective = MaskedLM(tokenizer=tokenizer)
    assert objective.window(T)[:2] == (T - 2, T - 2)
    rng = np.random.default_rng(0)
    example = {key: value[1:] for key, value in make_example(rng, (T - 1,)).items()}
    row = objective.corrupt(rng, example, T)
    assert row["segment_ids"].all() and restored(row)[0] == 4 and restored(row)[-1] == 5


def test_replacements_are_80_10_10_and_never_special(tokenizer, make_example):
    objective = MaskedLM(tokenizer=tokenizer, rate=0.5)
    kinds = {"mask": 0, "kept": 0, "random": 0}
    for example, row in rows(objective, make_example):
        slots = row["weights"] > 0
        now, before = row["tokens"][row["masked_positions"][slots]], row["labels"][slots]
        kinds["mask"] += (now == tokenizer.mask_id).sum()
        kinds["kept"] += (now == before).sum()
        others = now[(now != tokenizer.mask_id) & (now != before)]
        kinds["random"] += len(others)
        assert not tokenizer.special_ids & set(others.tolist())
        untouched = np.ones(T, bool)
        untouched[row["masked_positions"][slots]] = False
        assert (row["tokens"] == restored(row))[untouched].all()
        assert restored(row)[1 : len(example["tokens"])].tolist() == example["tokens"][1:].tolist()
    total = sum(kinds.values())
    for kind, share in {"mask": 0.8, "kept": 0.1, "random": 0.1}.items():
        assert abs(kinds[kind] / total - share) < 0.02, kinds


def words(tokens, segment_ids, tokenizer):
    """The word number of every token, -1 for special ids."""
    number, out = -1, []
    for t, token in enumerate(tokens):
        special = int(token) in tokenizer.special_ids
        new = tokenizer.is_word_start[token] or (
            t
            and (
                int(tokens[t - 1]) in tokenizer.special_ids or segment_ids[t] != segment_ids[t - 1]
            )
        )
        number += bool(new and not special)
        out.append(-1 if special else number)
    return np.array(out)


def check_whole_words(objective, make_example, tokenizer):
    """Words are predicted whole; of the budget no more is left than the smallest other word needs."""
    for _, row in rows(objective, make_example, 50):
        word = words(restored(row), row["segment_ids"], tokenizer)
        chosen = np.zeros(T, bool)
        chosen[row["masked_positions"][row["weights"] > 0]] = True
        taken = set(word[chosen])
        for w in taken:
            assert chosen[word == w].all(), "a word is masked in part"
        budget = round(objective.rate * int((word >= 0).sum()))
        left = budget - int(chosen.sum())
        sizes = [int((word == w).sum()) for w in set(word) - taken - {-1}]
        assert 0 <= left < min(sizes)


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_whole_words_are_masked_whole(tokenizer, make_example, max_ngram):
    options = dict(tokenizer=tokenizer, rate=0.3, max_ngram=max_ngram)
    check_whole_words(MaskedLM(whole_word=True, **options), make_example, tokenizer)
    with pytest.raises(AssertionError):
        check_whole_words(MaskedLM(whole_word=False, **options), make_example, tokenizer)


def run_lengths(objective, make_example):
    lengths = []
    for _, row in rows(objective, make_example, lengths=(62,), count=400):
        positions = row["masked_positions"][row["weights"] > 0]
        lengths += [
            len(run) for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        ]
    return np.array(lengths)


def test_ngrams_come_in_runs_of_the_asked_lengths(tokenizer, make_example):
    single = run_lengths(MaskedLM(tokenizer=tokenizer, rate=0.1), make_example)
    albert = run_lengths(MaskedLM(tokenizer=tokenizer, rate=0.1, max_ngram=3), make_example)
    spanbert = run_lengths(
        MaskedLM(tokenizer=tokenizer, rate=0.1, max_ngram=10, ngram_decay=0.2), make_example
    )
    assert single.mean() < 1.2 < 1.5 < albert.mean() < 2.0 < 2.6 < spanbert.mean()
    # Before the cut to the exact count: P(n) ~ 1 / n up to 3, mean 18 / 11; SpanBERT's mean is 3.8.
    masking, rng = Masking(max_ngram=3), np.random.default_rng(0)
    sizes = np.bincount(masking._ngrams(rng, np.arange(100_000) == 0))
    assert sizes.max() == 3 and abs(sizes.mean() - 18 / 11) < 0.02
    masking = Masking(max_ngram=10, ngram_decay=0.2)
    sizes = np.bincount(masking._ngrams(rng, np.arange(100_000) == 0))
    assert sizes.max() == 10 and abs(sizes.mean() - 3.8) < 0.05


def test_ngrams_do_not_cross_documents():
    starts_run = np.zeros(1000, bool)
    starts_run[::7] = True
    ngram = Masking(max_ngram=5)._ngrams(np.random.default_rng(0), starts_run)
    assert (np.diff(ngram)[np.flatnonzero(starts_run)[1:] - 1] == 1).all()


def test_every_position_is_masked_equally_often(tokenizer, make_example):
    for options in ({}, {"max_ngram": 3}, {"whole_word": True}):
        counts = np.zeros(T)
        objective = MaskedLM(tokenizer=tokenizer, rate=0.25, **options)
        for _, row in rows(objective, make_example, 2000, lengths=(62,)):
            counts[row["masked_positions"][row["weights"] > 0]] += 1
        inner = counts[5:55] / 2000
        assert abs(inner.mean() - 0.25) < 0.02 and inner.std() < 0.02, options


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=30), st.integers(0, 60))
def test_fill_is_first_come_first_served(sizes, budget):
    expected, left = [], budget
    for i, size in enumerate(sizes):
        if size <= left:
            expected.append(i)
            left -= size
    assert sorted(_fill(np.array(sizes, np.int64), budget).tolist()) == expected


def test_the_same_noise_gives_the_same_row_and_other_noise_another(tokenizer, make_example):
    objective = MaskedLM(tokenizer=tokenizer)
    example = make_example(np.random.default_rng(0), (62,))
    first, again, other = (
        objective.corrupt(np.random.default_rng(seed), example, T) for seed in (1, 1, 2)
    )
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["masked_positions"] != other["masked_positions"]).any()


def test_wrong_options_are_all_named_at_once(tokenizer):
    with pytest.raises(ValueError) as error:
        MaskedLM(tokenizer=tokenizer, rate=0.0, mask_share=0.9, random_share=0.2, max_ngram=0)
    assert all(word in str(error.value) for word in ("rate 0.0", "mask_share 0.9", "max_ngram 0"))


def test_an_objective_goes_to_another_process_without_its_tokenizer(tokenizer):
    objective = MaskedLM(tokenizer=tokenizer)
    copy = pickle.loads(pickle.dumps(objective))
    assert not hasattr(copy, "tokenizer") and copy.tables.mask_id == tokenizer.mask_id


def test_masking_is_fast_enough_to_feed_a_chip(tokenizer, make_example):
    for options in ({}, {"whole_word": True, "max_ngram": 3}):
        objective = MaskedLM(tokenizer=tokenizer, **options)
        example = make_example(np.random.default_rng(0), (126,))
        seconds = []
        for _ in range(5):
            start = time.process_time()
            for i in range(200):
                objective.corrupt(np.random.default_rng([0, i]), example, 128)
            seconds.append(time.process_time() - start)
        assert 200 / min(seconds) > 2500, f"{200 / min(seconds):.0f} rows a second"
