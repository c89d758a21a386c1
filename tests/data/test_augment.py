"""Text augmentation: what becomes of words, how often, and that features made from it fit where the plain ones do."""

import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxlm.data.augment import Augmentation, AugmentedFeatures

TEXT = " the quick\tbrown  fox\njumps over it "


class Row(NamedTuple):
    fields: dict[str, Any]


def rng(seed=0):
    return np.random.default_rng(seed)


def numbered(n):
    return " ".join(str(i) for i in range(n))


def test_nothing_changes_with_chances_of_zero():
    assert not Augmentation() and Augmentation()(rng(), TEXT) == TEXT


@pytest.mark.parametrize(
    "change", [Augmentation(0.5), Augmentation(swap=0.5), Augmentation(0.3, 0.3)]
)
def test_the_same_random_numbers_give_the_same_text_and_others_another(change):
    assert change and change(rng(1), TEXT) == change(rng(1), TEXT)
    assert len({change(rng(seed), TEXT) for seed in range(20)}) > 5


def check_dropout(change, rate):
    """Words are left out at `rate`, each alone; the others keep their order and the white space in front of them."""
    text, n, draws = numbered(50), 50, 400
    counts: Counter[str] = Counter()
    for seed in range(draws):
        words = change(rng(seed), text).split(" ")
        assert [int(w) for w in words] == sorted(int(w) for w in words)
        counts.update(words)
    kept = np.array([counts[str(i)] for i in range(n)]) / draws
    np.testing.assert_allclose(kept, 1 - rate, atol=5 * np.sqrt(rate * (1 - rate) / draws))


def test_words_are_dropped_at_the_rate_that_is_asked_for():
    check_dropout(Augmentation(dropout=0.2), 0.2)


def test_dropping_the_last_words_only_is_found():
    def cut(generator, text):
        return " ".join(text.split(" ")[: generator.binomial(50, 0.8)])

    with pytest.raises(AssertionError):
        check_dropout(cut, 0.2)


def check_swap(change, rate):
    """All words stay, at most one place from where they were, and pairs change places at about `rate`."""
    moved = 0
    for seed in range(200):
        words = np.array(change(rng(seed), numbered(40)).split(), int)
        assert sorted(words) == list(range(40))
        assert np.abs(words - np.arange(40)).max() <= 1
        moved += (words != np.arange(40)).sum()
    # a pair begins at a word that is not the second of another: at rate r / (1 + r) of all places
    assert moved / (200 * 40) == pytest.approx(2 * rate / (1 + rate), rel=0.1)


def test_neighbours_change_places_at_the_rate_that_is_asked_for():
    check_swap(Augmentation(swap=0.3), 0.3)


def test_shuffling_all_words_is_found():
    with pytest.raises(AssertionError):
        check_swap(lambda generator, text: " ".join(generator.permutation(text.split())), 0.3)


def test_white_space_stays_where_it_is():
    swapped = Augmentation(swap=1.0)(rng(), TEXT)
    assert swapped == " quick the\tfox  brown\nover jumps it "
    for seed in range(30):
        dropped = Augmentation(dropout=0.5)(rng(seed), TEXT)
        assert dropped[0] == " " and dropped[-1] == " "
        assert re.fullmatch(r"\s\S+((\t| {1,2}|\n)\S+)*\s", dropped)


@pytest.mark.parametrize("text", ["", "  ", "word", " word\n"])
def test_a_text_of_one_word_or_none_stays(text):
    assert Augmentation(0.9, 1.0)(rng(), text) == text


def test_one_word_stays_whatever_is_dropped():
    assert {len(Augmentation(0.99)(rng(seed), "a b c").split()) for seed in range(50)} == {1}


def test_wrong_chances_are_listed_together():
    with pytest.raises(ValueError, match="dropout=1.0(.|\n)*swap=-0.1"):
        Augmentation(1.0, -0.1)


def make_features(record):
    """One token for a word, but two for ' d', as a vocabulary may have it: 'd e' gets longer when its words swap."""
    words = re.findall(r" ?\S+", record.fields["text"])
    tokens = np.array([len(w) for w in words for _ in range(1 + w.startswith(" d"))], np.int32)
    return [{"tokens": tokens, "example_labels": np.array([record.fields["label"]])}], False


ROWS = [Row(dict(text=t, label=i)) for i, t in enumerate(["aa bbb c", "d e", "x yy zzz wwww"])]


def make_augmented(change, records=ROWS, names=("text",)):
    features = [make_features(record)[0][0] for record in ROWS]
    return AugmentedFeatures(records, features, make_features, change, names)


def check_fits(make):
    """Never more tokens than the plain feature has, the same label, and sometimes another feature."""
    plain = [make_features(record)[0][0] for record in ROWS]
    seen = set()
    for index, seed in np.ndindex(len(ROWS), 30):
        feature = make(index, rng(seed))
        assert len(feature["tokens"]) <= len(plain[index]["tokens"])
        assert feature["example_labels"] == [index]
        seen.add(feature["tokens"].tobytes())
    assert len(seen) > 2 * len(ROWS)


def test_augmented_features_fit_where_the_plain_ones_do():
    check_fits(make_augmented(Augmentation(0.3, 0.5)))


def test_a_longer_feature_after_a_swap_is_found():
    change = Augmentation(0.3, 0.5)

    def unchecked(index, generator):
        text = change(generator, ROWS[index].fields["text"])
        return make_features(Row(ROWS[index].fields | {"text": text}))[0][0]

    with pytest.raises(AssertionError):
        check_fits(unchecked)


def test_records_are_left_as_they_were_and_only_named_fields_change():
    before = [dict(row.fields) for row in ROWS]
    for names in (("text",), ("other", "label")):
        augmented = make_augmented(Augmentation(0.9), names=names)
        lengths = [len(augmented(0, rng(seed))["tokens"]) for seed in range(9)]
        assert (min(lengths) == 3) == (names != ("text",))
    assert [row.fields for row in ROWS] == before


def test_records_with_several_features_are_refused():
    with pytest.raises(ValueError, match="3 features of 2 records"):
        make_augmented(Augmentation(0.5), records=ROWS[:2])
