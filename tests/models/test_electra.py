"""ELECTRA: what is sampled, what is shared, what gets a gradient, and that both parts learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import electra as recipes
from jaxlm.models import ELECTRA, TransformerConfig, electra
from jaxlm.models.layers import Outputs
from jaxlm.objectives import OBJECTIVES
from tests.models.tiny import init_params, make_config
from tests.objectives.conftest import tokenizer as toy_tokenizer

V, ROWS = 9, 4000
OBJECTIVE = OBJECTIVES["rtd"](tokenizer=toy_tokenizer.__wrapped__(), discriminator_weight=10.0)
T = 24


def make_model(**fields):
    fields = (
        dict(vocab_size=107, max_len=T, num_layers=2, num_kv_heads=4, num_token_types=2) | fields
    )
    return ELECTRA(make_config(norm_position="post", embed_factor_dim=12, **fields), width=0.5)


def make_batch(seed=0, rows=8):
    """Rows of a rule that can be learned: words in turn, each with its two pieces."""
    made = []
    for row in range(rows):
        rng = np.random.default_rng([seed, row])
        tokens = 7 + (np.arange(T - 2) + 2 * rng.integers(50)) % 100
        example = {"tokens": tokens.astype(np.int32), "segment_ids": np.ones(T - 2, np.int32)}
        made.append(OBJECTIVE.corrupt(rng, example, T))
    return {key: jnp.asarray(np.stack([row[key] for row in made])) for key in made[0]}


@functools.cache
def made():
    model, batch = make_model(), make_batch()
    return model, init_params(model, batch), batch


def check_sampling(sample):
    """Draws follow softmax(hidden . table + bias), place by place."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 2, 3)), jnp.float32).repeat(ROWS, 0)
    table, bias = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((V, 3), (V,)))
    drawn = np.asarray(
        sample(Outputs(hidden, table, bias), jax.random.split(jax.random.key(1), ROWS))
    )
    wanted = jax.nn.softmax(hidden[0] @ table.T + bias[None])
    for place in range(2):
        share = np.bincount(drawn[:, place], minlength=V) / ROWS
        np.testing.assert_allclose(share, wanted[place], atol=4 * 0.5 / ROWS**0.5)


def test_tokens_are_drawn_from_the_generators_distribution(monkeypatch):
    check_sampling(electra.sample_tokens)
    monkeypatch.setattr(electra, "LOGITS_PER_DEVICE", ROWS * V)  # one place at a time
    check_sampling(electra.sample_tokens)


def test_the_sampling_law_fails_for_the_likeliest_token():
    def likeliest(outputs, keys):
        return jnp.argmax(outputs.hidden @ outputs.unembed.T + outputs.unembed_bias[None, None], -1)

    with pytest.raises(AssertionError):
        check_sampling(likeliest)


def test_replaced_tokens_are_the_ones_that_differ_and_unused_slots_change_nothing():
    batch = {
        "masked_positions": jnp.array([[3, 1, 0]]),
        "labels": jnp.array([[7, 8, 0]]),
        "weights": jnp.array([[1.0, 1.0, 0.0]]),
    }
    tokens, replaced = electra.fill(jnp.array([[4, 6, 5, 6]]), batch, jnp.array([[7, 9, 11]]))
    assert tokens.tolist() == [[4, 9, 5, 7]]  # 7 is the original
    assert replaced.tolist() == [[0, 1, 0, 0]]


def test_an_evaluation_does_not_depend_on_how_rows_lie_in_a_batch_and_training_draws_anew():
    model, params, batch = made()
    run = jax.jit(lambda p, b: model.apply({"params": p}, b))
    order = np.array([5, 2, 7, 0, 1, 3, 4, 6])
    out, mixed = run(params, batch), run(params, {k: v[order] for k, v in batch.items()})
    np.testing.assert_allclose(out.head_logits[order], mixed.head_logits, atol=1e-5)
    np.testing.assert_array_equal(out.head_labels[order], mixed.head_labels)
    train = jax.jit(
        lambda key: model.apply({"params": params}, batch, False, rngs={"dropout": key}).head_logits
    )
    first, again, other = (np.asarray(train(jax.random.key(i))) for i in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_without_labels_the_generator_alone_predicts():
    model, params, batch = made()
    asked = {k: batch[k] for k in ("tokens", "segment_ids", "positions", "masked_positions")}
    out = jax.eval_shape(lambda: model.apply({"params": params}, asked))
    assert out.head_logits is None and out.hidden.shape == (*batch["labels"].shape, 12)


def test_the_generator_has_its_share_of_the_width_and_no_table_of_its_own():
    _, params, _ = made()
    generator = params["generator"]
    assert generator["layers"]["attention"]["query"].shape == (2, 8, 2, 4)
    assert generator["projection"]["kernel"].shape == (12, 8)
    assert params["embed"]["projection"]["kernel"].shape == (12, 16)
    assert set(generator) == {"layers", "projection", "mlm_head"}
    with pytest.raises(ValueError, match="generator.width=0: expected over 0"):
        electra.generator_config(make_config(), 0, 1.0)


def test_options_that_it_does_not_have_are_listed():
    model = make_model(tie_embeddings=False, logit_scale=0.5)
    with pytest.raises(ValueError, match="tie_embeddings=False: .*True\n.*logit_scale=0.5: .*0.0"):
        jax.eval_shape(model.init, jax.random.key(0), make_batch())


def test_each_loss_trains_its_own_part_and_both_train_the_embeddings():
    """The discriminator's gradient does not go back through the sample (section 3.1)."""
    model, params, batch = made()

    def loss(params, part):
        out = model.apply({"params": params}, batch)
        (total, _), metrics = OBJECTIVE.loss(out, batch)
        mlm = OBJECTIVES["mlm"].loss(OBJECTIVE, out, batch)[0][0]
        return {"generator": mlm, "discriminator": total - mlm}[part]

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    size = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
    generators, discriminators = grad(params, "generator"), grad(params, "discriminator")
    assert size(generators["generator"]) > 0 and size(generators["embed"]["embedding"]) > 0
    assert size([generators["layers"], generators["rtd_head"]]) < 1e-6
    assert size(discriminators["layers"]) > 0 and size(discriminators["embed"]["embedding"]) > 0
    assert size(discriminators["generator"]) < 1e-4


def test_both_parts_learn():
    model, _, batch = made()
    params = init_params(make_model(init_std=0.05), batch)
    params = jax.tree.map(lambda x: 0.2 * x if x.ndim > 1 else x, params)

    @jax.jit
    def step(params, moments, key):
        def mean(params):
            out = model.apply({"params": params}, batch, False, rngs={"dropout": key})
            (total, weight), metrics = OBJECTIVE.loss(out, batch)
            return total / weight, metrics

        (_, metrics), grads = jax.value_and_grad(mean, has_aux=True)(params)
        moments = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g**2, moments, grads)
        update = lambda p, g, m: p - 0.01 * g / (jnp.sqrt(m) + 1e-8)
        return jax.tree.map(update, params, grads, moments), moments, metrics

    moments, seen = jax.tree.map(jnp.zeros_like, params), []
    for i in range(120):
        params, moments, metrics = step(params, moments, jax.random.key(i))
        seen.append({k: float(total / max(weight, 1.0)) for k, (total, weight) in metrics.items()})
    mean = lambda name, part: np.mean([line[name] for line in part])
    for name in ("nll", "discriminator_loss", "loss"):
        assert mean(name, seen[-10:]) < 0.8 * mean(name, seen[:5]), name
    # At the end there is little to find, because the generator is right.
    assert max(line["discriminator_recall"] for line in seen) > 0.3


# google/electra-{small,base,large}-discriminator in transformers: ElectraForPreTraining, and its body ElectraModel.
PUBLISHED = {
    "small": (13_549_057, 13_483_008),
    "base": (109_483_009, 108_891_648),
    "large": (335_142_913, 334_092_288),
}
# ElectraForMaskedLM of the generator, the tables and norm that it shares included.
GENERATORS = {"small": 4_620_026, "base": 33_740_602, "large": 51_295_290}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_discriminator_and_its_generator_have_their_published_sizes(variant):
    config = recipes.get_config(variant)
    model = ELECTRA(TransformerConfig(**config.model), **config.generator)
    tokens = {"tokens": jnp.zeros((1, 8), jnp.int32)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    count = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
    body = count([shapes["embed"], shapes["layers"]])
    assert (body + count(shapes["rtd_head"]), body) == PUBLISHED[variant]
    tables = {k: v for k, v in shapes["embed"].items() if k != "projection"}
    assert count([tables, shapes["generator"]]) == GENERATORS[variant]
