"""One of a few choices: how they are laid out, compared, cut and scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.tasks import multiple_choice
from jaxlm.tasks.multiple_choice import MultipleChoice, choice_log_probs, share_room
from jaxlm.tuning.splits import make_split
from tests.tasks.slots import TOKENIZER, Row, layout, loss_of, make_batch, make_task, read

CLS, SEP = TOKENIZER.cls_id, TOKENIZER.sep_id
ROWS = [
    Row(dict(question="why", choices=["so", "no"], label=1)),
    Row(dict(question="who", choices=["me", "you", "nobody"], label=0)),
    Row(dict(question="", choices=["left", "right"], label=1)),
    Row(dict(question="when", choices=["now", "then", "a", "b"], label=3)),
]


def features_of(task, rows=ROWS):
    return [task.features(row)[0][0] for row in rows]


def test_choices_follow_their_question_in_segments_of_one_feature():
    [feature], truncated = make_task(MultipleChoice).features(
        Row(dict(question="Q", choices=["a", "bc"], label=1))
    )
    q, a, b, c = TOKENIZER.encode("Qabc")
    np.testing.assert_array_equal(feature["tokens"], [CLS, q, SEP, a, SEP, CLS, q, SEP, b, c, SEP])
    np.testing.assert_array_equal(feature["segments"], [1] * 5 + [2] * 6)
    np.testing.assert_array_equal(feature["token_types"], [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(feature["example_positions"], [0, 5])
    np.testing.assert_array_equal(feature["example_labels"], [0, 1])
    assert not truncated


def test_a_decoder_reads_each_choice_at_its_last_token():
    task = MultipleChoice(TOKENIZER, layout(causal=True), {})
    [feature], _ = task.features(Row(dict(question="Q", choices=["a", "bc"], label=0)))
    np.testing.assert_array_equal(feature["example_positions"], [4, 10])
    assert (feature["tokens"][[4, 10]] == TOKENIZER.eos_id).all()


def check_loss_is_that_of_one_record_after_the_other(task):
    """Against a softmax over each record's choices alone, padded and packed, with empty slots and rows."""
    features = features_of(task)
    expected = []
    for feature, row in zip(features, ROWS, strict=True):
        scores = np.asarray(read(make_batch([feature], packed=False)[0], 1).head_logits)[0, :, 0]
        expected.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max())
        expected[-1] -= scores[row.fields["label"]]
    for shape in (dict(packed=False), dict(packed=True, slots=9, extra_rows=1)):
        batch, _ = make_batch(features, **shape)
        (total, weight), metrics = loss_of(task, read(batch, 1), batch)
        np.testing.assert_allclose(total, np.sum(expected), rtol=1e-5)
        assert float(weight) == len(ROWS) and metrics["accuracy"][1] == len(ROWS)


def test_the_loss_is_that_of_one_record_after_the_other():
    check_loss_is_that_of_one_record_after_the_other(make_task(MultipleChoice))


def test_a_softmax_over_the_whole_row_is_found(monkeypatch):
    over_row = lambda scores_BE, ids_BE: jax.nn.log_softmax(scores_BE, axis=-1)
    monkeypatch.setattr(multiple_choice, "choice_log_probs", over_row)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_loss_is_that_of_one_record_after_the_other(make_task(MultipleChoice))


def test_empty_slots_and_rows_have_a_gradient_of_zero_and_no_nan():
    task = make_task(MultipleChoice)
    batch, _ = make_batch(features_of(task), packed=False, extra_rows=2)
    outputs = read(batch, 1)

    def total(logits):
        return task.loss(type(outputs)(head_logits=logits), batch)[0][0]

    gradient = np.asarray(jax.jit(jax.grad(total))(outputs.head_logits))[..., 0]
    empty = np.asarray(batch["example_ids"]) < 0
    assert np.isfinite(gradient).all() and empty.any()
    assert (gradient[empty] == 0).all() and (gradient[~empty] != 0).any()


def check_predictions_agree_with_the_metric(task):
    """What decode says, from its place in the packed batch, is what the loss's accuracy counted, ties included."""
    features = features_of(task)
    batch, places = make_batch(features, packed=True, slots=9)
    outputs = read(batch, 1)
    outputs.head_logits[places[1].row] = 0.0  # a tie
    scores = np.asarray(task.predict(outputs, batch)["slot_scores"])
    predictions = []
    for number, row in enumerate(ROWS):
        m = len(row.fields["choices"])
        place = places[number]
        of_record = scores[place.row, place.slot : place.slot + m]
        predictions.append(task.decode(row, [features[number]], [{"slot_scores": of_record}]))
        assert np.isclose(sum(predictions[-1]["probabilities"]), 1, atol=1e-5)
        assert len(predictions[-1]["probabilities"]) == m
    right, counted = loss_of(task, outputs, batch)[1]["accuracy"]
    assert task.scores(ROWS, predictions)["accuracy"] == float(right) / float(counted)


def test_predictions_agree_with_the_metric():
    check_predictions_agree_with_the_metric(make_task(MultipleChoice))


def test_a_metric_that_calls_every_tie_right_is_found(monkeypatch):
    def at_least(scores_BE, ids_BE):
        rivals = jnp.where(ids_BE[:, :, None] == ids_BE[:, None, :], scores_BE[:, None, :], -1e9)
        return scores_BE >= rivals.max(-1)

    monkeypatch.setattr(multiple_choice, "_is_best", at_least)
    with pytest.raises(AssertionError):
        check_predictions_agree_with_the_metric(make_task(MultipleChoice))


def test_log_probs_are_of_the_slots_with_the_same_id_only():
    scores, ids = jnp.array([[1.0, 2.0, 3.0, 9.0]]), jnp.array([[5, 5, 6, -1]])
    found = np.exp(np.asarray(choice_log_probs(scores, ids)))
    np.testing.assert_allclose(found, [[0.268941, 0.731059, 1.0, 1.0]], rtol=1e-5)


@pytest.mark.parametrize(
    "question, choices, room, expected",
    [
        (5, [3, 4], 17, (5, [3, 4])),
        (5, [3, 4], 14, (3, [3, 4])),
        (5, [3, 4], 7, (0, [3, 4])),
        (5, [3, 9], 7, (0, [3, 4])),
    ],
)
def test_the_question_gives_way_before_the_choices(question, choices, room, expected):
    assert share_room(question, choices, room) == expected


@pytest.mark.parametrize("seq_len", [15, 24, 40])
def test_a_record_that_is_too_long_fills_the_row_and_says_that_it_was_cut(seq_len):
    row = Row(dict(question="q" * 30, choices=["yes", "n" * 20], label=0))
    task = make_task(MultipleChoice, seq_len)
    [feature], truncated = task.features(row)
    assert truncated and seq_len - 1 <= len(feature["tokens"]) <= seq_len
    assert len(feature["tokens"]) == len(feature["segments"])
    assert task.problem(row, training=True) == ""


@pytest.mark.parametrize(
    "fields, training, expected",
    [
        (dict(choices=[], label=0), False, "no choices"),
        (dict(choices=["a"] * 40, label=0), False, "seq_len is 64"),
        (dict(choices=["a"], label=0), True, "one choice"),
        (dict(choices=["a", " "], label=0), True, "choice 1 is empty"),
        (dict(choices=["a", "b"]), True, "missing"),
        (dict(choices=["a", "b"], label=2), True, "label 2 is not"),
        (dict(choices=["a", "b"], label=-1), True, "label -1 is not"),
        (dict(choices=["a", "b"], label="b"), True, "label 'b' is not"),
        (dict(choices=["a", "b"], label=2), False, ""),
        (dict(choices=["a", "b"]), False, ""),
        (dict(choices=["a", "b"], label=np.int64(1)), True, ""),
    ],
)
def test_rows_that_cannot_be_used_are_named(fields, training, expected):
    problem = make_task(MultipleChoice).problem(Row({"question": "q", **fields}), training)
    assert (expected in problem) if expected else problem == ""


def test_a_row_without_choices_is_named_with_its_place():
    with pytest.raises(ValueError, match="rows.csv:7: there are no choices"):
        make_split("dev", make_task(MultipleChoice), [Row(dict(question="q", choices=[]))])


def test_a_label_that_names_no_choice_counts_as_wrong_and_has_no_loss():
    task = make_task(MultipleChoice)
    rows = [Row(dict(question="q", choices=["a", "b"], label=7)), ROWS[0]]
    batch, _ = make_batch(features_of(task, rows), packed=False)
    assert float(loss_of(task, read(batch, 1), batch)[0][1]) == 1
    assert task.scores(rows, [{"label": 0}, {"label": 1}]) == {"accuracy": 0.5}


def test_the_report_shows_each_place_and_chance():
    said = [{"label": 1}, {"label": 1}, {"label": 1}, {"label": 3}]
    lines = make_task(MultipleChoice).report(ROWS, said).splitlines()
    assert lines[0] == "4 records, accuracy by chance 0.3958"
    assert [line.split() for line in lines[2:]] == [
        ["0", "1", "0.0000", "0"],
        ["1", "2", "1.0000", "3"],
        ["3", "1", "1.0000", "1"],
    ]
