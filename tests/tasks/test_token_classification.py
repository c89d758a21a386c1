"""A label for each word: alignment with tokens, windows, predicates, the loss, paths of labels and scores."""

import itertools

import numpy as np
import pytest
import tokenizers as hf
from seqeval.metrics import f1_score

from jaxlm.tasks import token_classification
from jaxlm.tasks.token_classification import (
    TokenClassification,
    best_path,
    cut_windows,
    is_legal,
    word_prefix,
)
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


def row(words, labels=None, **fields):
    given = {} if labels is None else {"labels": labels.split()}
    return Row({"words": words.split(), **given, **fields})


ROWS = [
    row("Ada Lovelace wrote notes on the Engine", "B-PER I-PER O O O O B-THING"),
    row("Paris , France", "B-LOC O B-LOC"),
    row("wrote", "O"),
    row("of the Lovelace engine in Paris", "O O B-THING I-THING O B-LOC"),
]


def test_a_word_without_a_label_says_nothing_about_the_other_rows():
    spoilt = Row({"words": ["Ada", "wrote"], "labels": ["B-PER", ""]})
    assert TokenClassification.infer([*ROWS, spoilt]) == TokenClassification.infer(ROWS)
    assert "word 2 has no label" in make_task().problem(spoilt, True)


def make_task(layout=None, rows=ROWS, tokenizer=BERT, **options):
    fitted = TokenClassification.infer(rows, **options)
    return TokenClassification(tokenizer, layout or encoder(tokenizer), fitted, **options)


def test_a_words_label_stands_at_its_first_token_and_the_others_have_weight_0():
    task = make_task()
    [feature], truncated = task.features(row("ada lovelace wrote", "B-PER I-PER O"))
    tokens = [BERT.token(i) for i in feature["tokens"]]
    assert tokens == ["[CLS]", "ada", "love", "##lace", "wrote", "[SEP]"]
    assert feature["weights"].tolist() == [0, 1, 1, 0, 1, 0]
    said = [task.labels[i] for i in feature["labels"][feature["weights"] > 0]]
    assert said == ["B-PER", "I-PER", "O"] and not truncated
    assert (feature["labels"].dtype, feature["weights"].dtype) == (np.int32, np.float32)


def test_a_decoder_labels_a_word_at_its_last_token():
    task = make_task(decoder(BERT))
    [feature], _ = task.features(row("ada lovelace wrote", "B-PER I-PER O"))
    assert feature["weights"].tolist() == [0, 1, 0, 1, 1, 0]


def test_a_label_does_not_stand_at_the_space_before_its_word():
    [feature], _ = make_task(tokenizer=BYTES).features(row("ab c d", "O B-PER O"))
    at = feature["tokens"][feature["weights"] > 0]
    assert BYTES.decode(at) == "acd" and BYTES.decode(feature["tokens"]) == "ab c d"


def check_words_are_encoded_as_the_backend_does(words, tokenizer, reference):
    """The tokens are those of the tokenizers library for a text that is split into words."""
    [feature], _ = make_task(tokenizer=tokenizer).features(Row({"words": words}))
    expected = reference.encode(words, is_pretokenized=True, add_special_tokens=False).ids
    np.testing.assert_array_equal(feature["tokens"][1:-1], expected)


def with_prefix_space(tokenizer):
    """The same merges in a tokenizer that writes a space before every word, as split text needs it."""
    space = hf.pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    model = hf.Tokenizer.from_str(tokenizer.blob.decode())
    model.pre_tokenizer = space
    return model


WORDS = "Ada Lovelace don't wrote x.y notes , ( the ) 3.14".split()


def test_words_are_encoded_as_the_tokenizers_library_encodes_split_text():
    check_words_are_encoded_as_the_backend_does(WORDS, BERT, BERT._model)
    task = make_task(tokenizer=byte_bpe())
    [feature], _ = task.features(Row({"words": ["x", *WORDS]}))
    expected = with_prefix_space(byte_bpe()).encode(
        WORDS, is_pretokenized=True, add_special_tokens=False
    )
    np.testing.assert_array_equal(feature["tokens"][2:-1], expected.ids)


@pytest.mark.parametrize("tokenizer", [BERT, byte_bpe(), BYTES], ids=["bert", "byte_bpe", "bytes"])
def test_words_are_encoded_as_in_running_text(tokenizer):
    words = "Ada Lovelace wrote notes on the Engine".split()
    [feature], _ = make_task(tokenizer=tokenizer).features(Row({"words": words}))
    np.testing.assert_array_equal(feature["tokens"][1:-1], tokenizer.encode(" ".join(words)))
    assert word_prefix(tokenizer) == ("" if tokenizer is BERT else " ")


def test_a_word_without_tokens_is_unk():
    [feature], _ = make_task().features(Row({"words": ["ada", "\u200d", ""], "labels": ["O"] * 3}))
    assert feature["tokens"][2:4].tolist() == [BERT.unk_id] * 2 and feature["weights"].sum() == 3


def check_windows(cut, lengths, room, context):
    """Each word is read once, in order; no window is too long; there is context where there was a word before."""
    windows = cut(lengths, room, context)
    assert [i for _, first, end in windows for i in range(first, end)] == list(range(len(lengths)))
    for start, first, end in windows:
        assert 0 <= start <= first <= end
        assert sum(lengths[start:end]) <= room and sum(lengths[start:first]) <= context
    for start, first, _ in windows[1:]:
        assert start == 0 or sum(lengths[start - 1 : first]) > min(context, room - lengths[first])


def test_windows_read_every_word_once_and_repeat_a_few_as_context():
    assert cut_windows([1] * 10, 6, 2) == [(0, 0, 6), (4, 6, 10)]
    assert cut_windows([], 6, 2) == [(0, 0, 0)]
    rng = np.random.default_rng(0)
    for room, size in itertools.product((4, 7, 16), (1, 5, 40)):
        check_windows(cut_windows, rng.integers(1, room + 1, size).tolist(), room, room // 4)


def test_windows_that_lose_a_word_are_found():
    lossy = lambda *args: [(start, first, end - 1) for start, first, end in cut_windows(*args)]
    with pytest.raises(AssertionError):
        check_windows(lossy, [1] * 10, 6, 2)


def check_every_word_is_labelled_once(task, record):
    """The words' labels, in order, are those at the weighted tokens of the features, in order."""
    features, truncated = task.features(record)
    assert all(len(f["tokens"]) <= task.layout.seq_len for f in features) and not truncated
    said = [task.labels[i] for f in features for i in f["labels"][f["weights"] > 0]]
    assert said == record.fields["labels"]


LONG = Row(
    {
        "words": [w for r in ROWS for w in r.fields["words"]],
        "labels": [w for r in ROWS for w in r.fields["labels"]],
    }
)


@pytest.mark.parametrize("make_layout", [encoder, decoder])
def test_a_long_sentence_is_cut_into_windows_that_label_every_word_once(make_layout):
    task = make_task(make_layout(BERT, 10))
    assert len(task.features(LONG)[0]) > 1
    check_every_word_is_labelled_once(task, LONG)


def test_words_that_are_left_out_or_said_twice_are_found(monkeypatch):
    whole = cut_windows
    for wrong in (lambda *a: whole(*a)[:-1], lambda *a: [(s, s, e) for s, _, e in whole(*a)]):
        monkeypatch.setattr(token_classification, "cut_windows", wrong)
        with pytest.raises(AssertionError):
            check_every_word_is_labelled_once(make_task(encoder(BERT, 10)), LONG)


def test_a_word_longer_than_a_row_is_cut_and_said():
    task = make_task(encoder(BYTES, 16), tokenizer=BYTES)
    features, truncated = task.features(row("a " + "b" * 30 + " c", "O B-LOC O"))
    assert truncated and [f["weights"].sum() for f in features] == [1, 1, 1]
    assert max(len(f["tokens"]) for f in features) == 16
    with pytest.raises(ValueError, match="seq_len 5 has no room for words"):
        make_task(encoder(BYTES, 5), tokenizer=BYTES)


def test_a_predicate_has_the_token_type_1_or_stands_between_separators():
    record = row("ada lovelace wrote", "O O O", predicate=1)
    [typed], _ = make_task().features(record)
    assert typed["token_types"].tolist() == [0, 0, 1, 1, 0, 0]
    for layout, weighted in (
        (encoder(BERT, num_token_types=0), [1, 3, 6]),
        (decoder(BERT), [1, 4, 6]),
    ):
        [marked], _ = make_task(layout).features(record)
        inner = [BERT.token(i) for i in marked["tokens"][1:-1]]
        assert inner == ["ada", "[SEP]", "love", "##lace", "[SEP]", "wrote"]
        assert np.flatnonzero(marked["weights"]).tolist() == weighted
        assert not marked["token_types"].any()


def test_a_predicate_is_marked_in_each_window_that_has_it():
    task = make_task(encoder(BERT, 10))
    features, _ = task.features(Row(LONG.fields | {"predicate": 1}))
    assert [f["token_types"].sum() for f in features] == [2] + [0] * (len(features) - 1)


def features_of(task, rows=ROWS):
    return [feature for r in rows for feature in task.features(r)[0]]


def check_packed_loss(task):
    """Packed and padded give the sum over all words of -log p, one by one."""
    features = features_of(task)
    expected = 0.0
    for feature in features:
        batch, _ = make_batch([feature], packed=False)
        logits = read_tokens(batch, len(task.labels)).head_logits[0, : len(feature["tokens"])]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = log_probs[np.arange(len(logits)), feature["labels"]]
        expected -= (picked * feature["weights"]).sum()
    for packed in (False, True):
        batch, _ = make_batch(features, packed=packed)
        (total, weight), metrics = loss_of(task, read_tokens(batch, len(task.labels)), batch)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert float(weight) == metrics["accuracy"][1] == 17


def test_the_loss_is_that_of_one_word_after_the_other_packed_and_padded():
    check_packed_loss(make_task())


def test_a_loss_over_all_tokens_is_found():
    class Everywhere(TokenClassification):
        def loss(self, outputs, batch):
            return super().loss(outputs, batch | {"weights": batch["weights"] * 0 + 1})

    with pytest.raises(AssertionError):
        check_packed_loss(Everywhere(BERT, encoder(BERT), TokenClassification.infer(ROWS)))


def perfect(task, record):
    """What predict would give for each feature of a model that knows the labels."""
    outputs = []
    for feature in task.features(record)[0]:
        log_probs = np.full((len(feature["tokens"]), len(task.labels)), -20.0, np.float32)
        log_probs[np.arange(len(log_probs)), feature["labels"]] = 0.0
        outputs.append({"token_log_probs": log_probs})
    return outputs


def check_round_trip(task, records):
    for record in records:
        features, _ = task.features(record)
        said = task.decode(record, features, perfect(task, record))
        assert said["labels"] == record.fields["labels"]
        assert said["probabilities"] == [1.0] * len(said["labels"])


BIOES = [
    row("Ada Lovelace wrote notes", "B-PER E-PER O S-THING"),
    row("of the Lovelace engine in Paris", "O B-THING I-THING E-THING O S-PER"),
]
POS = [row("Ada wrote notes", "NOUN VERB NOUN"), row("the engine in Paris", "DET NOUN ADP NOUN")]


@pytest.mark.parametrize("rows", [[*ROWS, LONG], BIOES, POS], ids=["BIO", "BIOES", "plain"])
def test_perfect_logits_decode_to_the_labels(rows):
    for layout in (encoder(BERT), encoder(BERT, 10), decoder(BERT, 10)):
        check_round_trip(make_task(layout, rows), rows)


def test_labels_read_at_the_next_token_are_found(monkeypatch):
    def shifted(self, record):
        windows, truncated = whole(self, record)
        return [w._replace(positions=w.positions - 1) for w in windows], truncated

    whole, perfect_outputs = TokenClassification._windows, perfect(make_task(), ROWS[0])
    monkeypatch.setattr(TokenClassification, "_windows", shifted)
    said = make_task().decode(ROWS[0], [{}], perfect_outputs)
    assert said["labels"] != ROWS[0].fields["labels"]


def test_predictions_of_packed_rows_are_those_of_padded_ones():
    task = make_task()
    features = features_of(task)
    said = []
    for packed in (True, False):
        batch, places = make_batch(features, packed=packed)
        outputs = taken_apart(
            predict(task, read_tokens(batch, len(task.labels)), batch), places, features
        )
        pairs = zip(ROWS, features, outputs, strict=True)
        said.append([task.decode(r, [f], [o])["labels"] for r, f, o in pairs])
    assert said[0] == said[1]


def all_paths_best(scores, labels, scheme):
    legal = lambda path: all(
        is_legal(a, b, scheme)
        for a, b in itertools.pairwise(["O", *(labels[i] for i in path), "O"])
    )
    paths = itertools.product(range(len(labels)), repeat=len(scores))
    return max(
        filter(legal, paths), key=lambda p: sum(s[i] for s, i in zip(scores, p, strict=True))
    )


@pytest.mark.parametrize("rows", [ROWS, BIOES], ids=["BIO", "BIOES"])
def test_the_path_is_the_best_of_all_that_make_whole_spans(rows):
    task = make_task(rows=rows)
    steps = np.where(task.legal, 0.0, token_classification.NEVER)
    rng, differs = np.random.default_rng(0), 0
    for size in (1, 2, 3, 4) * 5:
        scores = rng.normal(size=(size, len(task.labels)))
        path = best_path(scores, steps)
        assert path == list(all_paths_best(scores, task.labels, task.scheme))
        differs += path != scores.argmax(1).tolist()
    assert differs and best_path(np.empty((0, 3)), np.zeros((4, 4))) == []


def test_spans_are_whole_and_named_with_their_words():
    task = make_task()
    said = task.decode(ROWS[0], task.features(ROWS[0])[0], perfect(task, ROWS[0]))
    assert said["entities"] == [
        {"start": 0, "end": 2, "type": "PER", "text": "Ada Lovelace"},
        {"start": 6, "end": 7, "type": "THING", "text": "Engine"},
    ]
    assert "entities" not in make_task(rows=POS).decode(
        POS[0], make_task(rows=POS).features(POS[0])[0], perfect(make_task(rows=POS), POS[0])
    )


def test_scores_are_seqevals_on_random_labels():
    task = make_task()
    rng = np.random.default_rng(0)
    said = []
    for record in ROWS:
        features, _ = task.features(record)
        size = (len(features[0]["tokens"]), len(task.labels))
        outputs = [{"token_log_probs": rng.normal(size=size)}]
        said.append(task.decode(record, features, outputs))
    gold, predicted = [r.fields["labels"] for r in ROWS], [s["labels"] for s in said]
    found = task.scores(ROWS, said)
    assert found["entity_f1"] == f1_score(gold, predicted) and task.best_metric == "entity_f1"
    right = np.mean([g == p for g, p in zip(sum(gold, []), sum(predicted, []), strict=True)])
    assert found["token_accuracy"] == pytest.approx(right)
    assert "THING" in task.report(ROWS, said)
    assert task.confusion(ROWS, said).sum() == 17


def test_plain_tags_are_scored_by_word():
    task = make_task(rows=POS)
    said = [{"labels": ["NOUN", "NOUN", "NOUN"]}, {"labels": ["DET", "NOUN", "ADP", "VERB"]}]
    assert task.scores(POS, said) == {"token_accuracy": 5 / 7}
    assert task.best_metric == "token_accuracy" and "VERB" in task.report(POS, said)
    assert np.trace(task.confusion(POS, said)) == 5


def test_iob1_is_learned_as_bio_and_a_stray_i_begins_an_entity():
    rows = [row("a b c", "I-PER I-PER O"), row("a b c", "I-PER B-PER I-LOC")]
    fitted = TokenClassification.infer(rows)
    assert fitted == {"labels": ["B-LOC", "B-PER", "I-PER", "O"], "scheme": "BIO"}
    task = TokenClassification(BERT, encoder(BERT), fitted)
    [feature], _ = task.features(rows[1])
    said = [task.labels[i] for i in feature["labels"][feature["weights"] > 0]]
    assert said == ["B-PER", "B-PER", "B-LOC"]
    perfect_said = task.decode(rows[1], [feature], perfect(task, rows[1]))
    assert task.scores(rows[1:], [perfect_said])["entity_f1"] == 1.0


def test_a_label_that_training_does_not_know_counts_as_wrong_and_not_in_the_loss():
    task = make_task()
    record = row("ada in paris", "B-NEW O B-LOC")
    [feature], _ = task.features(record)
    assert feature["weights"].sum() == 2
    said = task.decode(record, [feature], perfect(task, record))
    assert task.scores([record], [said])["token_accuracy"] <= 2 / 3
    assert task.confusion([record], [said]).sum() == 2


def test_rows_without_labels_are_predicted():
    task = make_task()
    for record in (row("ada in paris"), Row({"words": []})):
        [feature], _ = task.features(record)
        assert not feature["weights"].any() and task.problem(record, False) == ""
        said = task.decode(record, [feature], perfect(task, record))
        assert len(said["labels"]) == len(record.fields["words"])


@pytest.mark.parametrize(
    "record, said",
    [
        (row("a b", "O"), "2 words and 1 labels"),
        (row("a b", "O O", predicate=2), "word 2 of 2"),
        (row("", ""), "no words"),
        (row("a"), "labels are missing"),
        (Row({"words": ["a", "b"], "labels": ["O", ""]}), "word 2 has no label"),
        (row("a", "B-NEW"), "unknown label 'B-NEW'"),
    ],
)
def test_a_row_that_cannot_be_trained_on_says_why(record, said):
    assert said in make_task().problem(record, True)
    assert make_task().problem(ROWS[0], True) == ""


def test_labels_of_one_kind_only_or_of_two_worlds_are_refused():
    with pytest.raises(ValueError, match=r"found the labels \['O'\]: expected two"):
        TokenClassification.infer([row("a b", "O O")])
    with pytest.raises(ValueError, match="'B-PER'.*'NOUN'"):
        TokenClassification.infer([row("a b", "B-PER NOUN")])
