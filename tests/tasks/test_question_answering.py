"""Answers as spans: windows, places of answers in tokens, the loss, the best spans, no answers and scores."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.tasks import question_answering
from jaxlm.tasks.question_answering import QuestionAnswering, best_spans, window_starts
from jaxlm.tokenizers import make_tokenizer
from tests.tasks.slots import Row, loss_of, make_batch
from tests.tasks.tokens import (
    byte_bpe,
    decoder,
    encoder,
    predict,
    read_tokens,
    taken_apart,
    wordpiece,
)

BERT = wordpiece()
BYTES = make_tokenizer("bytes", num_sentinels=0)
CONTEXT = "Ada Lovelace wrote  notes on the Engine of Paris, in Paris."


def row(question, answer=None, context=CONTEXT, **fields):
    """answer None: the question has none."""
    answers = [] if answer is None else [{"text": answer, "start": context.index(answer)}]
    return Row(
        {"id": question, "question": question, "context": context, "answers": answers} | fields
    )


ROWS = [
    row("who wrote notes", "Ada Lovelace"),
    row("wrote what", "notes"),
    row("in", "Paris, in Paris"),
    row("on the engine of", "the Engine"),
    row("a", "b c", "a b c"),
]
NONE = row("of what in France")


def make_task(layout=None, rows=ROWS, tokenizer=BERT, **options):
    fitted = QuestionAnswering.infer(rows, **options)
    return QuestionAnswering(tokenizer, layout or encoder(tokenizer), fitted, **options)


def ends(feature):
    return int(feature["example_start_positions"][0]), int(feature["example_end_positions"][0])


def test_the_answer_stands_behind_the_question_and_none_at_cls():
    [feature], truncated = make_task().features(row("Who wrote it", "Lovelace"))
    tokens = [BERT.token(i) for i in feature["tokens"]]
    assert tokens[:9] == "[CLS] [UNK] wrote [UNK] [SEP] ada love ##lace wrote".split()
    assert tokens[-1] == "[SEP]" and not truncated
    assert ends(feature) == (6, 7) and feature["example_positions"].tolist() == [0]
    assert feature["token_types"].tolist() == [0] * 5 + [1] * (len(tokens) - 5)
    [none], _ = make_task().features(NONE)
    assert ends(none) == (0, 0) and none["example_weights"].tolist() == [1.0]


def test_a_decoder_says_that_there_is_no_answer_at_its_last_token():
    task = make_task(decoder(byte_bpe()), tokenizer=byte_bpe())
    [feature], _ = task.features(NONE)
    last = len(feature["tokens"]) - 1
    assert ends(feature) == (last, last) and feature["tokens"][last] == byte_bpe().eos_id


def check_windows(starts, length, room, stride):
    """Each half a window's tokens in a row are together in one, windows begin `stride` apart, and the last is needed."""
    begins = list(starts(length, room, stride))
    windows = [set(range(begin, min(begin + room, length))) for begin in begins]
    for i in range(max(1, length - room // 2 + 1)):
        assert any(set(range(i, min(i + room // 2, length))) <= window for window in windows)
    assert begins[:1] == [0]
    assert all(b - a == min(stride, room // 2) for a, b in itertools.pairwise(begins))
    assert len(begins) == 1 or begins[-2] + room < length


def test_windows_hold_every_token_and_there_are_no_more_than_needed():
    for sizes in itertools.product((0, 1, 5, 6, 7, 29), (4, 6), (1, 3, 9)):
        check_windows(window_starts, *sizes)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda n, room, stride: range(0, n, min(stride, room)),
        lambda n, room, stride: range(0, max(1, n - room), min(stride, room)),
        lambda n, room, stride: range(0, max(1, n - room + stride), stride),
    ],
)
def test_windows_too_many_too_few_or_with_gaps_are_found(wrong):
    with pytest.raises(AssertionError):
        for sizes in itertools.product((0, 1, 5, 6, 7, 29), (4, 6), (1, 3, 9)):
            check_windows(wrong, *sizes)


def check_answers_in_windows(task, record):
    """Every window with all of the answer says where it is; the others say none; some window has it."""
    features, _ = task.features(record)
    answer = BERT.encode(record.fields["answers"][0]["text"]).tolist()
    found = 0
    for feature in features:
        first, last = ends(feature)
        tokens = feature["tokens"].tolist()
        begin = tokens.index(BERT.sep_id) + 1
        has = any(tokens[i : i + len(answer)] == answer for i in range(begin, len(tokens)))
        assert has == (first > 0) == (last > 0)
        assert not has or tokens[first : last + 1] == answer
        found += has
    assert 0 < found < len(features)


LONG = row("wrote", "Ada Lovelace", "on the engine of " * 9 + CONTEXT + " of the engine" * 9)


def test_windows_without_the_whole_answer_have_none():
    check_answers_in_windows(make_task(encoder(BERT, 16), doc_stride=5), LONG)


def test_an_answer_said_where_only_a_part_of_it_is_is_found(monkeypatch):
    def careless(window, answer):
        inside = range(len(window.spans))
        places = [place - window.first for place in answer if place - window.first in inside]
        return (window.start + places[0], window.start + places[-1]) if places else (0, 0)

    monkeypatch.setattr(question_answering, "place_answer", careless)
    with pytest.raises(AssertionError):
        check_answers_in_windows(make_task(encoder(BERT, 16), doc_stride=5), LONG)


def features_of(task, rows):
    return [feature for r in rows for feature in task.features(r)[0]]


def check_packed_loss(task):
    """Packed and padded give the mean of both ends' -log p, where p is a softmax over the feature alone."""
    features = features_of(task, [*ROWS, NONE])
    expected = []
    for feature in features:
        batch, _ = make_batch([feature], packed=False)
        logits = read_tokens(batch, 2).head_logits[0, : len(feature["tokens"])]
        log_probs = logits - np.log(np.exp(logits).sum(0))
        expected.append(-(log_probs[ends(feature)[0], 0] + log_probs[ends(feature)[1], 1]) / 2)
    for shape in (dict(packed=False), dict(packed=True, slots=9, extra_rows=1)):
        batch, _ = make_batch(features, length=64, **shape)
        (total, weight), metrics = loss_of(task, read_tokens(batch, 2), batch)
        np.testing.assert_allclose(total, np.sum(expected), rtol=1e-5)
        assert float(weight) == metrics["accuracy"][1] == len(features)


def test_the_loss_is_that_of_one_window_after_the_other_packed_and_padded():
    check_packed_loss(make_task())


def test_a_softmax_over_the_whole_row_is_found(monkeypatch):
    everywhere = lambda batch: jnp.ones_like(own(batch))
    own = question_answering.own_tokens
    monkeypatch.setattr(question_answering, "own_tokens", everywhere)
    with pytest.raises(AssertionError):
        check_packed_loss(make_task())


def test_empty_slots_and_rows_have_a_finite_gradient_of_zero():
    task = make_task()
    batch, _ = make_batch(features_of(task, ROWS), packed=True, slots=9, extra_rows=2)
    outputs = read_tokens(batch, 2)
    total = lambda logits: task.loss(type(outputs)(head_logits=logits), batch)[0][0]
    gradient = np.asarray(jax.jit(jax.grad(total))(outputs.head_logits))
    empty = np.asarray(batch["segment_ids"]) == 0
    assert np.isfinite(gradient).all() and (gradient[empty] == 0).all() and gradient.any()


def perfect(task, record):
    """What predict gives of a model that knows the answer."""
    outputs = []
    for feature in task.features(record)[0]:
        log_probs = np.full((len(feature["tokens"]), 2), -20.0, np.float32)
        # Where a window has no answer, its best span is not as sure as the answer elsewhere.
        sure = -0.5 if ends(feature)[0] == feature["example_positions"][0] else -0.01
        log_probs[ends(feature), (0, 1)] = sure
        outputs.append({"token_log_probs": log_probs})
    return outputs


def check_round_trip(task, rows):
    for record in rows:
        features, _ = task.features(record)
        said = task.decode(record, features, perfect(task, record))
        answers = record.fields["answers"]
        assert said["answer"] == (answers[0]["text"] if answers else "")
        assert record.fields["context"][said["start"] : said["end"]] == said["answer"]


@pytest.mark.parametrize("tokenizer", [BERT, byte_bpe(), BYTES], ids=["bert", "byte_bpe", "bytes"])
def test_perfect_logits_decode_to_the_very_text_of_the_answer(tokenizer):
    for layout in (encoder(tokenizer, 128), encoder(tokenizer, 40), decoder(tokenizer, 40)):
        check_round_trip(make_task(layout, tokenizer=tokenizer, doc_stride=8), ROWS)
        with_none = [*ROWS, NONE, LONG]
        check_round_trip(make_task(layout, with_none, tokenizer, doc_stride=8), with_none)


def test_an_answer_of_another_place_is_found():
    task, record = make_task(), ROWS[0]
    features, _ = task.features(record)
    outputs = [{k: np.roll(v, 1, axis=0) for k, v in o.items()} for o in perfect(task, record)]
    assert task.decode(record, features, outputs)["answer"] != record.fields["answers"][0]["text"]


def test_the_text_keeps_its_case_and_accents():
    record = row("a", "PARÍS  De", "in  PARÍS  De a")
    check_round_trip(make_task(), [record])


def brute_force(log_probs, longest):
    n = len(log_probs)
    spans = [(i, j) for i in range(n) for j in range(i, min(n, i + longest))]
    return sorted(((log_probs[i, 0] + log_probs[j, 1], i, j) for i, j in spans), reverse=True)


@pytest.mark.parametrize("n, longest, count", [(1, 1, 5), (3, 5, 4), (12, 4, 7), (12, 30, 100)])
def test_the_best_spans_are_the_best_of_all(n, longest, count):
    log_probs = np.random.default_rng(n).normal(size=(n, 2))
    found = sorted(best_spans(log_probs, longest, count), reverse=True)
    assert found == brute_force(log_probs, longest)[:count]
    assert best_spans(np.empty((0, 2)), longest, count) == []


def random_predictions(task, rows, packed):
    """Of a head of random numbers, from one batch of all rows."""
    made = [task.features(r)[0] for r in rows]
    features = [f for some in made for f in some]
    batch, places = make_batch(features, packed=packed)
    outputs = taken_apart(predict(task, read_tokens(batch, 2), batch), places, features)
    each = iter(outputs)
    return [
        task.decode(r, some, list(itertools.islice(each, len(some))))
        for r, some in zip(rows, made, strict=True)
    ]


def test_predictions_of_packed_rows_are_those_of_padded_ones():
    task = make_task(encoder(BERT, 24), [*ROWS, NONE], doc_stride=6)
    packed, padded = (random_predictions(task, [*ROWS, NONE], packed) for packed in (True, False))
    for one, other in zip(packed, padded, strict=True):
        assert one["answer"] == other["answer"] and one["id"] == other["id"]
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)


def test_the_n_best_are_different_texts_in_order_and_no_longer_than_allowed():
    task = make_task(encoder(BERT, 24), doc_stride=6, n_best=5, max_answer_len=3)
    for said in random_predictions(task, ROWS[:4], packed=False):
        texts = [one["answer"] for one in said["n_best"]]
        probabilities = [one["probability"] for one in said["n_best"]]
        assert len(texts) == len(set(texts)) == 5 and said["answer"] == texts[0]
        assert probabilities == sorted(probabilities, reverse=True)
        assert max(len(BERT.encode(text)) for text in texts) <= 3


def test_without_unanswerable_training_questions_there_is_always_an_answer():
    for said in random_predictions(make_task(), [*ROWS, NONE], packed=True):
        assert said["answer"] and "no_answer_score" not in said


def test_the_threshold_decides_between_the_best_answer_and_none():
    rows = [*ROWS, NONE]
    scores = [p["no_answer_score"] for p in random_predictions(make_task(rows=rows), rows, True)]
    for threshold in sorted(scores):
        task = make_task(rows=rows, no_answer_threshold=threshold)
        said = random_predictions(task, rows, packed=True)
        assert [p["answer"] == "" for p in said] == [score > threshold for score in scores]
        assert all(p["best_answer"] == p["n_best"][0]["answer"] for p in said)


def test_the_threshold_that_scores_name_gives_the_score_that_they_name():
    rows = [*ROWS, NONE, row("c", None, "a b c")]
    found = make_task(rows=rows).scores(rows, random_predictions(make_task(rows=rows), rows, True))
    assert found["no_answer_threshold"] == 0.0 and {"exact_match", "f1"} <= found.keys()
    for name in ("exact_match", "f1"):
        best = make_task(rows=rows, no_answer_threshold=found[f"best_{name}_threshold"])
        scores = best.scores(rows, random_predictions(best, rows, True))
        assert scores[name] == pytest.approx(found[f"best_{name}"])
        assert scores[name] >= found[name]


def test_perfect_predictions_score_1_and_the_report_lists_those_without_a_right_word():
    rows = [*ROWS, NONE]
    task = make_task(rows=rows)
    said = [task.decode(r, task.features(r)[0], perfect(task, r)) for r in rows]
    scores = task.scores(rows, said)
    assert scores["f1"] == scores["exact_match"] == scores["best_f1"] == 1.0
    assert "0 of 6" in task.report(rows, said)
    said[0] = said[0] | {"answer": "Paris"}
    assert "'Ada Lovelace' -> 'Paris'" in task.report(rows, said)
    assert task.confusion(rows, said) is None and task.best_metric == "f1"


def test_a_long_question_is_cut_and_said_and_leaves_room_for_the_context():
    task = make_task(encoder(BERT, 16), max_question_len=100)
    features, truncated = task.features(row("who " * 50, "notes"))
    assert truncated and max(len(f["tokens"]) for f in features) == 16
    assert any(ends(f) != (0, 0) for f in features)


def test_questions_to_predict_have_weight_0_and_an_empty_context_no_answer():
    task = make_task(rows=[*ROWS, NONE])
    unknown = Row({"question": "who", "context": CONTEXT})
    [feature], _ = task.features(unknown)
    assert feature["example_weights"].tolist() == [0.0]
    empty = row("who", None, "")
    [feature], _ = task.features(empty)
    said = task.decode(empty, [feature], perfect(task, empty))
    assert said["answer"] == "" and said["n_best"] == []
    dropped = row("a", "\u200d", "a \u200d b")  # which BERT's normalisation removes
    assert task.features(dropped)[0][0]["example_weights"].tolist() == [0.0]


@pytest.mark.parametrize(
    "record, said",
    [
        (row(" ", "notes"), "question is empty"),
        (row("who", None, " "), "context is empty"),
        (row("who", "notes", answers=None), "answers are missing"),
        (row("who", answers=[{"text": "notes", "start": 3}]), "'notes' is not at character 3"),
        (row("who", answers=[{"text": ".", "start": -1}]), "'.' is not at character -1"),
        (row("who", answers=[{"text": " ", "start": 3}]), "the answer is empty"),
    ],
)
def test_a_row_that_cannot_be_trained_on_says_why_and_is_predicted(record, said):
    task = make_task()
    assert said in task.problem(record, True) and task.problem(record, False) == ""
    assert task.features(record)[0] and task.problem(ROWS[0], True) == ""


def test_impossible_options_are_refused_all_at_once():
    with pytest.raises(ValueError, match=r"(?s)doc_stride=0.*n_best=-1"):
        make_task(doc_stride=0, n_best=-1)
    with pytest.raises(ValueError, match="seq_len 8 has no room"):
        make_task(encoder(BERT, 8))
