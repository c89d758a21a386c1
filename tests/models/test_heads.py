"""The heads of tasks on a decoder and on an encoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import BERT, GPT, HEADS, Head
from tests.models.tiny import CLASSIC, init_params, is_close, make_config, run


def make_model(family=BERT, **head):
    config = make_config(norm_position="post", **CLASSIC)
    return family(config, head=Head(config, **dict(num_classes=3) | head))


def make_rows(*rows, length=12):
    """Each row is a list of lengths: that many tokens for each example, then padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (len(rows), length)).astype(np.int32)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, lengths in enumerate(rows):
        start = 0
        for number, n in enumerate(lengths, start=1):
            segment_ids[row, start : start + n] = number
            positions[row, start : start + n] = np.arange(n)
            start += n
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}


def logits_of(model, params, batch):
    out = run(model, params, {k: jnp.asarray(v) for k, v in batch.items()})
    assert out.unembed is None and out.head_logits.dtype == jnp.float32
    return np.asarray(out.head_logits)


def expected_logits(params, pooled):
    head = params["head"]
    x = np.tanh(pooled @ np.asarray(head["dense"]) + np.asarray(head["bias"]))
    return x @ np.asarray(head["out"]["kernel"]) + np.asarray(head["out"]["bias"])


def check_pooling(pooling, pool, family=BERT):
    model, batch = make_model(family, pooling=pooling, transform="tanh"), make_rows([7], [12])
    params = init_params(model, batch)
    hidden = np.asarray(run(model, params, batch).hidden)
    expected = np.stack([pool(hidden[0, :7]), pool(hidden[1])])[:, None]
    np.testing.assert_allclose(
        logits_of(model, params, batch), expected_logits(params, expected), atol=1e-4, rtol=1e-4
    )


POOL = {"first": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0)}


@pytest.mark.parametrize("family", [BERT, GPT])
@pytest.mark.parametrize("pooling", POOL)
def test_a_pooled_head_reads_its_place_among_the_real_tokens(pooling, family):
    check_pooling(pooling, POOL[pooling], family)


@pytest.mark.parametrize("pooling", POOL)
def test_the_pooling_check_fails_for_the_other_poolings(pooling):
    for other in set(POOL) - {pooling}:
        with pytest.raises(AssertionError):
            check_pooling(pooling, POOL[other])


def check_packed_examples(pooling, places):
    """Two examples in a row give the logits that each gives alone."""
    model, packed = make_model(pooling=pooling, transform="tanh"), make_rows([7, 4])
    params = init_params(model, packed)
    both = logits_of(model, params, {**packed, "example_positions": np.array([places], np.int32)})
    assert both.shape == (1, 2, 3)
    for example, span in enumerate((slice(0, 7), slice(7, 11))):
        alone = {"tokens": packed["tokens"][:, span]}
        assert is_close(both[:, example], logits_of(model, params, alone)[:, 0]), "packing matters"


@pytest.mark.parametrize(
    "pooling, places", [("first", [0, 7]), ("last", [6, 10]), ("mean", [0, 7])]
)
def test_packed_examples_have_the_logits_that_they_have_alone(pooling, places):
    check_packed_examples(pooling, places)


def test_the_packing_check_fails_for_another_place():
    with pytest.raises(AssertionError, match="packing matters"):
        check_packed_examples("first", [0, 6])


@functools.cache
def two_packed_examples_with_entities():
    model, batch = make_model(pooling="entities", transform="tanh"), make_rows([7, 4])
    batch["example_entity_positions"] = np.array([[[5, 2], [7, 10]]], np.int32)
    params = init_params(model, batch)
    return params, run(model, params, batch)


def check_entities(*places):
    """Each example's logits are those of its two vectors side by side."""
    params, out = two_packed_examples_with_entities()
    assert out.head_logits.shape == (1, 2, 3) and params["head"]["dense"].shape == (32, 16)
    for logits, pair in zip(out.head_logits[0], places, strict=True):
        expected = expected_logits(params, np.concatenate(np.asarray(out.hidden[0])[pair]))
        assert is_close(logits, expected, 1e-4), "other vectors"


def test_the_entities_head_reads_two_places_of_each_packed_example():
    check_entities([5, 2], [7, 10])


@pytest.mark.parametrize("places", [([2, 5], [7, 10]), ([5, 2], [0, 3])])
def test_the_check_of_entities_fails_for_another_order_and_for_places_in_the_example(places):
    with pytest.raises(AssertionError, match="other vectors"):
        check_entities(*places)


def test_a_head_at_every_token_has_logits_there_and_a_head_without_classes_the_vectors():
    batch = make_rows([7], [12])
    for fields, shape in (
        (dict(), (2, 12, 3)),
        (dict(num_classes=0), (2, 12, 16)),
        (dict(num_classes=0, pooling="first", transform="tanh"), (2, 1, 16)),
    ):
        model = make_model(**fields)
        assert logits_of(model, init_params(model, batch), batch).shape == shape


def test_a_head_has_the_parameters_that_its_fields_ask_for():
    batch = make_rows([12])
    names = lambda **fields: {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(
            init_params(make_model(**fields), batch)["head"]
        )
    }
    assert names() == {"out/kernel", "out/bias"}
    assert names(use_bias=False) == {"out/kernel"}
    transformed = {"dense", "bias", "out/kernel", "out/bias"}
    assert names(transform="relu") == transformed
    assert names(transform="gelu", use_norm=True) == transformed | {"norm/scale", "norm/bias"}


@pytest.mark.parametrize("name", HEADS)
def test_every_named_head_runs(name):
    config, batch = make_config(norm_position="post", **CLASSIC), make_rows([7], [12])
    classes = (
        {} if name in ("question_answering", "replaced_token_detection") else {"num_classes": 5}
    )
    model = BERT(config, head=HEADS[name](config, **classes))
    shape = {"sequence_classification": (2, 1, 5), "token_classification": (2, 12, 5)}
    shape |= {"relation_classification": (2, 1, 5)}
    shape |= {"question_answering": (2, 12, 2), "replaced_token_detection": (2, 12, 1)}
    assert logits_of(model, init_params(model, batch), batch).shape == shape[name]


def test_a_heads_dropout_acts_in_training_only():
    model, batch = make_model(pooling="first", dropout_rate=0.5), make_rows([7], [12])
    params = init_params(model, batch)
    train = lambda key: (
        model.apply(
            {"params": params}, batch, deterministic=False, rngs={"dropout": jax.random.key(key)}
        ).head_logits
    )
    assert not np.allclose(train(0), train(1))
    assert (logits_of(model, params, batch) == logits_of(model, params, batch)).all()


@pytest.mark.parametrize("field, value", [("pooling", "max"), ("transform", "sigmoid")])
def test_an_unknown_word_lists_the_known_ones(field, value):
    with pytest.raises(ValueError, match=f"{field}='{value}': use one of ''"):
        jax.eval_shape(make_model(**{field: value}).init, jax.random.key(0), make_rows([12]))
