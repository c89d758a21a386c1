"""Rows belong to objectives by arithmetic of their number; each objective's own loss and weight are told apart."""

from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives import OBJECTIVES, Mixture
from jaxlm.objectives.losses import plain_cross_entropy
from tests.objectives.documents import window_of

T = 64
DECODER = {"plain": {"name": "causal"}, "gaps": {"name": "fim"}, "prefix": {"name": "prefix_lm"}}
PAIRS = {
    "spans": {"name": "span_corruption"},
    "noise": {"name": "denoising"},
    "ul2": {"name": "ul2"},
}


def indices(mixture, draws, batch_size=8):
    return np.array([mixture.of_draw(draw, draw // batch_size).index for draw in range(draws)])


def check_shares(choose, shares):
    """After any number of draws each objective has had its share of them, within two."""
    counts = np.zeros(len(shares))
    for draw in range(5000):
        counts[choose(draw)] += 1
        assert (abs(counts - (draw + 1) * np.array(shares)) < 3).all(), (draw, counts)


def test_shares_hold_after_any_number_of_rows(tokenizer):
    mixture = Mixture(tokenizer, DECODER, shares=("0:plain=5,gaps=3,prefix=2",))
    assert mixture.names == ("gaps", "plain", "prefix")
    check_shares(lambda draw: mixture.of_draw(draw, 0).index, (0.3, 0.5, 0.2))
    with pytest.raises(AssertionError):
        rng = np.random.default_rng(0)
        check_shares(lambda draw: rng.choice(3, p=(0.3, 0.5, 0.2)), (0.3, 0.5, 0.2))


def test_shares_change_at_their_step_and_rows_of_10_to_the_12_come_at_once(tokenizer):
    shares = ("0:plain=1", "100:plain=1,gaps=1", "200:gaps=0.25,prefix=0.75")
    mixture = Mixture(tokenizer, DECODER, shares=shares)
    found = indices(mixture, 8 * 400)
    assert Counter(found[:800].tolist()) == {1: 800}
    assert abs(Counter(found[800:1600].tolist())[0] - 400) <= 2
    later = Counter(found[1600:].tolist())
    assert set(later) == {0, 2} and abs(later[2] - 1200) <= 2
    far = [mixture.of_draw(10**12 + draw, 10**11).index for draw in range(400)]
    assert abs(Counter(far)[2] - 300) <= 2


@pytest.mark.parametrize("parts", [DECODER, PAIRS], ids=["decoder", "encoder-decoder"])
def test_rows_of_all_objectives_have_the_same_shapes(tokenizer, make_example, parts):
    mixture = Mixture(tokenizer, parts, decoder_start="pad")
    rng = np.random.default_rng(0)
    example = window_of(make_example, rng, (40, 100), mixture.window(T).length)
    rows = [mixture.of_draw(d, 0).corrupt(np.random.default_rng(d), example, T) for d in range(9)]
    shapes = [{key: (value.shape, value.dtype) for key, value in row.items()} for row in rows]
    assert all(shape == shapes[0] for shape in shapes)
    assert {int(row["objective_ids"][0]) for row in rows} == {0, 1, 2}
    assert len(rows[0]["labels"]) == mixture.num_predictions(T)
    assert mixture.target_len(T) == (0 if parts is DECODER else mixture.num_predictions(T))
    if parts is PAIRS:
        assert all((r["tokens"][r["positions"] == 0] == 0).all() for r in rows)  # decoder_start
    else:
        is_prefix = {int(r["objective_ids"][0]): r["is_prefix"].any() for r in rows}
        assert is_prefix == {0: False, 1: False, 2: True}


def make_problem(ids, seed=0, size=6, vocab_size=40):
    rng = np.random.default_rng(seed)
    rows = len(ids)
    outputs = SimpleNamespace(
        hidden=jnp.asarray(rng.normal(size=(rows, size, 8)), jnp.float32),
        unembed=jnp.asarray(rng.normal(size=(vocab_size, 8)), jnp.float32),
        unembed_bias=None,
        softcap=0.0,
    )
    batch = {
        "labels": jnp.asarray(rng.integers(0, vocab_size, (rows, size)), jnp.int32),
        "weights": jnp.asarray(rng.random((rows, size)) < 0.7, jnp.float32),
        "objective_ids": jnp.asarray(ids, jnp.int32)[:, None],
    }
    return outputs, batch


def own_losses(outputs, batch, names):
    """{name: (total, weight)} by the definition of cross-entropy, in numpy."""
    logits = np.einsum("btd,vd->btv", outputs.hidden, outputs.unembed)
    largest = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    labels, weights = np.asarray(batch["labels"]), np.asarray(batch["weights"])
    nll = lse - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    rows = np.asarray(batch["objective_ids"])[:, 0]
    return {
        name: np.array([(nll * weights)[rows == i].sum(), weights[rows == i].sum()])
        for i, name in enumerate(names)
    }


def loss_and_gradient(loss, outputs, batch):
    """((total, weight), metrics) and the total's gradient by the hidden states."""

    def total(hidden, others, batch):
        made = SimpleNamespace(**others, hidden=hidden, unembed_bias=None, softcap=0.0)
        (total, weight), metrics = loss(made, batch)
        return total, ((total, weight), metrics)

    others = {"unembed": outputs.unembed}
    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
        outputs.hidden, others, batch
    )
    return *found, gradient


def check_loss(mixture, ids, weigh):
    """Metrics are each objective's own; the loss is the mean of labels that count `weigh(own mean losses)` times, and no gradient goes
    through that."""
    outputs, batch = make_problem(ids)
    (total, weight), metrics, gradient = loss_and_gradient(mixture.loss, outputs, batch)
    own = own_losses(outputs, batch, mixture.names)
    for name, (own_total, own_weight) in own.items():
        np.testing.assert_allclose(np.array(metrics[f"{name}_loss"]), (own_total, own_weight), 1e-5)
    present = {name: t / w for name, (t, w) in own.items() if w}
    raw = weigh(present)
    scale = sum(own[n][1] for n in raw) / sum(raw[n] * own[n][1] for n in raw)
    for name in mixture.names:
        found = np.array(metrics[f"{name}_weight"])
        expected = (raw[name] * scale, 1) if name in raw else (0, 0)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    wanted = sum(raw[n] * scale * own[n][0] for n in raw)
    np.testing.assert_allclose(total, wanted, rtol=1e-4)
    np.testing.assert_allclose(weight, batch["weights"].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"][0], sum(t for t, _ in own.values()), rtol=1e-5)

    if mixture.adapt == 0:
        return
    counts = jnp.array([raw.get(n, 0.0) * scale for n in mixture.names])[jnp.array(ids)]
    batch["weights"] *= counts[:, None]
    _, _, wanted = loss_and_gradient(weighted_cross_entropy, outputs, batch)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-5)


def weighted_cross_entropy(outputs, batch):
    return plain_cross_entropy(outputs.hidden, outputs.unembed, batch["labels"], batch["weights"])


IDS = [0, 1, 1, 2, 0, 2, 2, 1]


def test_losses_and_weights_are_fixed_or_adaptive(tokenizer):
    even = Mixture(tokenizer, DECODER)
    check_loss(even, IDS, lambda own: dict.fromkeys(own, 1.0))
    fixed = Mixture(tokenizer, DECODER, loss_weights="gaps=0.5,prefix=2")
    check_loss(fixed, IDS, lambda own: {"gaps": 0.5, "plain": 1.0, "prefix": 2.0})
    adaptive = Mixture(tokenizer, DECODER, loss_weights="gaps=0.5", adapt=2.0)
    check_loss(
        adaptive, IDS, lambda own: {n: (0.5 if n == "gaps" else 1) * l**2 for n, l in own.items()}
    )
    with pytest.raises(AssertionError):
        check_loss(adaptive, IDS, lambda own: {n: own[n] for n in own})


@pytest.mark.parametrize("adapt", [0.0, 1.0])
def test_a_batch_without_an_objective_says_nothing_of_it(tokenizer, adapt):
    mixture = Mixture(tokenizer, DECODER, adapt=adapt)
    check_loss(mixture, [1, 2, 1, 1], lambda own: {n: l**adapt for n, l in own.items()})
    outputs, batch = make_problem([0, 0])
    empty = {**batch, "weights": jnp.zeros_like(batch["weights"])}  # a filled-up evaluation batch
    (total, weight), metrics, _ = loss_and_gradient(mixture.loss, outputs, empty)
    assert total == 0 and weight == 0
    assert all(np.isfinite(pair).all() and not np.any(pair) for pair in metrics.values())


def test_fixed_weights_of_one_do_not_depend_on_how_rows_are_grouped(tokenizer):
    mixture = Mixture(tokenizer, DECODER)
    outputs, batch = make_problem(IDS)
    whole, _, _ = loss_and_gradient(mixture.loss, outputs, batch)
    sums = np.zeros(2)
    for part in (slice(0, 4), slice(4, 8)):
        fewer = SimpleNamespace(**{**vars(outputs), "hidden": outputs.hidden[part]})
        rows = {key: value[part] for key, value in batch.items()}
        sums += np.array(loss_and_gradient(mixture.loss, fewer, rows)[0])
    np.testing.assert_allclose(sums, whole, rtol=1e-5)


def test_wrong_options_are_all_named_at_once(tokenizer):
    with pytest.raises(ValueError) as error:
        Mixture(
            tokenizer,
            {"a": {"name": "causal", "z_loss": 1.0}, "b": {"name": "mlm"}},
            shares=("5:a=1,c=2", "x"),
            loss_weights="a=0,b=-1",
        )
    found = str(error.value)
    for part in ("'b': 'mlm'", "['z_loss']", "'c=2'", "from step 0", "'x'", "'b=-1'", "above 0"):
        assert part in found, (part, found)
    with pytest.raises(ValueError, match="expected two or more"):
        Mixture(tokenizer, {"a": {"name": "causal"}})
    assert "mixture" in OBJECTIVES
