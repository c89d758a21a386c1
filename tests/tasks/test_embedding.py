"""Sentence embeddings: slots, the two losses over any layout of the batch, search scores, and what cannot be used."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.tasks import embedding
from jaxlm.tasks.embedding import Embedding, Pair, normalize, pair_ranks
from tests.tasks.slots import TOKENIZER, Row, loss_of, make_batch, make_task, read

CLS, SEP = TOKENIZER.cls_id, TOKENIZER.sep_id
WIDTH = 6


def row(text, text_pair=None, negative=None, label=None):
    fields = dict(text=text, text_pair=text_pair, negative=negative, label=label)
    return Row({name: value for name, value in fields.items() if value is not None})


# Equal texts of every kind: two anchors (a), two positives (x), a positive that is an anchor elsewhere (c), a hard
# negative that is a positive elsewhere (y), and an anchor that is its own positive's twin (e).
ROWS = [
    row("a", "x"),
    row("b", "x", "y"),
    row("a", "y"),
    row("c", "zz", "ww"),
    row("dd", "c"),
    row("e", "e", "a"),
]


def features_of(task, rows=ROWS):
    return [task.features(r)[0][0] for r in rows]


def unit_vectors(rows):
    """{text: its vector} as `read` makes them, in float64."""
    task = make_task(Embedding)
    vectors = {}
    for text in {t for r in rows for t in r.fields.values() if isinstance(t, str)}:
        batch, _ = make_batch(features_of(task, [row(text)]), packed=False)
        v = np.asarray(read(batch, WIDTH).head_logits[0, 0], np.float64)
        vectors[text] = v / np.linalg.norm(v)
    return vectors


def expected_ranking_loss(rows, temperature, symmetric=False):
    """The sum over `rows` of multiple negatives ranking, text by text, as the module's docstring says it."""
    v = unit_vectors(rows)
    pairs = [(r.fields["text"], r.fields["text_pair"]) for r in rows]
    negatives = [r.fields["negative"] for r in rows if "negative" in r.fields]

    def nll(asker, right, others):
        logits = np.array([v[asker] @ v[t] for t in [right, *others]]) / temperature
        return np.log(np.exp(logits - logits[0]).sum())

    total = 0.0
    for a, p in pairs:
        others = [q for b, q in pairs if q not in (a, p) and b != a]
        others += [n for n in negatives if n not in (a, p)]
        forward = nll(a, p, others)
        back = nll(p, a, [b for b, q in pairs if b not in (a, p) and q != p])
        total += (forward + back) / 2 if symmetric else forward
    return total


SHAPES = {
    "padded": dict(packed=False),
    "packed, with empty slots and rows": dict(packed=True, slots=9, length=24, extra_rows=3),
}


def check_contrastive_loss(shape, **options):
    """The loss of a batch is that of its texts, however they lie in rows."""
    task = make_task(Embedding, temperature=0.3, **options)
    batch, _ = make_batch(features_of(task), **shape)
    if shape["packed"]:
        ids = np.asarray(batch["example_ids"])
        assert 1 < (ids >= 0).any(axis=1).sum() < len(ids), "several rows, and an empty one"
    (total, weight), metrics = loss_of(task, read(batch, WIDTH), batch)
    expected = expected_ranking_loss(ROWS, 0.3, options.get("symmetric", False))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert float(weight) == float(metrics["accuracy"][1]) == len(ROWS)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_contrastive_loss_is_that_of_the_texts_however_they_are_laid_out(shape):
    check_contrastive_loss(SHAPES[shape])


def test_the_symmetric_loss_is_the_mean_of_both_directions():
    check_contrastive_loss(SHAPES["packed, with empty slots and rows"], symmetric=True)


right_candidates = embedding.is_candidate


def with_empty_slots(texts, wanted, step):
    return right_candidates(texts, jnp.ones_like(wanted), step)


def with_equal_texts(texts, wanted, step):
    return jnp.broadcast_to(wanted[None], (len(wanted), len(wanted)))


def within_rows(texts, wanted, step):
    rows = jnp.arange(len(wanted)) // 9
    return right_candidates(texts, wanted, step) & (rows[:, None] == rows[None])


def without_targets(texts, wanted, step):
    return right_candidates(texts, wanted, step) & ~jnp.eye(len(wanted), k=step, dtype=bool)


@pytest.mark.parametrize(
    "wrong", [with_empty_slots, with_equal_texts, within_rows, without_targets]
)
def test_wrong_negatives_are_found(wrong, monkeypatch):
    monkeypatch.setattr(embedding, "is_candidate", wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_contrastive_loss(SHAPES["packed, with empty slots and rows"])


def check_devices_see_all_negatives(loss):
    """Rows on eight devices give the loss of rows on one."""
    task = make_task(Embedding)
    batch, _ = make_batch(features_of(task), packed=False, extra_rows=2)
    outputs = read(batch, WIDTH)
    (alone, _), _ = loss_of(task, outputs, batch)
    rows = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data"))
    outputs.head_logits = jax.device_put(outputs.head_logits, rows)
    (together, weight), _ = loss(task, outputs, jax.device_put(batch, rows))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert float(weight) == len(ROWS)


def test_negatives_are_those_of_all_devices():
    check_devices_see_all_negatives(loss_of)


def test_negatives_of_one_device_only_are_found():
    def local(task, outputs, batch):
        def first_rows(logits, batch):
            mine = jax.tree.map(lambda x: x[:3], batch)
            theirs = jax.tree.map(lambda x: x[3:], batch)
            parts = [(logits[:3], mine), (logits[3:], theirs)]
            losses = [task.loss(type(outputs)(head_logits=x), b) for x, b in parts]
            return jax.tree.map(jnp.add, *losses)

        return jax.jit(first_rows)(outputs.head_logits, batch)

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_devices_see_all_negatives(local)


def test_only_a_loss_without_negatives_lets_a_batch_be_split():
    assert not make_task(Embedding).splits_batch
    assert make_task(Embedding, loss="cosine").splits_batch


SCORED = [row("a", "x", label=5.0), row("b", "bb", label="2.5"), row("c", "c", label=-1)]


def check_cosine_loss(shape):
    """(cos - score / max_score)^2 summed, and finite gradients, 0 at slots without a text."""
    task = make_task(Embedding, loss="cosine", max_score=5.0)
    batch, _ = make_batch(features_of(task, SCORED), **shape)
    outputs = read(batch, WIDTH)
    v = unit_vectors(SCORED)
    cosines = [v[r.fields["text"]] @ v[r.fields["text_pair"]] for r in SCORED]
    expected = np.square(np.array(cosines) - [1.0, 0.5, -0.2]).sum()

    def total(logits):
        (total, weight), _ = task.loss(type(outputs)(head_logits=logits), batch)
        return total, weight

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (found, weight), gradient = run(outputs.head_logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert float(weight) == len(SCORED)
    empty = np.asarray(batch["example_ids"]) < 0
    assert empty.any() and np.isfinite(gradient).all() and (np.asarray(gradient)[empty] == 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_the_cosine_loss_is_that_of_the_pairs(packed):
    check_cosine_loss(dict(packed=packed, extra_rows=1, slots=8 if packed else 2))


def test_a_plain_norm_whose_gradient_at_zero_is_nan_is_found(monkeypatch):
    plain = lambda v: v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    monkeypatch.setattr(embedding, "normalize", plain)
    with pytest.raises(AssertionError):
        check_cosine_loss(dict(packed=False, extra_rows=1))


def test_normalized_vectors_have_length_one_and_zeros_stay():
    v = np.asarray(normalize(jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-6, 0.0]], jnp.bfloat16)))
    np.testing.assert_allclose(v, [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    assert v.dtype == np.float32


def test_each_text_is_a_segment_and_knows_its_side_and_its_partner():
    [feature], truncated = make_task(Embedding).features(row("ab", "c", "d", label=3))
    a, b, c, d = TOKENIZER.encode("abcd")
    np.testing.assert_array_equal(feature["tokens"], [CLS, a, b, SEP, CLS, c, SEP, CLS, d, SEP])
    np.testing.assert_array_equal(feature["segments"], [1] * 4 + [2] * 3 + [3] * 3)
    np.testing.assert_array_equal(feature["example_positions"], [0, 4, 7])
    np.testing.assert_array_equal(feature["example_sides"], [0, 1, 2])
    (anchor, positive, negative), partners = feature["example_texts"].T
    assert len({anchor, positive, negative}) == 3 and not truncated
    np.testing.assert_array_equal(partners, [positive, anchor, negative])


def test_a_lone_text_has_a_vector_and_no_loss():
    for loss in embedding.LOSSES:
        [feature], _ = make_task(Embedding, loss=loss).features(row("ab", negative="ignored"))
        assert feature["example_sides"].tolist() == [0] and feature["example_weights"] == [0]


@pytest.mark.parametrize(
    "texts, lengths",
    [
        (("a" * 90,), [62]),
        (("a" * 90, "b" * 9), [51, 9]),
        (("a" * 90, "b" * 90, "c" * 90), [20, 19, 19]),
    ],
)
def test_long_texts_share_the_row_fairly(texts, lengths):
    [feature], truncated = make_task(Embedding).features(row(*texts))
    assert truncated and len(feature["tokens"]) <= 64
    counts = np.bincount(feature["segments"])[1:] - 2
    np.testing.assert_array_equal(np.sort(counts), np.sort(lengths))


@pytest.mark.parametrize(
    "fields, options, training, expected",
    [
        (dict(text="a"), {}, True, "no text_pair"),
        (dict(text=" ", text_pair=""), {}, True, "text and text_pair empty"),
        (dict(text="a", text_pair="b", label=0), {}, True, "takes every pair for a match"),
        (dict(text="a", text_pair="b", label="1"), {}, True, ""),
        (dict(text="a", text_pair="b"), dict(loss="cosine"), True, "missing"),
        (dict(text="a", text_pair="b", label="x"), dict(loss="cosine"), True, "no number"),
        (dict(text="a", text_pair="b", label=float("nan")), dict(loss="cosine"), True, "no number"),
        (dict(text="a", text_pair="b", label=3), dict(loss="cosine"), True, "max_score=1.0"),
        (dict(text="a", text_pair="b", label=3), dict(loss="cosine", max_score=5.0), True, ""),
        (dict(text="", text_pair=None), {}, False, ""),
    ],
)
def test_rows_that_cannot_be_used_are_named(fields, options, training, expected):
    problem = make_task(Embedding, **options).problem(Row(fields), training)
    assert (expected in problem) if expected else problem == ""


def test_texts_without_room_are_named_before_they_are_laid_out():
    with pytest.raises(ValueError, match="3 texts have no room in seq_len 6"):
        make_task(Embedding, 6).features(ROWS[1])


def test_wrong_options_are_listed_together():
    with pytest.raises(ValueError) as error:
        Embedding.infer([], loss="triplet", pooling="max", temperature=0.0, max_score=-1.0)
    for part in ("task.loss='triplet'", "task.pooling='max'", "temperature=0.0", "max_score=-1.0"):
        assert part in str(error.value)


def predict(task, rows):
    features = features_of(task, rows)
    batch, places = make_batch(features, packed=True, slots=30, length=256)
    vectors = np.asarray(task.predict(read(batch, WIDTH), batch)["slot_vectors"])
    predictions = []
    for number, feature in enumerate(features):
        place = places[number]
        of_row = vectors[place.row, place.slot : place.slot + len(feature["example_sides"])]
        predictions.append(task.decode(rows[number], [feature], [{"slot_vectors": of_row}]))
    return predictions


def test_a_prediction_is_a_cosine_and_keeps_its_vectors_out_of_the_file():
    said = predict(make_task(Embedding), [row("a", "x"), row("e", "e", "a"), row("a")])
    v = unit_vectors(ROWS)
    assert json.loads(json.dumps(said[0])) == pytest.approx({"cosine": v["a"] @ v["x"]}, abs=1e-6)
    assert said[1]["cosine"] == pytest.approx(1.0) and said[2] == {}
    assert said[1].vectors.shape == (3, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(said[1].vectors, axis=1), 1, rtol=1e-6)
    assert (pickle.loads(pickle.dumps(said[1])).vectors == said[1].vectors).all()


def expected_ranks(rows, predictions):
    """For each text the place of its text_pair in the sorted list of all different ones."""
    corpus = {r.fields["text_pair"]: p.vectors[1] for r, p in zip(rows, predictions, strict=True)}
    ranks = []
    for r, p in zip(rows, predictions, strict=True):
        near = sorted(corpus, key=lambda text: -(p.vectors[0] @ corpus[text]))
        ranks.append(1 + near.index(r.fields["text_pair"]))
    return ranks


def check_search_scores(ranks_of):
    """Against sorting one query at a time; two texts have the same pair, and queries come in several chunks."""
    rows = [row(f"query {i}", f"answer {min(i, 10)}") for i in range(12)]
    predictions = predict(make_task(Embedding), rows)
    ranks = expected_ranks(rows, predictions)
    assert len(set(ranks)) > 4
    np.testing.assert_array_equal(ranks_of(rows, predictions), ranks)


def test_search_scores_are_those_of_sorting(monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", 5)
    check_search_scores(pair_ranks)


def test_ranks_that_count_equal_texts_twice_are_found():
    def with_twins(rows, predictions):
        corpus = np.stack([p.vectors[1] for p in predictions])
        queries = np.stack([p.vectors[0] for p in predictions])
        return embedding.scores.retrieval_ranks(queries @ corpus.T, range(len(rows)))

    with pytest.raises(AssertionError):
        check_search_scores(with_twins)


def test_scores_and_report_of_each_loss():
    task = make_task(Embedding)
    vectors = np.eye(4, dtype=np.float32)
    rows = [row("a", "x"), row("b", "y")]
    found = task.scores(rows, [Pair(vectors[[0, 0]]), Pair(vectors[[0, 1]])])
    assert found == {"recall_at_1": 0.5, "recall_at_5": 1.0, "recall_at_10": 1.0, "mrr": 0.75}
    lines = task.report(rows, [Pair(vectors[[0, 0]]), Pair(vectors[[0, 1]])]).splitlines()
    assert lines == ["rank among 2, the last:", "     2  b | y", "     1  a | x"]

    task = make_task(Embedding, loss="cosine", max_score=5.0)
    said = [Pair(np.array([[1, 0], [c, 0]], np.float32)) for c in (0.9, 0.5, 0.0)]
    found = task.scores(SCORED, said)
    assert found["spearman"] == pytest.approx(1.0) and found["mse"] == pytest.approx(0.05 / 3)
    assert task.report(SCORED, said).splitlines()[1:3] == [" +0.20  c | c", " -0.10  a | x"]
    assert task.best_metric in found and make_task(Embedding).best_metric == "mrr"


def test_scores_name_what_is_missing():
    with pytest.raises(ValueError, match="1 of 2 records have no text_pair: rows.csv:7"):
        make_task(Embedding).scores([row("a", "x"), row("b")], [])
    with pytest.raises(ValueError, match="1 of 1 records have no text_pair with a score"):
        make_task(Embedding, loss="cosine").scores([row("a", "x")], [])
