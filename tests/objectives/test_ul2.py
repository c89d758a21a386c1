"""Each row is one of seven denoisers', says which by its first token, and gives its text back."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import t5
from jaxlm.objectives import UL2, SpanCorruption
from jaxlm.objectives.span_corruption import fit
from jaxlm.objectives.ul2 import DENOISERS, R, S, X, crop
from jaxlm.planning.compiling import stand_in_tokenizer
from jaxlm.program import make_objective
from tests.objectives.documents import (
    LENGTHS,
    check_decoder_row,
    documents_of,
    many_windows,
    window_of,
)
from tests.objectives.test_span_corruption import restore

T = 64
NAMES = {R: "R", S: "S", X: "X"}


def mode_of(row, tokenizer):
    """'R', 'S' or 'X': the token that every document of the encoder's row begins with."""
    begins = (row["encoder_positions"] == 0) & (row["encoder_segment_ids"] > 0)
    first = set(row["encoder_tokens"][begins].tolist())
    modes = {tokenizer.sentinel_ids[-n]: name for n, name in NAMES.items()}
    assert len(first) == 1 and first <= set(modes), first
    return modes[first.pop()]


def restored(row, tokenizer):
    """{segment: tokens} of a row of any denoiser, without its mode token."""
    if mode_of(row, tokenizer) != "S":
        text = row["encoder_positions"] > 0
        text |= row["encoder_segment_ids"] == 0
        found = restore({**row, **{k: row[k][text] for k in row if k.startswith("enc")}}, tokenizer)
        return {s: found.get(s, []) for s in range(1, row["encoder_segment_ids"].max() + 1)}
    labels = documents_of(row["labels"], row["segment_ids"])
    sources = documents_of(row["encoder_tokens"], row["encoder_segment_ids"])
    return {s: tokens[1:] + labels.get(s, []) for s, tokens in sources.items()}


def check_round_trip(objective, example, seq_len, tokenizer, seed=0):
    """The pair gives back the stretch of the example that its denoiser read, document by document, but for [bos].

    The end of a row is missing if its documents are too short for long spans.
    """
    rng = np.random.default_rng(seed)
    part = objective.parts[rng.integers(len(DENOISERS))]
    stretch = crop(rng, example, part.window(seq_len).length)
    row = objective.corrupt(np.random.default_rng(seed), example, seq_len)
    check_decoder_row(row, tokenizer.bos_id)
    expected = documents_of(stretch["tokens"], stretch["segment_ids"], {tokenizer.bos_id})
    found = restored(row, tokenizer)
    last = max(found)
    assert all(found[segment] == expected[segment] for segment in found if segment != last)
    put_there = mode_of(row, tokenizer) != "S" and found[last] != expected[last]  # [eos]
    found_last = found[last][: len(found[last]) - put_there]
    assert found_last == expected[last][: len(found_last)]
    if len(expected) == 1:
        assert found_last == expected[last]
    return row


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(0, 2**32 - 1))
def test_the_pair_gives_back_a_stretch_of_the_documents(tokenizer, make_example, lengths, seed):
    objective, rng = UL2(tokenizer), np.random.default_rng(seed)
    example = window_of(make_example, rng, lengths, objective.window(T).length)
    check_round_trip(objective, example, T, tokenizer, seed)


def test_the_round_trip_fails_for_a_mode_token_too_many(tokenizer, make_example):
    class Wrong(UL2):
        def corrupt(self, rng, example, seq_len):
            row = super().corrupt(rng, example, seq_len)
            tokens = row["encoder_tokens"].copy()
            tokens[4:6] = tokens[0]
            return {**row, "encoder_tokens": tokens}

    example = window_of(make_example, np.random.default_rng(0), (60, 60), 120)
    check_round_trip(UL2(tokenizer), example, T, tokenizer)
    with pytest.raises((AssertionError, IndexError)):
        check_round_trip(Wrong(tokenizer), example, T, tokenizer)


def test_the_picture(tokenizer):
    """The three pairs of the docstring; spans and densities of the real ones need longer texts."""
    bos, eos, (s0, s1) = 1, 2, tokenizer.sentinel_ids[:2]
    the, cat, sat, on, the_, mat, and_, slept = text = list(range(10, 18))
    example = {"tokens": np.array([bos, *text, eos], np.int32), "segment_ids": np.ones(10, int)}
    pairs = {
        R: ([the, s0, on, the_, mat, and_, slept, eos], [s0, cat, sat, eos]),
        S: ([the, cat, sat, on, the_, mat], [and_, slept, eos]),
        X: ([the, s0, on, s1, slept, eos], [s0, cat, sat, s1, the_, mat, and_, eos]),
    }
    parts = UL2(tokenizer).parts
    options = {R: (0, {"mean_span": 2.0}), S: (2, {"rate": 0.3}), X: (3, {"mean_span": 2.5})}
    for mode, (source, labels) in pairs.items():
        index, fields = options[mode]
        part = type(parts[index])(tokenizer, **{**vars_of(parts[index]), **fields})
        rows = (part.corrupt(np.random.default_rng(seed), example, 16) for seed in range(3000))
        wanted = [tokenizer.sentinel_ids[-mode], *source]
        row = next(row for row in rows if row["encoder_tokens"][: len(wanted)].tolist() == wanted)
        assert row["labels"][row["segment_ids"] > 0].tolist() == labels


def vars_of(part):
    names = ("decoder_start", "mode", "noise_density", "mean_span", "rate")
    return {name: getattr(part, name) for name in names if hasattr(part, name)}


def check_rates(objective, make_example, tokenizer):
    """Over 10,000 documents: modes come as often as their denoisers, and hide what these say of what they read."""
    rows, hidden, read = Counter(), Counter(), Counter()
    sentinels = np.isin(np.arange(tokenizer.vocab_size), tokenizer.sentinel_ids)
    for i, example in enumerate(many_windows(make_example, objective.window(192).length)):
        row = objective.corrupt(np.random.default_rng([1, i]), example, 192)
        mode, real = mode_of(row, tokenizer), row["segment_ids"] > 0
        labels, source = row["labels"][real], row["encoder_tokens"][row["encoder_segment_ids"] > 0]
        rows[mode] += 1
        hidden[mode] += (~sentinels[labels]).sum()
        read[mode] += (~sentinels[labels]).sum() + (~sentinels[source]).sum()
    total = sum(rows.values())
    counts = Counter(NAMES[mode] for mode, _, _ in DENOISERS)
    for mode, count in counts.items():
        assert abs(rows[mode] / total - count / len(DENOISERS)) < 0.03, rows
    assert total > 1300 and abs(hidden["R"] / read["R"] - 0.15) < 0.01
    assert abs(hidden["S"] / read["S"] - 0.25) < 0.01
    assert 0.15 < hidden["X"] / read["X"] < 0.5


def test_modes_and_rates_over_10000_documents(tokenizer, make_example):
    check_rates(UL2(tokenizer), make_example, tokenizer)
    wrong = UL2(tokenizer)
    object.__setattr__(wrong, "parts", wrong.parts[:3])
    with pytest.raises(AssertionError):
        check_rates(wrong, make_example, tokenizer)


def test_sizes_and_missing_sentinels(tokenizer):
    objective = UL2(tokenizer)
    row = objective.corrupt(
        np.random.default_rng(0),
        {"tokens": np.arange(7, 40, dtype=np.int32), "segment_ids": np.ones(33, np.int32)},
        T,
    )
    assert {len(row[key]) for key in row if not key.startswith("encoder")} == {
        objective.target_len(T)
    }
    assert (
        len(row["encoder_tokens"]) == T == objective.target_len(T)
        or objective.target_len(T) > T / 2
    )
    with pytest.raises(ValueError, match="found 60 sentinels; expected 131.* and 3 for modes"):
        UL2(tokenizer).window(512)
    with pytest.raises(ValueError, match="mode 2: expected 0"):
        UL2(tokenizer, mode=2)
    with pytest.raises(ValueError, match="mode 4: expected 0 to 3"):
        SpanCorruption(tokenizer, mode=4)


@pytest.mark.parametrize("variant", t5.VARIANTS)
def test_a_recipe_has_sentinels_enough_and_no_span_is_named_as_a_mode(variant):
    config = t5.get_config(f"{variant},objective=ul2")
    seq_len, known = config.seq_len, config.tokenizer.num_sentinels
    assert make_objective(config, stand_in_tokenizer(2048, known)).window(seq_len).length > seq_len
    densest = DENOISERS.index((X, 3.0, 0.5))
    enough = fit(0.5, 3.0, seq_len).spans + len(NAMES)
    with pytest.raises(ValueError, match=f"found {enough - 1} sentinels; expected {enough}"):
        UL2(stand_in_tokenizer(2048, enough - 1)).window(seq_len)
    tokenizer = stand_in_tokenizer(2048, enough)
    part = UL2(tokenizer).parts[densest]
    tokens = np.full(part.window(seq_len).length, 2000, np.int32)
    example = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    row = part.corrupt(np.random.default_rng(0), example, seq_len)
    assert set(tokenizer.sentinel_ids) - set(row["labels"].tolist()) == {
        tokenizer.sentinel_ids[-mode] for mode in NAMES
    }
