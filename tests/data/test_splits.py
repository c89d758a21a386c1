"""Laws of the split without a development file: complete, stratified, seeded, and no text on both sides."""

import random
from collections import Counter

import pytest

from jaxlm.data.record_base import Record
from jaxlm.data.splits import group_key, split_train_dev


def records_of(texts, labels=None):
    labels = labels or [""] * len(texts)
    pairs = zip(texts, labels, strict=True)
    return [Record("a.csv", i, {"text": t, "label": y}) for i, (t, y) in enumerate(pairs, 1)]


TEXTS = [f"text {i}" for i in range(100)]
LABELS = ["common"] * 60 + ["rare"] * 30 + ["pair"] * 9 + ["single"]


def check_split(split, records, fraction, labels):
    """What any split must keep: all rows, in order, none empty, in proportion, equal texts together."""
    train, dev = split(records, fraction, 0, labels)
    assert train and dev and sorted(train + dev) == sorted(records)
    assert train == sorted(train) and dev == sorted(dev)
    assert not {group_key(r) for r in train} & {group_key(r) for r in dev}
    assert abs(len(dev) - fraction * len(records)) <= 1
    of = dict(zip([r.line for r in records], labels, strict=True))
    counts, held = Counter(labels), Counter(of[r.line] for r in dev)
    for label, count in counts.items():
        assert held[label] < count and abs(held[label] - fraction * count) < 1


def shuffled_split(records, fraction, seed, labels):
    order = random.Random(seed).sample(range(len(records)), len(records))
    dev = set(order[: round(fraction * len(records))])
    return [r for i, r in enumerate(records) if i not in dev], [records[i] for i in sorted(dev)]


def first_rows_split(records, fraction, seed, labels):
    count = round(fraction * len(records))
    return list(records[count:]), list(records[:count])


@pytest.mark.parametrize("fraction", [0.1, 0.33, 0.5])
def test_a_split_is_complete_in_proportion_and_in_order(fraction):
    check_split(split_train_dev, records_of(TEXTS, LABELS), fraction, LABELS)


@pytest.mark.parametrize("wrong", [shuffled_split, first_rows_split])
def test_a_wrong_split_fails(wrong):
    with pytest.raises(AssertionError):
        check_split(wrong, records_of(TEXTS, LABELS), 0.33, LABELS)


def test_equal_texts_stay_together_whatever_their_case_and_spaces():
    texts = [f"{'Text' if i % 2 else 'text '} {i // 2}" for i in range(100)]
    train, dev = split_train_dev(records_of(texts), 0.2)
    assert len(dev) == 20 and len({group_key(r) for r in dev}) == 10
    assert not {group_key(r) for r in train} & {group_key(r) for r in dev}


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ({"text": "a", "label": "x"}, {"text": "A ", "label": "y"}, True),
        ({"text": "a", "text_pair": "b"}, {"text": "a", "text_pair": "c"}, False),
        ({"context": "c", "question": "a"}, {"context": "c", "question": "b"}, True),
        ({"words": ["a"], "predicate": 0}, {"words": ["A"], "predicate": 1}, True),
        ({"words": ["a", "b"]}, {"words": ["a b"]}, False),
        ({"question": "q", "choices": ["a"]}, {"question": "q", "choices": ["b"]}, False),
    ],
)
def test_what_counts_as_equal(a, b, equal):
    assert (group_key(Record("", 1, a)) == group_key(Record("", 2, b))) == equal


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    records = records_of(TEXTS, LABELS)
    dev = split_train_dev(records, 0.1, 3, LABELS)[1]
    assert split_train_dev(records, 0.1, 3, LABELS)[1] == dev
    assert split_train_dev(records, 0.1, 4, LABELS)[1] != dev
    backwards = split_train_dev(records[::-1], 0.1, 3, LABELS[::-1])[1]
    assert sorted(backwards) == dev


def test_the_split_is_the_same_on_every_machine():
    dev = split_train_dev(records_of(TEXTS), 0.05, seed=1)[1]
    assert [record.line for record in dev] == [2, 23, 42, 98, 100]  # a change breaks users' results


@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_no_side_is_empty_however_few_the_rows(count, fraction):
    for labels in (
        None,
        [str(i) for i in range(count)],
        ["a"] * count,
        ["a"] * (count - 1) + ["b"],
    ):
        train, dev = split_train_dev(records_of(TEXTS[:count]), fraction, 0, labels)
        assert train and dev and len(train + dev) == count


def test_a_label_with_one_text_stays_in_training():
    train, dev = split_train_dev(records_of(TEXTS, LABELS), 0.5, 0, LABELS)
    assert TEXTS[-1] in {r.fields["text"] for r in train}
    assert {r.fields["label"] for r in dev} == {"common", "rare", "pair"}


def test_records_without_a_label_are_a_class_of_their_own():
    labels = [None if i % 2 else "a" for i in range(100)]
    dev = split_train_dev(records_of(TEXTS), 0.1, 0, labels)[1]
    assert Counter(record.line % 2 for record in dev) == {0: 5, 1: 5}


def test_the_split_is_said_with_its_size_and_seed(caplog):
    caplog.set_level("INFO", "jaxlm")
    split_train_dev(records_of(TEXTS, LABELS), 0.1, 7, LABELS)
    assert "10 of 100 rows are held out (in proportion to their labels, seed 7" in caplog.text


def test_what_cannot_be_split_is_refused():
    with pytest.raises(
        ValueError, match=r"found: 3 records with 1 different inputs[\s\S]*data\.dev"
    ):
        split_train_dev(records_of(["a", "A", "a "]), 0.5)
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            split_train_dev(records_of(TEXTS), fraction)
