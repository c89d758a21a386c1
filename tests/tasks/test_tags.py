"""Tags and spans say the same, whatever the scheme; seqeval reads broken sequences the same way."""

import random

import pytest

from jaxlm.tasks.tags import (
    SCHEMES,
    Span,
    convert_tags,
    detect_scheme,
    spans_to_tags,
    split_tag,
    tags_to_spans,
)

SPANS = [Span(0, 2, "PER"), Span(3, 4, "LOC"), Span(4, 6, "LOC")]
DRAWN = {  # the table of the module's docstring
    "BIO": "B-PER I-PER O B-LOC B-LOC I-LOC",
    "BIOES": "B-PER E-PER O S-LOC B-LOC E-LOC",
    "BILOU": "B-PER L-PER O U-LOC B-LOC L-LOC",
    "IOB1": "I-PER I-PER O I-LOC B-LOC I-LOC",
    "IO": "I-PER I-PER O I-LOC I-LOC I-LOC",
}
SEPARATING = sorted(SCHEMES.keys() - {"IO"})


@pytest.mark.parametrize("scheme", DRAWN)
def test_spans_are_written_as_drawn(scheme):
    assert spans_to_tags(SPANS, 6, scheme) == DRAWN[scheme].split()


def test_every_scheme_is_drawn():
    assert DRAWN.keys() == SCHEMES.keys()


def random_spans(rng: random.Random) -> tuple[list[Span], int]:
    cuts = sorted(rng.sample(range(12), rng.randint(2, 8)))
    pairs = zip(cuts[:-1], cuts[1:], strict=True)
    kept = [Span(a, b, rng.choice(["PER", "LOC", ""])) for a, b in pairs if rng.random() < 0.7]
    return kept, cuts[-1] + rng.randint(0, 2)


def check_tags_say_what_spans_say(write, scheme):
    rng = random.Random(0)
    for _ in range(200):
        spans, num_words = random_spans(rng)
        assert tags_to_spans(write(spans, num_words, scheme)) == spans


@pytest.mark.parametrize("scheme", SEPARATING)
def test_spans_come_back_from_their_tags(scheme):
    check_tags_say_what_spans_say(spans_to_tags, scheme)


def test_the_law_of_spans_fails_where_touching_entities_run_together():
    with pytest.raises(AssertionError):
        check_tags_say_what_spans_say(spans_to_tags, "IO")


@pytest.mark.parametrize("prefixes", ["BIO", "BIESO"])
def test_any_sequence_is_read_as_seqeval_reads_it(prefixes):
    from seqeval.metrics.sequence_labeling import get_entities

    rng = random.Random(1)
    for _ in range(300):
        tags = [rng.choice(prefixes) for _ in range(rng.randint(0, 12))]
        tags = [p if p == "O" else f"{p}-{rng.choice(['X', 'Y-Z'])}" for p in tags]
        expected = [Span(start, end + 1, name) for name, start, end in get_entities(tags)]
        assert tags_to_spans(tags) == expected, tags


def test_an_inside_tag_after_outside_begins_an_entity():
    assert convert_tags(["O", "I-PER", "I-PER"], "BIO") == ["O", "B-PER", "I-PER"]


def test_an_inside_tag_of_another_kind_begins_an_entity():
    assert convert_tags(["B-PER", "I-LOC"], "BIO") == ["B-PER", "B-LOC"]


@pytest.mark.parametrize("source", SEPARATING)
@pytest.mark.parametrize("target", SEPARATING)
def test_every_scheme_converts_to_every_other(source, target):
    assert convert_tags(DRAWN[source].split(), target) == DRAWN[target].split()


@pytest.mark.parametrize("scheme", DRAWN)
def test_a_scheme_is_told_from_its_sentences(scheme):
    assert detect_scheme([DRAWN[scheme].split(), ["O"]]) == scheme


def test_one_slip_does_not_make_bio_into_iob1():
    assert detect_scheme([["B-PER", "O", "B-PER"], ["O", "I-PER"]]) == "BIO"


def test_nothing_but_outside_is_bio():
    assert detect_scheme([["O", "O"], []]) == "BIO"


def test_parts_of_speech_are_plain_and_hold_no_entities():
    tags = ["DET", "NOUN", "S", "VERB"]
    assert detect_scheme([tags]) == "plain"
    assert tags_to_spans(["DET", "NOUN"]) == []


def test_a_misprinted_tag_among_entities_is_named():
    with pytest.raises(ValueError, match="'BPER', which are none"):
        detect_scheme([["B-PER", "BPER", "O"]])


def test_tags_without_a_kind_are_entities_without_a_name():
    assert tags_to_spans(["B", "I", "O", "B"]) == [Span(0, 2, ""), Span(3, 4, "")]
    assert spans_to_tags([Span(0, 2, "")], 3) == ["B", "I", "O"]


def test_a_kind_may_have_hyphens_and_bilou_reads_as_bioes():
    assert split_tag("B-C-ARG1") == ("B", "C-ARG1")
    assert [split_tag("L-X"), split_tag("U-X")] == [("E", "X"), ("S", "X")]
    assert [split_tag(tag) for tag in ("", "O", "NN", "-LRB-", "X-PER")] == [("O", "")] * 5


def test_all_that_is_wrong_with_spans_is_said_at_once():
    wrong = [Span(0, 3, "A"), Span(2, 4, "B"), Span(4, 4, "C"), Span(4, 9, "D")]
    with pytest.raises(ValueError) as error:
        spans_to_tags(wrong, 5, "BIOE")
    text = str(error.value)
    assert "scheme 'BIOE': use one of BIO, BIOES" in text
    assert "name='B'): begins inside the entity before, which ends at 3" in text
    assert "name='C'): expected 0 <= start < end <= 5 words" in text
    assert "name='D'): expected" in text
