"""Replaced-token detection: the joint loss and what is counted, by hand."""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.rtd import sigmoid_cross_entropy

LOGITS = np.array([[3.0, -1.0, 2.0, 0.5], [-2.0, 1.0, 4.0, 9.0]], np.float32)
LABELS = np.array([[1, 1, 0, 0], [0, 1, 0, 1]], np.int32)
REAL = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.int32)


def parts(rows=slice(None)):
    """(outputs, batch): two masked places in the first row, one in the second, an even generator over 4 tokens."""
    outputs = SimpleNamespace(
        hidden=jnp.zeros((2, 2, 3))[rows],
        unembed=jnp.zeros((4, 3)),
        unembed_bias=None,
        softcap=0.0,
        head_logits=jnp.asarray(LOGITS[rows, :, None]),
        head_labels=jnp.asarray(LABELS[rows]),
    )
    weights = np.array([[1, 1], [1, 0]], np.float32)[rows]
    batch = {"labels": jnp.ones((2, 2), jnp.int32)[rows], "weights": jnp.asarray(weights)}
    return outputs, batch | {"segment_ids": jnp.asarray(REAL[rows])}


def detection_loss(row):
    """The mean over a row's real tokens, from the definition."""
    p = 1 / (1 + np.exp(-LOGITS[row].astype(np.float64)))
    losses = -np.log(np.where(LABELS[row] > 0, p, 1 - p))
    return losses[REAL[row] > 0].mean()


def test_the_joint_loss_is_the_sum_of_both_means_row_by_row(tokenizer):
    objective = OBJECTIVES["rtd"](tokenizer=tokenizer, discriminator_weight=50.0)
    (total, weight), metrics = objective.loss(*parts())
    wanted = 3 * math.log(4) + 50 * (2 * detection_loss(0) + 1 * detection_loss(1))
    assert float(weight) == 3 and float(total) == pytest.approx(wanted, rel=1e-5)
    assert metrics["loss"] == (total, weight)


def check_regrouping(loss):
    """Rows together and one by one: the same total and the same weight."""
    whole = loss(*parts())[0]
    single = [loss(*parts(slice(i, i + 1)))[0] for i in range(2)]
    np.testing.assert_allclose(whole, np.sum(single, axis=0), rtol=1e-5)


def test_no_regrouping_of_rows_changes_the_loss(tokenizer):
    check_regrouping(OBJECTIVES["rtd"](tokenizer=tokenizer).loss)


def test_the_regrouping_law_fails_for_a_mean_over_the_batch(tokenizer):
    def of_batch(outputs, batch):
        (total, weight), metrics = OBJECTIVES["mlm"](tokenizer=tokenizer).loss(outputs, batch)
        _, judged = OBJECTIVES["rtd"](tokenizer=tokenizer).loss(outputs, batch)
        losses, count = judged["discriminator_loss"]
        return (total + 50 * losses / count * weight, weight), metrics

    with pytest.raises(AssertionError):
        check_regrouping(of_batch)


def test_what_is_counted_leaves_padding_out(tokenizer):
    _, metrics = OBJECTIVES["rtd"](tokenizer=tokenizer).loss(*parts())
    counted = {k: tuple(map(float, v)) for k, v in metrics.items() if k != "discriminator_loss"}
    assert counted["discriminator_precision"] == (3, 5)  # 5 real tokens called replaced, 3 are
    assert counted["discriminator_recall"] == (3, 4)
    assert counted["discriminator_accuracy"] == (4, 7)
    assert counted["replaced_share"] == (4, 7)
    total, weight = metrics["discriminator_loss"]
    assert float(total / weight) == pytest.approx(
        (3 * detection_loss(0) + 4 * detection_loss(1)) / 7, rel=1e-5
    )


def test_large_logits_neither_overflow_nor_vanish():
    found = sigmoid_cross_entropy(jnp.array([-1e4, 1e4, 1e4]), jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(found, [1e4, 1e4, 0.0])


def test_a_model_without_a_discriminator_is_refused(tokenizer):
    outputs, batch = parts()
    outputs.head_logits = None
    with pytest.raises(ValueError, match="set family to 'electra'"):
        OBJECTIVES["rtd"](tokenizer=tokenizer).loss(outputs, batch)


def test_most_chosen_tokens_are_masked_and_none_is_random(tokenizer, make_example):
    objective, masked, count = OBJECTIVES["rtd"](tokenizer=tokenizer), 0, 0
    for i in range(200):
        rng = np.random.default_rng(i)
        row = objective.corrupt(rng, make_example(rng, (20, 42)), 64)
        slots = row["weights"] > 0
        now, before = row["tokens"][row["masked_positions"][slots]], row["labels"][slots]
        assert ((now == tokenizer.mask_id) | (now == before)).all()
        masked, count = masked + (now == tokenizer.mask_id).sum(), count + slots.sum()
    assert abs(masked / count - 0.85) < 0.03
