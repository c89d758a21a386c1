"""Sentence pairs: NextSentence's picture, labels that tell the truth, losses that regroup."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives import NextSentence, SentenceOrder

T = 48


def make_rows(objective, make_example, count=300):
    for i in range(count):
        rng = np.random.default_rng(i)
        example = make_example(rng, (T - 3,))
        example["other"] = make_example(rng, (T - 3,))
        yield example, objective.corrupt(rng, example, T)


def halves(row, tokenizer):
    """A and B of a row, before masking."""
    tokens, slots = row["tokens"].copy(), row["weights"] > 0
    tokens[row["masked_positions"][slots]] = row["labels"][slots]
    n = int((row["segment_ids"] > 0).sum())
    first_sep = int(np.flatnonzero(tokens == tokenizer.sep_id)[0])
    assert tokens[0] == tokenizer.cls_id and tokens[n - 1] == tokenizer.sep_id
    expected = np.zeros(T, np.int32)
    expected[first_sep + 1 : n] = 1
    assert (row["token_types"] == expected).all()
    assert (row["positions"][:n] == np.arange(n)).all()
    return tokens[1:first_sep].tolist(), tokens[first_sep + 1 : n - 1].tolist()


def contains(text, part):
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def check_next_sentence(objective, make_example, tokenizer):
    """Label 0: A then B is the text. Label 1: B is in the other document, from a sentence start."""
    labels = []
    for example, row in make_rows(objective, make_example):
        first, second = halves(row, tokenizer)
        text, other = example["tokens"].tolist(), example["other"]["tokens"].tolist()
        labels.append(int(row["example_labels"][0]))
        assert row["example_weights"].tolist() == [1.0]
        assert row["example_positions"].tolist() == [0]
        assert text[1 : 1 + len(first)] == first
        assert example["sentence_starts"][1 + len(first)]
        if labels[-1] == 0:
            assert text[1:-1] == first + second
        else:
            assert contains(other, second) and second
            assert any(
                other[start : start + len(second)] == second
                for start in np.flatnonzero(example["other"]["sentence_starts"])
            )
    assert 0.4 < np.mean(labels) < 0.6


def check_sentence_order(objective, make_example, tokenizer):
    """Label 0: A then B is the text. Label 1: B then A is."""
    labels = []
    for example, row in make_rows(objective, make_example):
        first, second = halves(row, tokenizer)
        labels.append(int(row["example_labels"][0]))
        text = second + first if labels[-1] else first + second
        assert example["tokens"][1:-1].tolist() == text
    assert 0.4 < np.mean(labels) < 0.6


def test_next_sentence_labels_tell_the_truth(tokenizer, make_example):
    check_next_sentence(NextSentence(tokenizer=tokenizer), make_example, tokenizer)
    with pytest.raises(AssertionError):
        check_next_sentence(SentenceOrder(tokenizer=tokenizer), make_example, tokenizer)


def test_sentence_order_labels_tell_the_truth(tokenizer, make_example):
    check_sentence_order(SentenceOrder(tokenizer=tokenizer), make_example, tokenizer)
    with pytest.raises(AssertionError):
        check_sentence_order(NextSentence(tokenizer=tokenizer), make_example, tokenizer)


def test_the_pictures(tokenizer):
    it, is_, late, go, home, other = range(7, 13)
    bos, eos, cls, sep = tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id, tokenizer.sep_id

    def document(*words, starts):
        tokens = np.array([bos, *words, eos], np.int32)
        return {"tokens": tokens, "sentence_starts": np.isin(np.arange(len(tokens)), starts)}

    example = document(it, is_, late, go, home, starts=[1, 4])
    example["other"] = document(other, starts=[1])
    rows = {}
    for make in (NextSentence, SentenceOrder):
        objective = make(tokenizer=tokenizer, rate=0.01)  # so little that nothing is masked
        for seed in range(20):
            row = objective.corrupt(np.random.default_rng(seed), example, 8)
            key = make, int(row["example_labels"][0])
            rows[key] = row["tokens"].tolist(), row["token_types"].tolist()
    in_order = [cls, it, is_, late, sep, go, home, sep], [0, 0, 0, 0, 0, 1, 1, 1]
    assert rows == {
        (NextSentence, 0): in_order,
        (NextSentence, 1): (
            [cls, it, is_, late, sep, other, sep, 0],
            [0, 0, 0, 0, 0, 1, 1, 0],
        ),
        (SentenceOrder, 0): in_order,
        (SentenceOrder, 1): ([cls, go, home, sep, it, is_, late, sep], [0, 0, 0, 0, 1, 1, 1, 1]),
    }


def test_windows_are_of_one_document_and_pairs_only_where_needed(tokenizer):
    assert NextSentence(tokenizer=tokenizer).window(T) == (T - 3, T - 3, True, True, True)
    assert SentenceOrder(tokenizer=tokenizer).window(T) == (T - 3, T - 3, True, False, True)


@pytest.mark.parametrize("make", [NextSentence, SentenceOrder])
def test_a_text_of_one_sentence_is_all_a_and_its_pair_weighs_nothing(tokenizer, make_example, make):
    rng = np.random.default_rng(0)
    example = make_example(rng, (20,), sentence_every=100)
    example["other"] = make_example(rng, (20,))
    for seed in range(10):
        row = make(tokenizer=tokenizer).corrupt(np.random.default_rng(seed), example, T)
        assert row["example_weights"].tolist() == [0.0] and row["weights"].sum() == 3
        assert not row["token_types"].any() and (row["segment_ids"] > 0).sum() == 20


@pytest.mark.parametrize("length", [0, 1, 2])
def test_texts_without_a_word_make_rows_without_weight(tokenizer, make_example, length):
    rng = np.random.default_rng(0)
    example = {key: value[:length] for key, value in make_example(rng, (2,)).items()}
    row = NextSentence(tokenizer=tokenizer).corrupt(rng, {**example, "other": example}, T)
    assert not row["weights"].any() and not row["example_weights"].any()


def make_batch(objective, make_example, count):
    made = [row for _, row in make_rows(objective, make_example, count)]
    made[0]["example_weights"][:] = 0
    made[1]["weights"][2:] = 0
    return {key: jnp.stack([row[key] for row in made]) for key in made[0]}


def make_outputs(batch, tokenizer):
    """A model that is a function of each row alone."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(tokenizer.vocab_size, 8)), jnp.float32)
    rows = jnp.arange(len(batch["tokens"]))[:, None]
    hidden = table[batch["tokens"]] + batch["positions"][..., None] / T
    pair = hidden.mean(1)[:, None, :2] * 3
    return SimpleNamespace(
        hidden=hidden[rows, batch["masked_positions"]],
        unembed=table,
        unembed_bias=None,
        softcap=0.0,
        pair_logits=pair,
    )


def check_regrouping(objective, make_example, tokenizer):
    """The loss of a batch is the sums over its microbatches, whatever their weights are."""
    batch = make_batch(objective, make_example, 6)

    @jax.jit
    def loss(batch):
        return objective.loss(make_outputs(batch, tokenizer), batch)

    (total, weight), metrics = loss(batch)
    sums = None
    for start, stop in ((0, 1), (1, 2), (2, 6)):
        part = jax.tree.map(lambda x, a=start, b=stop: x[a:b], batch)
        result = loss(part)
        sums = result if sums is None else jax.tree.map(jnp.add, sums, result)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), ((total, weight), metrics), sums
    )
    assert metrics["loss"] == (total, weight) and weight == batch["weights"].sum()
    assert metrics["pair_loss"][1] == 5


def test_regrouping_rows_does_not_change_the_joint_loss(tokenizer, make_example):
    check_regrouping(NextSentence(tokenizer=tokenizer), make_example, tokenizer)

    class Wrong(NextSentence):
        def loss(self, outputs, batch):
            (total, weight), metrics = super().loss(outputs, batch)
            pair, rows = metrics["pair_loss"]
            total = metrics["mlm_loss"][0] + pair / jnp.maximum(rows, 1) * weight
            return (total, weight), {**metrics, "loss": (total, weight)}

    with pytest.raises(AssertionError):
        check_regrouping(Wrong(tokenizer=tokenizer), make_example, tokenizer)
