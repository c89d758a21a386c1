"""Rearranged documents are told apart by their sentinels and put together again, token for token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.objectives import CausalLM, FillInTheMiddle
from tests.objectives.documents import LENGTHS, documents_of, many_windows, window_of

T = 64


def raw_of(row):
    """The T + 1 tokens that a row is made of, as documents, {segment: tokens}."""
    documents = documents_of(row["tokens"], row["segment_ids"])
    end = (row["segment_ids"] > 0).sum() - 1
    if row["weights"][end]:
        documents[int(row["segment_ids"][end])].append(int(row["labels"][end]))
    return documents


def parts_of(tokens, tokenizer):
    """(kind, prefix, middle, suffix) of the text between [bos] and [eos]: PSM, SPM, or None for plain text."""
    pre, suf, mid = tokenizer.sentinel_ids[:3]
    text = [t for t in tokens if t not in (tokenizer.bos_id, tokenizer.eos_id)]
    if pre not in text:
        return None, text, [], []
    assert text[0] == pre and text.count(suf) == text.count(mid) == text.count(pre) == 1
    s, m = text.index(suf), text.index(mid)
    assert s < m
    if s > 1:
        return "PSM", text[1:s], text[m + 1 :], text[s + 1 : m]
    return "SPM or empty prefix", [], text[m + 1 :], text[2:m]


def put_together(tokens, tokenizer):
    """The text of a document as it was: prefix, middle, suffix (in SPM the prefix is part of what follows the last sentinel)."""
    _, prefix, middle, suffix = parts_of(tokens, tokenizer)
    return prefix + middle + suffix


def check_round_trip(objective, example, seq_len, tokenizer):
    """Every document comes back, but for what its sentinels leave no room for at the end of the row."""
    row = objective.corrupt(np.random.default_rng(0), example, seq_len)
    frame = {tokenizer.bos_id, tokenizer.eos_id}
    expected = documents_of(example["tokens"], example["segment_ids"], skip=frame)
    found = {s: put_together(tokens, tokenizer) for s, tokens in raw_of(row).items()}
    last = max(found, default=0)
    for segment in set(found) - {last}:
        assert found[segment] == expected[segment]
    assert not found or found[last] == expected[last][: len(found[last])]
    sentinels = np.isin(row["tokens"], tokenizer.sentinel_ids).sum()
    lost = sum(map(len, expected.values())) - sum(map(len, found.values()))
    assert lost <= sentinels + 3, "more is left out than sentinels take"
    full = sum(len(tokens) for tokens in raw_of(row).values())
    assert lost == 0 or full >= seq_len, "left out although there is room"
    for segment in found:  # bos first, eos last
        here = raw_of(row)[segment]
        assert tokenizer.bos_id not in here[1:] and tokenizer.eos_id not in here[:-1]
    return row


@settings(max_examples=120, deadline=None)
@given(LENGTHS, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]))
def test_documents_come_back(tokenizer, make_example, lengths, seed, rate):
    objective, rng = FillInTheMiddle(tokenizer, rate=rate), np.random.default_rng(seed)
    example = window_of(make_example, rng, lengths, T + 1, skip=int(rng.integers(lengths[0])))
    row = check_round_trip(objective, example, T, tokenizer)
    assert {k: (v.shape, str(v.dtype)) for k, v in row.items()} == {
        **{k: ((T,), "int32") for k in ("tokens", "segment_ids", "positions", "labels")},
        "weights": ((T,), "float32"),
    }
    if rate == 0:
        causal = CausalLM(tokenizer).corrupt(None, example, T)
        assert all((row[key] == causal[key]).all() for key in causal)


def test_the_round_trip_fails_for_parts_in_two_documents(tokenizer, make_example, monkeypatch):
    from jaxlm.objectives.spans import Runs

    as_one = lambda tokens, *_: Runs(np.zeros(1, np.int64), np.array([len(tokens)]))
    monkeypatch.setattr("jaxlm.objectives.fim.Runs.of", as_one)
    example = window_of(make_example, np.random.default_rng(0), (30, 40), T + 1)
    with pytest.raises((AssertionError, KeyError)):
        check_round_trip(FillInTheMiddle(tokenizer, rate=1.0), example, T, tokenizer)


def test_the_picture(tokenizer):
    bos, eos, (pre, suf, mid) = 1, 2, tokenizer.sentinel_ids[:3]
    text = the, cat, sat, on, the_, mat = tuple(range(10, 16))
    raw = np.array([bos, *text, eos], np.int32)
    example = {"tokens": raw, "segment_ids": np.ones(8, np.int32)}
    example["positions"] = np.arange(8, dtype=np.int32)
    pictures = {
        0.0: [bos, pre, the, cat, suf, the_, mat, mid, sat, on, eos],
        1.0: [bos, pre, suf, the_, mat, mid, the, cat, sat, on, eos],
    }
    for spm_share, picture in pictures.items():
        objective = FillInTheMiddle(tokenizer, rate=1.0, spm_share=spm_share)
        found = (objective.corrupt(np.random.default_rng(seed), example, 16) for seed in range(300))
        row = next(row for row in found if row["tokens"][:10].tolist() == picture[:-1])
        assert row["labels"][:10].tolist() == picture[1:]
        assert row["weights"].tolist() == [1] * 10 + [0] * 6
        assert row["positions"][:10].tolist() == list(range(10))


def check_rates(objective, make_example, tokenizer):
    """Of 10,000 documents (windows cut some in two) the asked shares are rearranged, and as SPM."""
    kinds = {None: 0, "PSM": 0, "SPM or empty prefix": 0}
    prefixes = []
    for i, example in enumerate(many_windows(make_example, 1025)):
        row = objective.corrupt(np.random.default_rng([1, i]), example, 1024)
        assert row["segment_ids"].all(), "the row is not full"
        for tokens in list(raw_of(row).values())[:-1]:
            if len(tokens) > 20:  # an empty prefix, which looks like SPM, is rare
                kind, prefix, middle, suffix = parts_of(tokens, tokenizer)
                kinds[kind] += 1
                prefixes += [len(prefix) / len(prefix + middle + suffix)] if kind == "PSM" else []
    total = sum(kinds.values())
    assert total > 7000 and abs(1 - kinds[None] / total - objective.rate) < 0.02, kinds
    assert abs(kinds["PSM"] / (total - kinds[None]) - (1 - objective.spm_share)) < 0.03, kinds
    assert abs(np.mean(prefixes) - 1 / 3) < 0.02  # two cuts anywhere


def test_rates_hold_over_10000_documents(tokenizer, make_example):
    check_rates(FillInTheMiddle(tokenizer, rate=0.5, spm_share=0.4), make_example, tokenizer)

    class Wrong(FillInTheMiddle):
        def arrange(self, rng, starts, ends, size):
            order = super().arrange(rng, starts[::2], ends[::2], size)
            return np.append(order, np.zeros(3 * len(starts[1::2]), np.int64))

    with pytest.raises(AssertionError):
        check_rates(Wrong(tokenizer, rate=0.5), make_example, tokenizer)


def test_wrong_options_and_missing_sentinels_are_named(tokenizer):
    with pytest.raises(ValueError) as error:
        FillInTheMiddle(tokenizer, rate=1.5, spm_share=-1.0)
    assert "rate 1.5" in str(error.value) and "spm_share -1.0" in str(error.value)
    few = type(tokenizer)(**{**vars(tokenizer), "sentinel_ids": (107, 108)})
    with pytest.raises(ValueError, match="found 2 sentinels; expected 3"):
        FillInTheMiddle(few).window(64)
