"""Layers that learn slower, or not at all: by scaled updates, alike for stacked and for separate layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.training.optimizers import OPTIMIZERS, make_optimizer, map_axes, scale_layers
from tests.training.test_optimizers import (
    HYPER,
    LAYERS,
    assert_equal,
    check_stacked_equals_unstacked,
    problem,
    stack,
    stacked_axes,
    train,
    unstacked,
)

DECAYED = dict(num_layers=LAYERS, layer_decay=0.5)
FROZEN = dict(num_layers=LAYERS, frozen_layers=2)


def adamw(axes, **options):
    return scale_layers(make_optimizer("adamw", axes=axes, **HYPER["adamw"]), axes, **options)


def scales_gradients(axes, **options):
    """Wrong on purpose: Adam's updates hardly depend on the size of the gradients."""
    scale = scale_layers(optax.identity(), axes, **options)
    return optax.chain(scale, make_optimizer("adamw", axes=axes, **HYPER["adamw"]))


def decays_unscaled(axes, **options):
    """Wrong on purpose: weight decay pulls at frozen layers, too."""
    hyper = HYPER["adamw"] | {"weight_decay": 0.0}
    scaled = scale_layers(make_optimizer("adamw", axes=axes, **hyper), axes, **options)
    return optax.chain(scaled, optax.add_decayed_weights(0.1))


WRONG = [scales_gradients, decays_unscaled]

# --- what is scaled by how much ---------------------------------------------------------------------------------------


def check_rates(make):
    """The first updates are those of plain AdamW times 1/16 for the embeddings, 1/8, 1/4, 1/2 for the layers, 1 above."""
    params, all_grads = (stack(problem()[0]), stack(problem()[1], axis=1))
    first = jax.tree.map(lambda g: g[:1], all_grads)
    plain = train(make_optimizer("adamw", axes=stacked_axes(), **HYPER["adamw"]), params, first)
    found = train(make(stacked_axes(), **DECAYED), params, first)
    rate_L = np.array([1 / 8, 1 / 4, 1 / 2], np.float32)
    expected = {
        "embed": jax.tree.map(lambda u: u / 16, plain["embed"]),
        "layers": jax.tree.map(
            lambda u: u * rate_L.reshape(1, -1, *(1,) * (u.ndim - 2)), plain["layers"]
        ),
        "final_norm": plain["final_norm"],
    }
    assert_equal(found, expected, rtol=1e-6)


def test_the_embeddings_learn_slowest_and_each_layer_faster_than_the_one_below():
    check_rates(adamw)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_of_rates_fails_for_one_that(wrong):
    with pytest.raises(AssertionError):
        check_rates(wrong)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_stacked_and_unstacked_layers_get_equal_updates(name):
    def make(axes):
        optimizer = make_optimizer(name, axes=axes, **HYPER[name])
        return scale_layers(optimizer, axes, num_layers=LAYERS, layer_decay=0.5, frozen_layers=1)

    check_stacked_equals_unstacked(make)


def test_that_law_fails_where_a_stack_is_scaled_as_one_layer():
    def make(axes):
        if axes == unstacked(1):
            return adamw(axes, **DECAYED)
        halve = lambda updates, params: jax.tree.map(lambda u: u / 2, updates)
        return optax.chain(
            make_optimizer("adamw", axes=axes, **HYPER["adamw"]), optax.stateless(halve)
        )

    with pytest.raises(AssertionError):
        check_stacked_equals_unstacked(make)


# --- frozen -----------------------------------------------------------------------------------------------------------


def check_frozen(make):
    """Of three layers the embeddings and the lowest two stay what they are, bit by bit; all else moves."""
    params, all_grads = (stack(problem()[0]), stack(problem()[1], axis=1))
    params["embed"]["embedding"][0, 0] = -0.0
    params["layers"]["mlp"]["up"][1, 0, 0] = -0.0
    optimizer = make(stacked_axes(), **FROZEN)

    @jax.jit
    def run(params, all_grads):
        def step(carry, grads):
            params, state = carry
            directions, state = optimizer.update(grads, state, params)
            updates = jax.tree.map(lambda d: -0.1 * d, directions)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), all_grads)[0][0]

    after = jax.device_get(run(params, all_grads))
    bits = lambda x: np.asarray(x, np.float32).view(np.int32)
    same = lambda x, y: np.array_equal(bits(x), bits(y))
    assert all(jax.tree.leaves(jax.tree.map(same, after["embed"], params["embed"])))
    lowest = lambda tree: jax.tree.map(lambda x: x[:2], tree["layers"])
    assert all(jax.tree.leaves(jax.tree.map(same, lowest(after), lowest(params))))
    highest = lambda tree: jax.tree.map(lambda x: x[2], [tree["layers"]])
    assert not any(jax.tree.leaves(jax.tree.map(same, highest(after), highest(params))))
    assert not same(after["final_norm"]["scale"], params["final_norm"]["scale"])


def test_frozen_layers_and_embeddings_stay_bit_by_bit():
    check_frozen(adamw)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_of_frozen_layers_fails_for_one_that(wrong):
    with pytest.raises(AssertionError):
        check_frozen(wrong)


def test_an_update_that_is_no_number_does_not_reach_a_frozen_layer():
    scale = scale_layers(optax.identity(), {"embed": {"x": ("vocab",)}}, **FROZEN)
    found, _ = scale.update({"embed": {"x": jnp.array([jnp.nan, jnp.inf])}}, optax.EmptyState())
    assert not found["embed"]["x"].any()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_without_an_option_the_optimizer_is_itself():
    for name in OPTIMIZERS:
        optimizer = make_optimizer(name, axes=stacked_axes(), **HYPER[name])
        assert scale_layers(optimizer, stacked_axes(), num_layers=LAYERS) is optimizer


def test_shared_layers_are_refused():
    axes = stacked_axes()
    params = stack(problem()[0])
    shared = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    for options in (DECAYED, FROZEN):
        with pytest.raises(ValueError, match="stack of 1 where 3 layers.*layer_decay=1.0"):
            adamw(axes, **options).init(shared)
    only_head = {"head": {"kernel": ("embed", None)}}
    adamw(only_head, **DECAYED).init(map_axes(lambda a: jnp.zeros((2, 2)), only_head))


def test_options_out_of_range_are_listed():
    with pytest.raises(ValueError) as error:
        adamw(stacked_axes(), num_layers=LAYERS, layer_decay=0.0, frozen_layers=4)
    assert "layer_decay=0.0" in str(error.value) and "frozen_layers=4" in str(error.value)
