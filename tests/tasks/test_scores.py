"""Scores against scikit-learn, scipy and seqeval themselves, the official SemEval numbers, and by hand."""

import ast
import json
import math
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from jaxlm.tasks import scores as scores_module
from jaxlm.tasks.scores import (
    classification_report,
    classification_scores,
    confused_pairs,
    entity_report,
    entity_scores,
    multi_label_report,
    multi_label_scores,
    regression_scores,
    retrieval_ranks,
    retrieval_scores,
    semeval_scores,
    token_accuracy,
)

RELATIONS = (
    "Cause-Effect Component-Whole Content-Container Entity-Destination Entity-Origin"
    " Instrument-Agency Member-Collection Message-Topic Product-Producer"
).split()
DIRECTED = [f"{name}({way})" for name in RELATIONS for way in ("e1,e2", "e2,e1")] + ["Other"]


@pytest.fixture(autouse=True)
def no_warnings():
    """Nothing that a user would see in a terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_libraries_of_scores_are_imported_when_one_is_asked_for():
    """Pretraining and prediction never pay for them: only functions import them."""
    tree = ast.parse(Path(scores_module.__file__).read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in top}
    libraries = ("sklearn", "scipy", "seqeval")
    assert not any(name.startswith(libraries) for name in names)
    nested = {getattr(n, "module", "") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert nested > set(libraries)


def check_plain_floats(scores):
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert all(type(value) is float for value in scores.values())


# ---- one class of several


def test_classes_are_scored_as_scikit_learn_does():
    from sklearn import metrics

    rng = np.random.default_rng(0)
    for num_classes in (2, 3, 150):
        gold = rng.integers(0, num_classes, 40)
        predicted = np.where(rng.random(40) < 0.6, gold, rng.integers(0, num_classes, 40))
        found = classification_scores(gold, predicted, ["name"] * num_classes)
        mean = {"average": "macro", "zero_division": 0}
        assert found == pytest.approx(
            {
                "accuracy": metrics.accuracy_score(gold, predicted),
                "f1_micro": metrics.f1_score(gold, predicted, average="micro"),
                "f1_macro": metrics.f1_score(gold, predicted, **mean),
                "precision_macro": metrics.precision_score(gold, predicted, **mean),
                "recall_macro": metrics.recall_score(gold, predicted, **mean),
                "mcc": metrics.matthews_corrcoef(gold, predicted),
            }
        )
        check_plain_floats(found)


def test_the_macro_mean_is_over_the_classes_that_occur():
    # a: F1 1; b: only in gold, F1 0; c: only predicted, F1 0; d: nowhere and not counted
    scores = classification_scores([0, 0, 1], [0, 0, 2], ["a", "b", "c", "d"])
    assert scores["f1_macro"] == pytest.approx(1 / 3)
    assert scores["accuracy"] == scores["f1_micro"] == pytest.approx(2 / 3)


def check_unknown_labels_count_as_wrong(score):
    known = score([0, 1], [0, 1], ["a", "b"])
    unknown = score([0, 1, -1, -1], [0, 1, 0, 1], ["a", "b"])
    assert known["accuracy"] == 1
    assert unknown["accuracy"] == 0.5
    assert unknown["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_an_unknown_gold_label_is_always_wrong():
    check_unknown_labels_count_as_wrong(classification_scores)


def test_the_law_of_unknown_labels_fails_where_they_are_dropped():
    def dropping(gold, predicted, names):
        kept = np.array(gold) >= 0
        return classification_scores(np.array(gold)[kept], np.array(predicted)[kept], names)

    with pytest.raises(AssertionError):
        check_unknown_labels_count_as_wrong(dropping)


def test_a_single_class_everywhere_is_right_but_correlates_with_nothing():
    scores = classification_scores([1, 1], [1, 1], ["a", "b"])
    assert (scores["accuracy"], scores["f1_macro"], scores["mcc"]) == (1, 1, 0)
    assert classification_scores([0, 1], [1, 1], ["a", "b"])["mcc"] == 0


def test_wrong_ids_and_lengths_are_refused_together():
    with pytest.raises(ValueError) as error:
        classification_scores([0, 2, -2], [0, -1], ["a", "b"])
    assert "found 3 gold and 2 predicted" in str(error.value)
    assert "gold ids [-2, 2]: expected -1 to 1" in str(error.value)
    assert "predicted ids [-1]: expected 0 to 1" in str(error.value)
    with pytest.raises(ValueError, match="0 gold"):
        classification_scores([], [], ["a"])


# ---- any number of classes


def test_sets_of_classes_are_scored_as_scikit_learn_does():
    from sklearn import metrics

    rng = np.random.default_rng(1)
    gold, predicted = rng.random((2, 30, 5)) < 0.3
    gold[:, 4] = predicted[:, 4] = 0  # a class without examples and predictions counts as 0
    gold, predicted = gold.astype(int), predicted.astype(int)
    found = multi_label_scores(gold, predicted)
    micro = {"average": "micro", "zero_division": 0}
    assert found == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(gold, predicted),
            "f1_micro": metrics.f1_score(gold, predicted, **micro),
            "f1_macro": metrics.f1_score(gold, predicted, average="macro", zero_division=0),
            "precision_micro": metrics.precision_score(gold, predicted, **micro),
            "recall_micro": metrics.recall_score(gold, predicted, **micro),
        }
    )
    check_plain_floats(found)


def test_an_unknown_label_of_a_set_is_missed():
    scores = multi_label_scores([[1, 0], [0, 1]], [[1, 0], [0, 1]], unknown=[0, 2])
    assert scores["accuracy"] == 0.5
    assert scores["recall_micro"] == pytest.approx(2 / 3)
    assert scores["f1_macro"] == pytest.approx(2 / 3)
    assert multi_label_scores([[1], [0]], [[1], [0]], unknown=[0, 0])["f1_macro"] == 1


def test_one_class_that_may_be_absent_is_not_two_classes():
    scores = multi_label_scores([[1], [0], [0]], [[1], [1], [0]])
    assert scores["f1_macro"] == scores["f1_micro"] == pytest.approx(2 / 3)
    report = multi_label_report([[1], [0]], [[1], [0]], ["rare"])
    assert re.search(r"rare +1\.000 +1\.000 +1\.000 +1\n", report)


def test_empty_sets_that_agree_are_right_but_have_no_f1():
    assert multi_label_scores([[0, 0]], [[0, 0]]) == {
        "accuracy": 1,
        "f1_micro": 0,
        "f1_macro": 0,
        "precision_micro": 0,
        "recall_micro": 0,
    }


def test_tables_of_other_shapes_or_numbers_are_refused():
    with pytest.raises(ValueError, match=r"gold \(2, 1\), predicted \(2, 2\)"):
        multi_label_scores([[1], [0]], [[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="nothing but 0 and 1"):
        multi_label_scores([[0.5, 1]], [[0, 1]])


# ---- a number


def test_numbers_are_scored_as_scipy_and_scikit_learn_do():
    from scipy import stats
    from sklearn import metrics

    rng = np.random.default_rng(2)
    gold, predicted = rng.integers(0, 6, 50).astype(float), rng.normal(size=50)
    found = regression_scores(gold, predicted)
    assert found == pytest.approx(
        {
            "pearson": stats.pearsonr(gold, predicted).statistic,
            "spearman": stats.spearmanr(gold, predicted).statistic,
            "mse": metrics.mean_squared_error(gold, predicted),
        }
    )
    check_plain_floats(found)


@pytest.mark.parametrize(
    "gold, predicted",
    [([1, 2, 3], [7, 7, 7]), ([7, 7], [1, 2]), ([1], [2]), ([1, 2], [1e-300, 2e-300])],
)
def test_a_constant_correlates_with_nothing(gold, predicted):
    scores = regression_scores(gold, predicted)
    check_plain_floats(scores)
    if len(set(predicted)) == 1 or len(set(gold)) == 1:
        assert scores["pearson"] == scores["spearman"] == 0


def test_a_constant_but_for_rounding_warns_of_nothing():
    scores = regression_scores([1, 2, 3], [1.0, 1.0 + 1e-15, 1.0])
    assert math.isfinite(scores["pearson"])


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="2 predicted numbers are not finite"):
        regression_scores([1, 2, 3], [1, math.nan, math.inf])


# ---- relations


def macro(*f1):
    return sum(f1) / len(f1)


def check_direction(score):
    """Worked out by hand: Cause-Effect 1 right of 3 predicted and 2 gold, Message-Topic 0 of 0 and 1."""
    gold = ["Cause-Effect(e1,e2)", "Cause-Effect(e1,e2)", "Other", "Message-Topic(e2,e1)", "Other"]
    said = ["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Cause-Effect(e2,e1)", "Other", "Other"]
    scores = score(gold, said)
    assert scores["semeval_precision"] == pytest.approx(macro(1 / 3, 0))
    assert scores["semeval_recall"] == pytest.approx(macro(1 / 2, 0))
    assert scores["semeval_f1"] == pytest.approx(macro(2 / 5, 0))
    assert scores["semeval_f1_micro"] == pytest.approx(2 / 6)


def test_a_relation_of_the_wrong_direction_is_predicted_and_gold_but_not_right():
    check_direction(semeval_scores)


def test_the_law_of_direction_fails_where_it_is_ignored_or_makes_two_classes():
    def ignoring(gold, predicted):
        return semeval_scores([g[:5] for g in gold], [p[:5] for p in predicted])

    def two_classes(gold, predicted):
        return semeval_scores(
            *([x.replace("(", "").replace(")", "") for x in s] for s in (gold, predicted))
        )

    for wrong in (ignoring, two_classes):
        with pytest.raises(AssertionError):
            check_direction(wrong)


def test_the_official_scorer_gives_the_same_numbers():
    """Recorded: what the calculation of scorer v1.2 printed, run in Perl on these labels."""
    gold = [DIRECTED[i * i % 19] for i in range(200)]
    said = [DIRECTED[(i * i + (i % 3 == 0) * (i % 7)) % 19] for i in range(200)]
    scores = semeval_scores(gold, said)
    assert list(scores.values()) == pytest.approx(
        [0.742701228177, 0.775582176444, 0.715029761905, 0.748691099476], abs=1e-11
    )
    check_plain_floats(scores)


def test_a_relation_that_only_the_prediction_has_is_no_part_of_the_mean():
    scores = semeval_scores(["A-B(e1,e2)", "Other"], ["A-B(e1,e2)", "C-D(e1,e2)"])
    assert scores["semeval_f1"] == 1


def test_no_relation_at_all_scores_nothing():
    assert set(semeval_scores(["Other"], ["A-B(e1,e2)"]).values()) == {0.0}


# ---- entities


def random_tags(rng, prefixes, num_sentences=30):
    draw = lambda: rng.choice(["O", *(f"{p}-{k}" for p in prefixes for k in ("PER", "LOC"))])
    return [[draw() for _ in range(rng.randint(0, 8))] for _ in range(num_sentences)]


def noisy(rng, sentences, share=0.3):
    tags = sorted({tag for sentence in sentences for tag in sentence})
    return [[rng.choice(tags) if rng.random() < share else t for t in s] for s in sentences]


@pytest.mark.parametrize("prefixes, scheme", [("BI", "IOB2"), ("BIES", "IOBES")])
@pytest.mark.parametrize("strict", [False, True])
def test_entities_are_scored_as_seqeval_does(prefixes, scheme, strict):
    from seqeval import metrics
    from seqeval import scheme as schemes

    rng = random.Random(3)
    gold = random_tags(rng, prefixes)
    predicted = noisy(rng, gold)
    mode = {"mode": "strict", "scheme": getattr(schemes, scheme)} if strict else {}
    found = entity_scores(gold, predicted, strict=strict)
    assert found == pytest.approx(
        {
            "entity_precision": metrics.precision_score(gold, predicted, **mode),
            "entity_recall": metrics.recall_score(gold, predicted, **mode),
            "entity_f1": metrics.f1_score(gold, predicted, **mode),
            "token_accuracy": metrics.accuracy_score(gold, predicted),
        }
    )
    assert 0 < found["entity_f1"] < 1
    check_plain_floats(found)


def test_strict_scores_count_only_what_is_well_formed():
    gold, predicted = [["O", "B-PER"]], [["O", "I-PER"]]
    assert entity_scores(gold, predicted)["entity_f1"] == 1
    assert entity_scores(gold, predicted, strict=True, scheme="BIO")["entity_f1"] == 0


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_to_find_scores_nothing_also_where_nothing_is_found(strict):
    nothing, something = [["O", "O"]], [["O", "B-PER"]]
    for gold, predicted in [(nothing, nothing), (nothing, something), (something, nothing)]:
        scores = entity_scores(gold, predicted, strict=strict)
        assert {scores[f"entity_{k}"] for k in ("precision", "recall", "f1")} == {0.0}
        check_plain_floats(scores)
    assert entity_scores([[]], [[]], strict=strict)["token_accuracy"] == 0
    assert entity_report(nothing, nothing, strict=strict).startswith("no entities")


def test_bilou_scores_as_bioes_does():
    gold, predicted = ["B-X L-X O U-Y O"], ["B-X L-X O O U-Y"]
    bioes = str.maketrans("LU", "ES")
    split = lambda rows: [row.split() for row in rows]
    same = split(r.translate(bioes) for r in gold), split(r.translate(bioes) for r in predicted)
    for strict in (False, True):
        found = entity_scores(split(gold), split(predicted), strict=strict)
        assert found == entity_scores(*same, strict=strict)
        assert found["entity_f1"] == 0.5


def test_parts_of_speech_have_an_accuracy_and_no_entities():
    scores = entity_scores([["DET", "NOUN"]], [["DET", "VERB"]])
    assert (scores["entity_f1"], scores["token_accuracy"]) == (0, 0.5)
    assert token_accuracy([["DET", "NOUN"], []], [["DET", "VERB"], []]) == 0.5


def test_sentences_of_other_lengths_are_named():
    with pytest.raises(ValueError, match="1 sentences with different .* sentence 1: 2 and 1 tags"):
        entity_scores([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(ValueError, match="found 1 gold and 2 predicted"):
        entity_report([["O"]], [["O"], ["O"]])


def test_tags_of_another_scheme_are_refused_in_strict_scores():
    with pytest.raises(ValueError, match=r"\['E-X', 'S-X'\] are not of the scheme BIO"):
        entity_scores([["S-X", "B-X", "E-X"]], [["O", "O", "O"]], strict=True, scheme="BIO")
    with pytest.raises(ValueError, match="scheme 'IOBES': use one of BIO, BIOES"):
        entity_scores([["S-X"]], [["O"]], strict=True, scheme="IOBES")


# ---- search


def check_ranks(ranks):
    similarities = [[0.1, 0.9, 0.5], [0.7, 0.7, 0.1], [0.3, math.nan, 0.2], [0.0, 0.0, 0.0]]
    assert list(ranks(similarities, [2, 0, 0, 1])) == [2, 2, 2, 3]


def test_equals_and_no_numbers_rank_before_the_right_candidate():
    check_ranks(retrieval_ranks)


def test_the_law_of_ranks_fails_where_equals_are_counted_in_favour():
    def lucky(similarities, gold):
        rows = np.array(similarities)
        return 1 + (rows > rows[np.arange(len(gold)), gold][:, None]).sum(1)

    with pytest.raises(AssertionError):
        check_ranks(lucky)


def test_recall_and_mean_reciprocal_rank():
    scores = retrieval_scores([1, 2, 5, 10, 20])
    assert scores == {
        "recall_at_1": 0.2,
        "recall_at_5": 0.6,
        "recall_at_10": 0.8,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 10 + 1 / 20) / 5),
    }
    check_plain_floats(scores)
    with pytest.raises(ValueError, match="counted from 1"):
        retrieval_scores([0, 1])


# ---- reports


def test_the_report_of_classes_has_every_class_and_the_scores():
    gold, predicted, names = [0, 0, 1, -1], [0, 2, 2, 0], ["a", "b", "c", "d", "e"]
    report = classification_report(gold, predicted, names)
    scores = classification_scores(gold, predicted, names)
    assert re.search(rf"macro avg .* {scores['f1_macro']:.3f} ", report)
    assert re.search(rf"accuracy +{scores['accuracy']:.3f} ", report)
    assert re.search(r"\(unknown label\) .* 1\n", report)
    assert "without examples and predictions (2): d, e" in report
    assert "      1    50.0%  a -> c" in report


def test_a_report_of_150_classes_is_a_line_each_and_ten_confusions():
    names = [f"intent {i} {'x' * (i % 60)}" for i in range(150)]
    gold = np.arange(450) % 150
    predicted = np.where(np.arange(450) < 150, (gold + 1) % 150, gold)
    lines = classification_report(gold, predicted, names).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(" -> " in line for line in lines) == 1 + 10
    assert len(lines) == 1 + 150 + 3 + 2 + 1 + 10
    assert len(classification_report(gold, gold, names).splitlines()) == 1 + 150 + 3


def test_confusions_are_ordered_by_count_and_then_by_class():
    assert confused_pairs([0, 1, 1, 2, 2, -1, 0], [1, 0, 0, 0, 0, 0, 0], limit=3) == [
        (1, 0, 2),
        (2, 0, 2),
        (-1, 0, 1),
    ]


def test_the_report_of_sets_has_every_class_and_the_unknown():
    report = multi_label_report([[1, 0]], [[1, 0]], ["a", "b"], unknown=[1])
    assert re.search(r"\n +a +1\.000 .* 1\n", report)
    assert re.search(r"\n +b +0\.000 .* 0\n", report)
    assert re.search(r"\n\(unknown label\) +0\.000 .* 1\n", report)


def test_the_report_of_entities_has_every_kind():
    gold, predicted = [["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "B-ORG"]]
    report = entity_report(gold, predicted)
    assert [line.split()[0] for line in report.splitlines()[1:4]] == ["LOC", "ORG", "PER"]
    assert re.search(r"micro avg +0\.500 +0\.500 +0\.500 +2", report)
