"""Relations of two marked entities: marks, their places in tokens, windows around them, the loss and scores."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.data.records import Record
from jaxlm.tasks import relation_classification, scores
from jaxlm.tasks.relation_classification import (
    RelationClassification,
    keep_entities,
    mark,
    read_entities,
)
from jaxlm.tokenizers import make_tokenizer
from tests.tasks.slots import loss_of, make_batch
from tests.tasks.tokens import byte_bpe, decoder, encoder, wordpiece

BERT = wordpiece()
BYTES = make_tokenizer("bytes", num_sentinels=0)


def row(text, label=None, **fields):
    given = {} if label is None else {"label": label}
    return Record("file", 7, {"text": text, **given, **fields})


ROWS = [
    row("<e1>Ada</e1> wrote on the <e2>engine</e2>.", "Author(e1,e2)"),
    row("the <e2>notes</e2> of <e1>Ada Lovelace</e1>", "Author(e2,e1)"),
    row("in <e1>Paris</e1>, <e2>France</e2>", "Part(e1,e2)"),
    row("a <e1>b</e1>-<e2>c</e2> of", "Other"),
]


def make_task(layout=None, tokenizer=BERT, rows=ROWS, **options):
    fitted = RelationClassification.infer(rows, **options)
    return RelationClassification(tokenizer, layout or encoder(tokenizer), fitted, **options)


def test_markers_stand_around_entities_and_are_read_at_the_first_of_each():
    task = make_task()
    [feature], truncated = task.features(ROWS[1])
    tokens = [BERT.token(i) for i in feature["tokens"]]
    assert tokens == "[CLS] the # notes # of $ ada love ##lace $ [SEP]".split() and not truncated
    assert feature["example_entity_positions"].tolist() == [[6, 2]]
    assert feature["example_entity_positions"].dtype == np.int32
    assert task.labels[feature["example_labels"][0]] == "Author(e2,e1)"


@pytest.mark.parametrize("tokenizer", [BERT, byte_bpe(), BYTES], ids=["bert", "byte_bpe", "bytes"])
def test_every_tokenizer_has_the_markers_at_the_places(tokenizer):
    for record in ROWS:
        [feature], _ = make_task(encoder(tokenizer, 128), tokenizer).features(record)
        [[one, two]] = feature["example_entity_positions"]
        firsts = [tokenizer.decode(feature["tokens"][[place]]).strip() for place in (one, two)]
        assert firsts == (["$", "#"] if tokenizer is not BYTES else firsts)
        if tokenizer is BYTES:
            assert [chr(feature["tokens"][place] - 7) for place in (one, two)] == ["$", "#"]


def test_marks_have_single_spaces_and_spans_their_places():
    text, entities = read_entities({"text": "a <e1>b</e1>, <e2> c</e2>"})
    assert text == "a b,  c" and entities == ((2, 3), (5, 7))
    marked, places = mark(text, entities, ("$", "#"))
    assert marked == "a $ b $ , # c #"
    assert [marked[start:end] for start, end in places] == ["$ b $", "# c #"]
    marked, places = mark("bc", ((1, 2), (0, 1)), ("$", "#"))
    assert marked == "# b # $ c $"
    assert [marked[start:end] for start, end in places] == ["$ c $", "# b #"]


def test_spans_are_as_good_as_marks():
    plain = row("the notes of Ada Lovelace", "Author(e2,e1)", spans=[[13, 25], [4, 9]])
    for one, other in zip(
        make_task().features(plain)[0], make_task().features(ROWS[1])[0], strict=True
    ):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def check_kept(keep, length, entities, room):
    """As many tokens as there is room for, in order, both entities' first; both whole where they fit."""
    kept = keep(length, entities, room)
    assert len(kept) == min(length, room) and (np.diff(kept) > 0).all()
    assert kept[0] >= 0 and kept[-1] < length
    assert {first for first, _ in entities} <= set(kept.tolist())
    begin, end = min(e[0] for e in entities), max(e[1] for e in entities)
    if end - begin <= room:
        assert set(range(begin, end)) <= set(kept.tolist())


def random_entities(rng, length):
    a, a_end, b, b_end = np.sort(rng.choice(length + 1, 4, replace=False)).tolist()
    return [(a, a_end), (b, b_end)][:: rng.choice([1, -1])]


def check_any_kept(keep):
    rng = np.random.default_rng(0)
    for _ in range(300):
        length = int(rng.integers(4, 40))
        check_kept(keep, length, random_entities(rng, length), int(rng.integers(4, 30)))


def test_a_long_text_is_cut_around_its_entities():
    check_any_kept(keep_entities)
    assert keep_entities(20, [(8, 10), (12, 13)], 9).tolist() == list(range(6, 15))
    assert keep_entities(20, [(15, 18), (2, 4)], 8).tolist() == [2, 3, 4, 5, 14, 15, 16, 17]


def test_cuts_that_lose_an_entity_are_found():
    first = lambda length, entities, room: np.arange(min(length, room))
    around_the_first = lambda length, entities, room: np.arange(
        start := min(entities[0][0], max(0, length - room)), min(length, start + room)
    )
    for wrong in (first, around_the_first):
        with pytest.raises(AssertionError):
            check_any_kept(wrong)


def test_a_truncated_row_is_said_and_still_reads_both_markers():
    long = row(
        "of the " * 20 + "<e1>Ada</e1>" + " in the" * 20 + " <e2>engine</e2>" + " a b" * 20, "Other"
    )
    task = make_task(encoder(BERT, 18))
    [feature], truncated = task.features(long)
    at = feature["tokens"][feature["example_entity_positions"][0]]
    assert truncated and len(feature["tokens"]) == 18
    assert [BERT.token(i) for i in at] == ["$", "#"]
    assert {"ada", "engine"} <= {BERT.token(i) for i in feature["tokens"]}


def test_a_decoder_reads_the_last_token():
    [feature], _ = make_task(decoder(BERT)).features(ROWS[0])
    assert feature["example_positions"].tolist() == [len(feature["tokens"]) - 1]


def read_entity_vectors(batch, width):
    """Outputs whose head_logits are a fixed function of the tokens behind both first markers."""
    tables = np.random.default_rng(0).normal(size=(2, 512, width)).astype(np.float32)
    tokens = np.asarray(batch["tokens"])
    places = np.asarray(batch["example_entity_positions"]).astype(int) + 1
    rows = np.arange(len(tokens))[:, None]
    sides = [table[tokens[rows, places[..., side]]] for side, table in enumerate(tables)]
    return SimpleNamespace(head_logits=sum(sides))


def check_packed_loss(task):
    """Packed and padded give the sum over records of -log p of their label, one by one."""
    features = [task.features(record)[0][0] for record in ROWS]
    expected = 0.0
    for feature in features:
        alone, _ = make_batch([feature], packed=False)
        logits = read_entity_vectors(alone, len(task.labels)).head_logits[0, 0]
        expected += np.log(np.exp(logits).sum()) - logits[feature["example_labels"][0]]
    for shape in (dict(packed=False), dict(packed=True, slots=6, extra_rows=1)):
        batch, _ = make_batch(features, **shape)
        (total, weight), _ = loss_of(task, read_entity_vectors(batch, len(task.labels)), batch)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert float(weight) == len(ROWS)


def test_the_loss_is_that_of_one_record_after_the_other_packed_and_padded():
    check_packed_loss(make_task())


def test_places_that_are_not_shifted_are_found(monkeypatch):
    def misnamed(batch, width):
        places = batch["example_entity_positions"] - batch["example_positions"][..., None]
        return whole(batch | {"example_entity_positions": places}, width)

    whole = read_entity_vectors
    monkeypatch.setitem(check_packed_loss.__globals__, "read_entity_vectors", misnamed)
    with pytest.raises(AssertionError):
        check_packed_loss(make_task())


def said_by(task, record, chosen):
    """The prediction of a model that is sure of the class with number `chosen`."""
    probabilities = np.eye(len(task.labels), dtype=np.float32)[[chosen]]
    return task.decode(record, task.features(record)[0], [{"slot_scores": probabilities}])


def test_perfect_logits_decode_to_the_label_and_score_1():
    task = make_task()
    said = [said_by(task, r, task.labels.index(r.fields["label"])) for r in ROWS]
    assert [s["label"] for s in said] == [r.fields["label"] for r in ROWS]
    found = task.scores(ROWS, said)
    assert found["semeval_f1"] == found["f1_macro"] == found["accuracy"] == 1.0
    assert task.best_metric == "semeval_f1" and "Part(e1,e2)" in task.report(ROWS, said)


def test_random_predictions_have_the_official_scores():
    task, rng = make_task(), np.random.default_rng(1)
    said = [said_by(task, r, int(rng.integers(len(task.labels)))) for r in ROWS]
    gold, labels = [r.fields["label"] for r in ROWS], [s["label"] for s in said]
    found = task.scores(ROWS, said)
    assert scores.semeval_scores(gold, labels).items() <= found.items()
    assert found["accuracy"] == np.mean([g == s for g, s in zip(gold, labels, strict=True)])


def test_relations_without_a_direction_are_scored_as_classes():
    rows = [row(r.fields["text"], label) for r, label in zip(ROWS, "abab", strict=True)]
    task = make_task(rows=rows)
    said = [said_by(task, r, 0) for r in rows]
    assert "semeval_f1" not in task.scores(rows, said) and task.best_metric == "f1_macro"


@pytest.mark.parametrize(
    "record, said",
    [
        (row("Ada wrote", "Other"), "found the marks none; expected each of <e1> </e1> <e2> </e2>"),
        (row("<e1>a</e1> <e1>b</e1> <e2>c</e2>", "Other"), "found the marks <e1> </e1> <e1>"),
        (row("<e1>a <e2>b</e2></e1>", "Other"), "overlap"),
        (row("<e1> </e1> <e2>b</e2>", "Other"), "e1 is [0, 1) of 3 characters: it has no text"),
        (row("a b", "Other", spans=[[0, 1], [2, 9]]), "e2 is [2, 9) of 3 characters"),
    ],
)
def test_a_row_without_two_entities_says_why_also_in_evaluation(record, said):
    task = make_task()
    assert said in task.problem(record, True) and said in task.problem(record, False)
    with pytest.raises(ValueError, match=re.escape(said)):
        task.features(record)


def test_rows_without_a_label_or_a_text_cannot_be_trained_on():
    assert make_task().problem(row("<e1>a</e1> <e2>b</e2>"), True) == "the label is missing"
    assert make_task().problem(row(" ", "Other"), True) == "the text is empty"
    assert make_task().problem(ROWS[0], True) == make_task().problem(ROWS[0], False) == ""
    [feature], _ = make_task().features(row("<e1>a</e1> <e2>b</e2>", "New(e1,e2)"))
    assert feature["example_weights"].tolist() == [0.0]


@pytest.mark.parametrize("markers", ["$", "$ $", "€ #", "$ # -", ""])
def test_markers_that_cannot_be_told_apart_are_refused(markers):
    with pytest.raises(ValueError, match="expected two different signs that the tokenizer knows"):
        make_task(markers=markers)
    with pytest.raises(ValueError, match="seq_len 10 has no room"):
        make_task(encoder(BERT, 10))


def test_the_module_reads_what_its_docstring_draws():
    text = "The <e1>child</e1> was put into the <e2>cradle</e2>."
    assert text in relation_classification.__doc__
    plain, entities = read_entities({"text": text})
    assert mark(plain, entities, ("$", "#"))[0] == "The $ child $ was put into the # cradle # ."
