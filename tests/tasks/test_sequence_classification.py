"""Options of sequence classification; what it learns and scores is in tests/test_finetune.py and test_scores.py."""

import pytest

from jaxlm.tasks.sequence_classification import SequenceClassification


def make_task(**options):
    return SequenceClassification(
        None, None, {"labels": ["a", "b"], "class_weights": [1, 1]}, **options
    )


def test_everything_that_is_wrong_with_the_options_is_said_at_once():
    with pytest.raises(ValueError) as error:
        SequenceClassification.infer([], problem="both", class_weights="rare", pooling="max")
    for part in (
        "task.problem='both'",
        "task.class_weights='rare'",
        "task.pooling='max'",
        "the labels []",
    ):
        assert part in str(error.value)


def test_the_mean_has_a_head_of_its_own_and_the_default_is_the_familys():
    assert make_task().head == {"num_classes": 2}
    mean = {"num_classes": 2, "pooling": "mean", "transform": "", "use_norm": False}
    assert make_task(pooling="mean").head == mean
