"""SQuAD's rules on examples worked out by hand, and the no-answer threshold against every threshold there is."""

import json
import random

import pytest

from jaxlm.tasks.squad_scores import (
    Threshold,
    answer_scores,
    best_threshold,
    exact_match,
    normalize,
    squad_scores,
    word_f1,
)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  cat-flap, an", "catflap"),
        ("a.m.", "am"),  # punctuation goes first, so no article is left
        ("an. apple", "apple"),
        ("Theatre", "theatre"),
        ("1,000 €", "1000 €"),
        ("“quoted” — text", "“quoted” — text"),  # only ASCII punctuation
        ("\tthe\n", ""),
        ("", ""),
    ],
)
def test_an_answer_is_normalised_by_the_official_rules(text, expected):
    assert normalize(text) == expected


def test_exact_match_ignores_case_articles_and_punctuation():
    assert exact_match("The Norman people.", "norman people") == 1
    assert exact_match("Norman people", "Norman") == 0


def test_f1_is_of_bags_of_words():
    # common: big, red, red of 3 and of 4 words
    assert word_f1("big red red", "red red big dog") == pytest.approx(2 * 3 / 7)
    assert word_f1("red", "red red") == pytest.approx(2 / 3)
    assert word_f1("red", "blue") == 0


def test_an_empty_side_agrees_only_with_an_empty_side():
    assert word_f1("", "") == word_f1("the", "") == 1
    assert word_f1("", "red") == word_f1("red", "") == word_f1("red", "the") == 0


def test_the_best_of_several_gold_answers_counts_for_each_score():
    assert answer_scores(["in the year 1066", "1066"], "year 1066") == (0, pytest.approx(0.8))


def test_without_gold_answers_only_silence_is_right():
    assert answer_scores([], "") == answer_scores(["the"], "") == (1, 1)
    assert answer_scores([], "1066") == (0, 0)


def test_questions_that_all_have_answers_get_two_scores():
    scores = squad_scores([["x"], ["x y", "z"]], ["x", "x"], [0.0, 1.0])
    assert scores == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}


def test_answerable_and_unanswerable_questions_are_scored_apart():
    scores = squad_scores([["x"], ["x y"], [], []], ["x", "x", "", "z"])
    assert scores == {
        "exact_match": 0.5,
        "f1": pytest.approx((1 + 2 / 3 + 1 + 0) / 4),
        "answerable_exact_match": 0.5,
        "answerable_f1": pytest.approx(5 / 6),
        "unanswerable_exact_match": 0.5,
    }


def test_questions_that_all_lack_answers_get_no_score_of_the_others():
    assert squad_scores([[], []], ["", "x"]) == {
        "exact_match": 0.5,
        "f1": 0.5,
        "unanswerable_exact_match": 0.5,
    }


def test_the_threshold_is_the_largest_no_answer_score_worth_answering():
    # kept in the order of the scores: 1 (right), 0.5 (half right), 0 (has no answer), 1 (right)
    # mean at thresholds below 1, 1, 2, 3, 4: 1/4, 2/4, 2.5/4, 1.5/4, 2.5/4
    best = best_threshold([1, 0.5, 0, 1], [True, True, False, True], [1.0, 2.0, 3.0, 4.0])
    assert best == Threshold(0.625, 2.0)


def score_at(threshold, kept, answerable, scores):
    rows = zip(kept, answerable, scores, strict=True)
    return sum(float(not has) if s > threshold else k for k, has, s in rows) / len(kept)


def check_threshold(search):
    """It gives the score that is promised, and no threshold gives more."""
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 8)
        kept = [rng.choice([0.0, 0.25, 1.0]) for _ in range(n)]
        answerable = [rng.random() < 0.5 for _ in range(n)]
        scores = [rng.choice([-2.0, -1.0, 0.0, 0.5, 3.0]) for _ in range(n)]
        found = search(kept, answerable, scores)
        every = [score_at(t, kept, answerable, scores) for t in (-10, -2, -1, 0, 0.5, 3)]
        assert found.score == pytest.approx(max(every))
        assert score_at(found.threshold, kept, answerable, scores) == pytest.approx(found.score)


def test_no_threshold_is_better_than_the_one_found():
    check_threshold(best_threshold)


def test_the_law_of_the_threshold_fails_for_equal_scores_one_by_one():
    """The official script's loop: right for distinct scores above 0, such as probabilities."""

    def one_by_one(kept, answerable, scores):
        total = best = float(len(answerable) - sum(answerable))
        threshold = 0.0
        for k, has, s in sorted(zip(kept, answerable, scores, strict=True), key=lambda r: r[2]):
            total += k - (not has)
            if total > best:
                best, threshold = total, s
        return Threshold(best / len(kept), threshold)

    with pytest.raises(AssertionError):
        check_threshold(one_by_one)
    distinct = [1, 0.5, 0, 1], [True, True, False, True], [1.0, 2.0, 3.0, 4.0]
    assert one_by_one(*distinct) == best_threshold(*distinct)


def test_the_best_scores_are_those_of_the_best_thresholds():
    answers, said = [["x"], ["y z"], [], []], ["x", "y", "z", "z"]
    scores = squad_scores(answers, said, [-5.0, 1.0, 0.5, 2.0])
    assert (scores["best_exact_match"], scores["best_exact_match_threshold"]) == (0.75, -5.0)
    assert (scores["best_f1"], scores["best_f1_threshold"]) == (0.75, -5.0)
    scores = squad_scores(answers, said, [-5.0, -4.0, 0.5, 2.0])
    assert scores["best_f1"] == pytest.approx((1 + 2 / 3 + 2) / 4)
    assert scores["best_f1_threshold"] == -4.0


def test_answering_nothing_can_be_best_and_is_valid_json():
    scores = squad_scores([["x"], []], ["y", "z"], [-1.0, -2.0])
    assert scores["best_exact_match"] == 0.5
    assert json.loads(json.dumps(scores, allow_nan=False))["best_f1_threshold"] < -2.0


def test_missing_predictions_and_numbers_are_refused():
    with pytest.raises(ValueError, match="2 questions and 1 predictions"):
        squad_scores([["x"], []], ["x"])
    with pytest.raises(ValueError, match="0 questions"):
        squad_scores([], [])
    with pytest.raises(ValueError) as error:
        squad_scores([["x"], []], ["x", "y"], [float("nan")])
    assert "1 no-answer scores:" in str(error.value)
    assert "1 no-answer scores that are no finite number" in str(error.value)
