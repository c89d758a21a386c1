"""The labels are the documents as they were, and the encoder's row is what each kind of noise makes of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.objectives import Denoising
from jaxlm.objectives.denoising import draw_lengths
from tests.objectives.documents import (
    LENGTHS,
    check_decoder_row,
    documents_of,
    many_windows,
    window_of,
)

T = 64
NONE = dict(permute_sentences=0.0, infill_rate=0.0)
KINDS = {
    "permute": dict(NONE, permute_sentences=1.0),
    "rotate": dict(NONE, rotate=1.0),
    "infill": dict(NONE, infill_rate=0.3),
    "delete": dict(NONE, delete_rate=0.2),
    "mask": dict(NONE, mask_rate=0.2),
}


def is_permutation(before, after, starts, mask):
    cuts = [0, *[i for i in np.flatnonzero(starts) if i], len(before)]
    sentences = [tuple(before[a:b]) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
    rest = list(after)
    while rest:  # sentences may begin alike: the longest that fits
        fits = [s for s in sentences if tuple(rest[: len(s)]) == s]
        if not fits:
            return False
        sentences.remove(max(fits, key=len))
        rest = rest[len(max(fits, key=len)) :]
    return not sentences


def is_rotation(before, after, starts, mask):
    return not before or any(before[i:] + before[:i] == after for i in range(len(before)))


def is_infilling(before, after, starts, mask):
    """A [MASK] stands for any number of tokens: the pieces between them come in order."""
    pieces: list[list[int]] = [[]]
    for token in after:
        pieces = [*pieces, []] if token == mask else [*pieces[:-1], [*pieces[-1], token]]
    if before[: len(pieces[0])] != pieces[0] or len(pieces) == 1:
        return len(pieces) == 1 and before == after
    place = len(pieces[0])
    end = len(before) - len(pieces[-1])
    for piece in pieces[1:-1]:
        while before[place : place + len(piece)] != piece:
            place += 1
            if place > len(before):
                return False
        place += len(piece)
    return place <= end and before[end:] == pieces[-1]


def is_deletion(before, after, starts, mask):
    rest = iter(before)
    return all(token in rest for token in after)


def is_masking(before, after, starts, mask):
    return len(before) == len(after) and all(
        b in (a, mask) for a, b in zip(before, after, strict=True)
    )


CHECKS = {
    "permute": is_permutation,
    "rotate": is_rotation,
    "infill": is_infilling,
    "delete": is_deletion,
    "mask": is_masking,
}


def check_round_trip(objective, kind, example, seq_len, tokenizer):
    """The labels are the example; each document of the encoder's row is that document, spoilt as `kind` says."""
    row = objective.corrupt(np.random.default_rng(0), example, seq_len)
    check_decoder_row(row, tokenizer.eos_id)
    before = documents_of(example["tokens"], example["segment_ids"])
    assert documents_of(row["labels"], row["segment_ids"]) == before
    after = documents_of(row["encoder_tokens"], row["encoder_segment_ids"])
    for segment, tokens in before.items():
        ends = [t for t in (tokenizer.bos_id, tokenizer.eos_id) if t in tokens]
        found = after.pop(segment, [])
        assert [t for t in found if t in (1, 2)] == ends, "[bos] or [eos] is lost"
        is_text = ~np.isin(tokens, ends)
        starts = example["sentence_starts"][example["segment_ids"] == segment][is_text]
        text, noised = ([t for t in part if t not in ends] for part in (tokens, found))
        assert CHECKS[kind](text, noised, starts, tokenizer.mask_id), (kind, text, noised)
    assert not after
    return row


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(0, 2**32 - 1), st.sampled_from(list(KINDS)))
def test_labels_are_the_documents_and_noise_is_of_its_kind(
    tokenizer, make_example, lengths, seed, kind
):
    rng = np.random.default_rng(seed)
    example = window_of(make_example, rng, lengths, T, skip=int(rng.integers(lengths[0])))
    check_round_trip(Denoising(tokenizer, **KINDS[kind]), kind, example, T, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_law_fails_for_another_kind_of_noise(tokenizer, make_example, kind):
    example = window_of(make_example, np.random.default_rng(0), (30, 34), T)
    other = {"permute": "rotate", "rotate": "delete", "delete": "rotate"}.get(kind, "permute")
    with pytest.raises(AssertionError):
        check_round_trip(Denoising(tokenizer, **KINDS[other]), kind, example, T, tokenizer)


def test_all_kinds_together_leave_the_labels_and_stay_in_their_documents(tokenizer, make_example):
    options = dict(permute_sentences=0.5, rotate=0.5, infill_rate=0.3, delete_rate=0.1)
    objective = Denoising(tokenizer, mask_rate=0.1, **options)
    for example in list(many_windows(make_example, T, documents=200)):
        row = objective.corrupt(np.random.default_rng(0), example, T)
        before = documents_of(example["tokens"], example["segment_ids"])
        assert documents_of(row["labels"], row["segment_ids"]) == before
        for segment, found in documents_of(
            row["encoder_tokens"], row["encoder_segment_ids"]
        ).items():
            assert set(found) <= {*before[segment], tokenizer.mask_id}
        assert row["segment_ids"].all() and row["encoder_segment_ids"].any()


def test_the_picture(tokenizer):
    bos, eos, mask = 1, 2, tokenizer.mask_id
    a, b, c, d, stop = range(10, 15)
    tokens = np.array([bos, a, stop, b, c, d, stop, eos], np.int32)
    starts = np.array([0, 1, 0, 1, 0, 0, 0, 0], bool)
    example = {"tokens": tokens, "segment_ids": np.ones(8, np.int32), "sentence_starts": starts}
    pictures = {
        "permute": [bos, b, c, d, stop, a, stop, eos],
        "rotate": [bos, c, d, stop, a, stop, b, eos],
        "infill": [bos, a, stop, mask, d, mask, stop, eos],
        "delete": [bos, a, b, c, stop, eos],
        "mask": [bos, a, stop, mask, c, d, mask, eos],
    }
    rates = dict(KINDS, infill=dict(NONE, infill_rate=0.34, mean_span=1.0))
    rates |= {name: dict(NONE, **{f"{name}_rate": 0.34}) for name in ("delete", "mask")}
    for kind, picture in pictures.items():
        objective = Denoising(tokenizer, **rates[kind])
        rows = (objective.corrupt(np.random.default_rng(s), example, 8) for s in range(3000))
        row = next(r for r in rows if r["encoder_tokens"][: len(picture)].tolist() == picture)
        assert row["labels"].tolist() == tokens.tolist()
        assert row["tokens"].tolist() == [eos, *tokens[:-1].tolist()]


def check_rates(objective, make_example, tokenizer):
    """Over 10,000 documents: exactly the asked share of the text is gone; rows of labels are full.

    Of documents that hide 16 tokens the last span is cut off, so the mean length is a little below the asked one.
    """
    hidden = masks = total = 0
    for i, example in enumerate(many_windows(make_example, 512)):
        row = objective.corrupt(np.random.default_rng([1, i]), example, 512)
        assert row["weights"].all()
        text = (~np.isin(example["tokens"], (1, 2))).sum()
        here = row["encoder_tokens"][row["encoder_segment_ids"] > 0]
        is_mask = here == tokenizer.mask_id
        gone = text - (~np.isin(here, (1, 2)) & ~is_mask).sum()
        assert gone == round(objective.infill_rate * text)
        hidden, masks, total = hidden + gone, masks + is_mask.sum(), total + text
    assert abs(hidden / total - objective.infill_rate) < 1e-3
    assert 0.85 < hidden / masks / objective.mean_span < 1, hidden / masks


def test_infilling_hides_exactly_as_much_as_asked(tokenizer, make_example):
    objective = Denoising(tokenizer, **KINDS["infill"])
    check_rates(objective, make_example, tokenizer)

    class Wrong(Denoising):
        """Spans of another mean length than it says."""

        def corrupt(self, rng, example, seq_len):
            other = Denoising(tokenizer, **KINDS["infill"], mean_span=1.5)
            return other.corrupt(rng, example, seq_len)

    with pytest.raises(AssertionError):
        check_rates(Wrong(tokenizer, **KINDS["infill"]), make_example, tokenizer)


def test_lengths_of_spans_are_poisson():
    hidden = np.array([60_000, 0, 30_000])
    lengths, spans = draw_lengths(np.random.default_rng(0), hidden, 3.0)
    assert lengths[: spans[0]].sum() == 60_000 and spans[1] == 0 and lengths.sum() == 90_000
    shares = np.bincount(lengths, minlength=12)[:6] / len(lengths)
    poisson = np.exp(-3) * np.array([1, 3, 4.5, 4.5, 3.375, 2.025])
    np.testing.assert_allclose(shares, poisson, atol=0.006)


def test_deletion_and_masking_take_exact_shares_and_sentences_move(tokenizer, make_example):
    both = Denoising(tokenizer, **dict(NONE, delete_rate=0.2, mask_rate=0.1))
    moved = Denoising(tokenizer, **dict(NONE, permute_sentences=0.5))
    changed = documents = 0
    for i, example in enumerate(many_windows(make_example, 512)):
        text = (~np.isin(example["tokens"], (1, 2))).sum()
        here = both.corrupt(np.random.default_rng([1, i]), example, 512)
        left = text - round(0.2 * text)
        assert (here["encoder_segment_ids"] > 0).sum() == 512 - text + left
        assert (here["encoder_tokens"] == tokenizer.mask_id).sum() == round(0.1 * left)
        row = moved.corrupt(np.random.default_rng([1, i]), example, 512)
        for segment in range(1, example["segment_ids"].max() + 1):
            span = example["segment_ids"] == segment
            if span.sum() > 30:
                documents += 1
                changed += (row["encoder_tokens"][span] != example["tokens"][span]).any()
    assert documents > 5000 and abs(changed / documents - 0.5) < 0.03


def test_wrong_options_are_all_named_at_once(tokenizer):
    with pytest.raises(ValueError) as error:
        Denoising(tokenizer, infill_rate=1.5, mean_span=0.0, rotate=-0.1, decoder_start="x")
    found = str(error.value)
    assert all(p in found for p in ("infill_rate 1.5", "mean_span 0.0", "rotate -0.1", "'x'"))
