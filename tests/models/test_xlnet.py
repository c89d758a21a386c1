"""XLNet: who sees whom, by gradient; padding, packing, loops; transformers' logits; and that it learns."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import xlnet as recipes
from jaxlm.models import Head, TransformerConfig, XLNet, xlnet
from jaxlm.objectives import OBJECTIVES
from tests.models.tiny import init_params, make_config
from tests.objectives.conftest import tokenizer as toy_tokenizer
from tests.oracles import tiny_families as families
from tests.oracles import two_streams
from tests.oracles.recorded import get_logits
from tests.oracles.tiny_models import random_weights

T = 10
PLACES = np.array([[1, 3, 4], [0, 6, 8]], np.int32)


def make_model(**fields):
    options = dict(
        norm_position="post", position="none", num_kv_heads=4, num_layers=2, mlp_bias=True
    )
    return XLNet(make_config(norm_bias=True, **options | fields))


@functools.cache
def make_batch():
    """Two documents in the first row and then padding; three places to predict in each row, in some order."""
    rng = np.random.default_rng(0)
    segment_ids = np.array([[1] * 3 + [2] * 5 + [0] * 2, [1] * T], np.int32)
    order = np.zeros((2, T), np.int32)
    np.put_along_axis(order, PLACES, np.array([[2, 3, 1], [2, 1, 3]], np.int32), axis=1)
    tokens = rng.integers(0, 32, (2, T)).astype(np.int32)
    batch = dict(tokens=tokens, segment_ids=segment_ids, order=order, masked_positions=PLACES)
    return {key: jnp.asarray(value) for key, value in batch.items()}


@functools.cache
def made():
    model, batch = make_model(), make_batch()
    return model, init_params(model, batch), batch


@jax.jit
def run(batch):
    """The hidden states (B, M, D) of the query stream."""
    model, params, _ = made()
    return model.apply({"params": params}, batch).hidden


def sees(model, params, batch):
    """Whether each prediction depends on each token: bool (B, M, T), by the gradient for one embedding a place."""
    tokens = batch["tokens"]
    apart = {**batch, "tokens": jnp.arange(tokens.size, dtype=jnp.int32).reshape(tokens.shape)}
    table = jnp.take(params["embed"]["embedding"], tokens.reshape(-1), axis=0)

    wide = XLNet(dataclasses.replace(model.config, vocab_size=tokens.size))

    def hidden(table):
        own = {"embed": {"embedding": table}, "mlm_head": {"vocab_bias": table[:, 0]}}
        return wide.apply({"params": params | own}, apart).hidden

    jacobian = jax.jit(jax.jacrev(lambda table: jnp.square(hidden(table)).sum(-1)))(table)
    found = np.abs(np.asarray(jacobian)).max(-1) > 1e-7  # (B, M, B T)
    return np.stack([found[b, :, b * T : (b + 1) * T] for b in range(len(tokens))])


def check_sight(model, params, batch):
    """A prediction depends on exactly the tokens of its document that come before its place in the order."""
    batch = jax.tree.map(np.asarray, batch)
    found = sees(model, params, jax.tree.map(jnp.asarray, batch))
    for row, slot in np.ndindex(PLACES.shape):
        place = PLACES[row, slot]
        same = batch["segment_ids"][row] == batch["segment_ids"][row, place]
        wanted = same & (batch["order"][row] < batch["order"][row, place])
        assert not wanted[place]
        np.testing.assert_array_equal(found[row, slot], wanted, err_msg=f"row {row}, place {place}")


def test_a_prediction_depends_on_exactly_the_tokens_before_it_in_the_order_and_not_on_its_own():
    check_sight(*made())


def see_itself(order_BQ, length):
    return order_BQ


def see_one_more(order_BQ, length):
    is_query_Q = jnp.arange(order_BQ.shape[1]) >= length
    return jnp.where(is_query_Q[None], order_BQ - 1, order_BQ + 1)


@pytest.mark.parametrize("wrong", [see_itself, see_one_more])
def test_the_law_of_sight_fails_for_another_mask(wrong, monkeypatch):
    """Queries that see their own token; content that sees the next one, and tells the queries in a second layer."""
    monkeypatch.setattr(xlnet, "see_up_to", wrong)
    with pytest.raises(AssertionError):
        check_sight(*made())


def test_without_an_order_predictions_are_from_context_alone():
    batch = make_batch()
    asked = {k: v for k, v in batch.items() if k != "order"}
    tokens = np.array(batch["tokens"])
    np.put_along_axis(tokens, PLACES, 5, axis=1)
    np.testing.assert_allclose(run(asked), run(asked | {"tokens": jnp.asarray(tokens)}), atol=1e-6)
    # A row with fewer places is filled up with 0, and place 0 stays context.
    places = jnp.array([[1, 0, 0], [6, 8, 0]])
    order = np.asarray(xlnet.find_order(asked, places))
    assert order.sum(1).tolist() == [1, 2] and not order[:, 0].any()


def test_documents_in_one_row_give_what_they_give_in_rows_of_their_own():
    model, params, batch = made()
    packed = model.apply({"params": params}, batch).hidden
    alone = {key: jnp.pad(batch[key][:1, 3:8], ((0, 0), (0, T - 5))) for key in ("tokens", "order")}
    alone |= {
        "segment_ids": jnp.array([[1] * 5 + [0] * 5]),
        "masked_positions": jnp.array([[0, 1]]),
    }
    own = model.apply({"params": params}, alone).hidden
    np.testing.assert_allclose(own[0], packed[0, 1:], atol=1e-5)


def test_loops_and_rematerialisation_change_nothing():
    model, params, batch = made()

    def grad(model):
        loss = lambda p: jnp.square(model.apply({"params": p}, batch).hidden).mean()
        return jax.jit(jax.grad(loss))(params)

    other = make_model(unroll=0, remat="attention")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grad(model), grad(other))


def test_only_whether_token_types_are_the_same_matters():
    model, params, batch = made()
    run = jax.jit(
        lambda types: model.apply({"params": params}, batch | {"token_types": types}).hidden
    )
    types = jnp.asarray(np.arange(2 * T).reshape(2, T) % 3 // 2, jnp.int32)
    two = run(types)
    np.testing.assert_allclose(two, run(7 - 3 * types), atol=1e-6)
    assert np.abs(two - run(0 * types)).max() > 1e-3
    plain = model.apply({"params": params}, batch).hidden
    np.testing.assert_allclose(plain, run(0 * types), atol=1e-5)


def test_a_tasks_head_reads_the_content_stream_of_the_whole_segment():
    model, _, batch = made()
    head = Head(model.config, 3, pooling="last", transform="tanh")
    tuned = XLNet(model.config, head=head)
    out = jax.eval_shape(lambda k: tuned.init_with_output(k, batch)[0], jax.random.key(0))
    assert out.head_logits.shape == (2, 1, 3) and out.hidden.shape == (2, T, 16)
    assert out.unembed is None


def test_options_that_it_does_not_have_are_listed():
    with pytest.raises(ValueError) as error:
        make_model(
            norm_position="pre", num_kv_heads=2, qk_norm=True, logit_scale=0.5, embed_norm=True
        ).init(jax.random.key(0), make_batch())
    parts = ("norm_position='pre'", "num_kv_heads=2: set it to 4", "qk_norm=True")
    for part in (*parts, "logit_scale=0.5: set it to 0.0", "embed_norm=True: set it to False"):
        assert part in str(error.value)


def test_the_query_stream_has_the_recorded_logits_of_hugging_face():
    check_recorded()


def test_the_recorded_check_fails_for_other_token_types_and_for_another_order():
    for changes in (dict(token_types=1), dict(order=4)):
        with pytest.raises(AssertionError):
            check_recorded(**changes)


def check_recorded(token_types=0, order=0):
    """token_types, order: what is added to every second one."""
    batch, twin = two_streams.make_batch(), families.Twin("xlnet")
    second = np.arange(batch["tokens"].shape[1], dtype=np.int32) % 2
    batch["token_types"] = batch["token_types"] + token_types * second
    batch["order"] = np.where(batch["order"] > 0, batch["order"] + order * second, 0)
    ours = get_logits(twin.model, twin(random_weights(twin.shapes)), batch)
    recorded = np.array(json.loads(two_streams.PATH.read_text()))
    assert np.abs(recorded).max() > 0.1
    ours = ours.reshape(-1, ours.shape[-1])[:, : recorded.shape[1]]
    np.testing.assert_allclose(ours, recorded, atol=1e-4, rtol=1e-4)


# transformers' XLNetLMHeadModel of xlnet-base-cased and xlnet-large-cased.
PUBLISHED = {"base": 116_750_336, "large": 360_300_800}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_preset_has_its_published_size(variant):
    model = XLNet(TransformerConfig(**recipes.get_config(variant).model))
    tokens = {"tokens": jnp.zeros((1, 8), jnp.int32)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) == PUBLISHED[variant]


def test_a_tiny_models_loss_falls():
    objective = OBJECTIVES["permutation"](tokenizer=toy_tokenizer.__wrapped__())
    length, rows = 24, []
    for row in range(8):  # words in turn, each with its two pieces
        rng = np.random.default_rng(row)
        tokens = 7 + (np.arange(length - 2) + 2 * rng.integers(50)) % 100
        example = {"tokens": tokens.astype(np.int32), "segment_ids": np.ones(length - 2, np.int32)}
        rows.append(objective.corrupt(rng, example, length))
    batch = {key: jnp.asarray(np.stack([row[key] for row in rows])) for key in rows[0]}
    model = make_model(vocab_size=107, max_len=length)
    params = jax.tree.map(lambda x: 0.2 * x if x.ndim > 1 else x, init_params(model, batch))

    @jax.jit
    def step(params, moments):
        def mean(params):
            (total, weight), _ = objective.loss(model.apply({"params": params}, batch), batch)
            return total / weight

        loss, grads = jax.value_and_grad(mean)(params)
        moments = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g**2, moments, grads)
        update = lambda p, g, m: p - 0.01 * g / (jnp.sqrt(m) + 1e-8)
        return jax.tree.map(update, params, grads, moments), moments, loss

    moments, losses = jax.tree.map(jnp.zeros_like, params), []
    for _ in range(60):
        params, moments, loss = step(params, moments)
        losses.append(float(loss))
    assert losses[0] > 4.0 and np.mean(losses[-5:]) < 0.3 * losses[0]
