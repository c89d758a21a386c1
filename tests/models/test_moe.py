"""Experts: what a token gets of those it chose, who is dropped, what the router's losses count, and at which price."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxlm.models import grouped, moe
from jaxlm.models.grouped import grouped_matmul
from tests.models.tiny import MODERN, init_params, is_close, make_batch, make_config, make_gpt

# Half the time to compile, for programs that run once.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
EXPERTS = MODERN | dict(num_experts=5, experts_per_token=2, num_layers=2)
LOSSES = dict(router_aux_weight=0.1, router_z_weight=0.01)


def make_inputs(seed=0, rows=2, length=12):
    """x (B, T, 16) and segments; the first row ends in padding."""
    x_BTD = np.random.default_rng(seed).normal(size=(rows, length, 16)).astype(np.float32)
    return x_BTD, np.asarray(make_batch(rows=rows, length=length)["segment_ids"])


@functools.cache
def make_params(config):
    rng = np.random.default_rng(1)
    x_BTD, segment_ids_BT = make_inputs()
    boxed = jax.eval_shape(moe.MoE(config).init, jax.random.key(0), x_BTD, segment_ids_BT)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype)
    return jax.tree.map(draw, nn.meta.unbox(boxed["params"]))


def apply(config, x_BTD, segment_ids_BT, params=None, deterministic=False):
    """(y, RouterSums) of one layer; training, unless deterministic."""
    module = moe.MoE(config, deterministic)
    params = make_params(config) if params is None else params
    return jax.jit(module.apply)({"params": params}, x_BTD, segment_ids_BT)


# --- what a token gets ------------------------------------------------------------------------------------------------


def by_hand(config, params, x_BTD, segment_ids_BT, capacity=math.inf):
    """(y, dropped choices): each token of each row in turn, each of its experts alone, in float64."""
    router, up, down = (np.asarray(params[n], np.float64) for n in ("router", "up", "down"))
    gate = np.asarray(params["gate"], np.float64) if config.is_gated else None
    y_BTD, dropped = np.zeros(x_BTD.shape), 0
    taken = np.zeros((len(x_BTD), config.num_experts), int)
    for row, t in np.ndindex(*segment_ids_BT.shape):
        if not segment_ids_BT[row, t]:
            continue
        x = x_BTD[row, t].astype(np.float64)
        p = np.exp(x @ router)
        p /= p.sum()
        chosen = np.argsort(-p, kind="stable")[: config.experts_per_token]
        total = p[chosen].sum() if config.normalise_router else 1.0
        for e in chosen:
            taken[row, e] += 1
            if taken[row, e] > capacity:
                dropped += 1
                continue
            hidden = x @ up[e]
            if gate is None:
                hidden = np.maximum(hidden, 0)
            else:
                hidden *= (x @ gate[e]) / (1 + np.exp(-(x @ gate[e])))
            y_BTD[row, t] += p[e] / total * (hidden @ down[e])
    return y_BTD, dropped


def check_by_hand(config, capacity=math.inf, deterministic=False, judge=None):
    """judge: the config of the loop, where it is to be another one."""
    x_BTD, segment_ids_BT = make_inputs()
    params = make_params(config)
    y_BTD, sums = apply(config, x_BTD, segment_ids_BT, params, deterministic)
    expected, dropped = by_hand(judge or config, params, x_BTD, segment_ids_BT, capacity)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)
    assert float(sums.dropped) == dropped
    return dropped


@pytest.mark.core
@pytest.mark.parametrize(
    "fields",
    [dict(), dict(normalise_router=False, activation="relu", experts_per_token=3)],
    ids=["normalised and gated", "as the softmax says and without a gate"],
)
def test_a_token_gets_the_weighted_sum_of_the_experts_it_chose(fields):
    check_by_hand(make_config(**EXPERTS | fields))


def test_the_check_fails_without_renormalisation_and_with_one_choice_too_few():
    config = make_config(**EXPERTS)
    for wrong in (dict(normalise_router=False), dict(experts_per_token=1)):
        with pytest.raises(AssertionError, match="Not equal"):
            check_by_hand(config, judge=dataclasses.replace(config, **wrong))


def test_normalised_weights_are_the_softmax_over_the_chosen_logits():
    config, rng = make_config(**EXPERTS), np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 3, 5)).astype(np.float32)
    routes = moe.route(config, jax.nn.softmax(logits), jnp.ones((2, 3), bool))
    chosen = np.take_along_axis(logits, np.asarray(routes.experts_BTJ), -1)
    np.testing.assert_allclose(routes.weights_BTJ, jax.nn.softmax(chosen), rtol=1e-5)


# --- dropping ---------------------------------------------------------------------------------------------------------

CAPPED = make_config(**EXPERTS, expert_capacity_factor=0.7)


@pytest.mark.core
def test_dropping_drops_those_who_come_last_in_a_row_and_counts_them():
    assert moe.capacity(CAPPED, 12) == math.ceil(0.7 * 12 * 2 / 5) == 4
    assert check_by_hand(CAPPED, capacity=4) > 3


def test_the_check_fails_for_a_capacity_that_is_off_by_one(monkeypatch):
    monkeypatch.setattr(moe, "capacity", lambda config, length: 5)
    with pytest.raises(AssertionError):
        check_by_hand(CAPPED, capacity=4)


def test_a_capacity_is_rounded_up_and_never_more_than_the_row():
    sized = lambda factor, experts: make_config(
        **EXPERTS | dict(num_experts=experts, expert_capacity_factor=factor)
    )
    assert moe.capacity(sized(1.1, 2), 10) == 10
    assert moe.capacity(sized(1.1, 20), 100) == 11  # and not 12, although 1.1 * 10 > 11 in floats
    assert moe.capacity(sized(1.25, 5), 12) == 6
    assert moe.capacity(sized(100.0, 5), 12) == 12


def test_evaluation_and_decoding_drop_nothing():
    assert check_by_hand(CAPPED, deterministic=True) == 0


def get_gradients(config):
    """Of one layer that trains: by its input and parameters, of its output and the router's losses."""
    x_BTD, segment_ids_BT = make_inputs()

    def loss(params, x_BTD):
        y_BTD, sums = moe.MoE(config, False).apply({"params": params}, x_BTD, segment_ids_BT)
        return (y_BTD**3).sum() + moe.auxiliary(config, sums).loss

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(make_params(config), x_BTD)


def test_with_room_for_all_a_capacity_changes_neither_output_nor_gradients():
    sized = lambda factor: get_gradients(
        make_config(**EXPERTS, **LOSSES, expert_capacity_factor=factor)
    )
    dropless = sized(0.0)
    assert is_close(sized(2.5), dropless)
    assert not is_close(sized(0.7), dropless)


def test_recomputation_and_unrolling_change_nothing():
    batch = make_batch()
    params = init_params(make_gpt(**EXPERTS), batch)

    def gradients(**fields):
        model = make_gpt(**EXPERTS, **LOSSES, **fields)

        def loss(params):
            out = model.apply({"params": params}, batch)
            real_BT1 = batch["segment_ids"][..., None] > 0
            return jnp.where(real_BT1, out.hidden**3, 0).sum() + out.auxiliary.loss

        lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
        return lowered.compile(compiler_options=COMPILER_OPTIONS)(params)

    assert is_close(gradients(), gradients(remat="dots", unroll=0))


def test_the_order_of_rows_changes_nothing():
    x_BTD, segment_ids_BT = make_inputs(rows=4)
    order = np.array([2, 0, 3, 1])
    y_BTD, sums = apply(CAPPED, x_BTD, segment_ids_BT)
    again, other = apply(CAPPED, x_BTD[order], segment_ids_BT[order])
    assert sums.dropped > 0
    np.testing.assert_allclose(again, y_BTD[order], atol=1e-6)
    assert is_close(sums, other)


def check_the_past_is_safe():
    """Whatever comes after a place, what it and those before it get is the same, dropped or not."""
    x_BTD, segment_ids_BT = make_inputs(seed=3)
    y_BTD, sums = apply(CAPPED, x_BTD, segment_ids_BT)
    assert sums.dropped > 0
    for cut in range(1, 10):
        changed = x_BTD.copy()
        changed[:, cut:] = np.random.default_rng(cut).normal(0, 2, changed[:, cut:].shape)
        again, _ = apply(CAPPED, changed, segment_ids_BT)
        np.testing.assert_allclose(again[:, :cut], y_BTD[:, :cut], atol=1e-6)


def test_no_token_loses_its_place_to_a_later_one():
    check_the_past_is_safe()


def test_the_check_fails_if_first_choices_go_before_second_ones(monkeypatch):
    def by_choice(config, size, experts_TJ):
        """As GShard does: all first choices of the row find their places before any second choice."""
        experts_A = experts_TJ.T.reshape(-1)
        rank_A1, _ = moe.rank_choices(experts_A[:, None], config.num_experts)
        rank_TJ = rank_A1.reshape(experts_TJ.T.shape).T
        nowhere = config.num_experts * size
        fits = (rank_TJ < size) & (experts_TJ < config.num_experts)
        places_TJ = jnp.where(fits, experts_TJ * size + rank_TJ, nowhere)
        return places_TJ, moe.choices_at(places_TJ, nowhere)

    monkeypatch.setattr(moe, "find_places", by_choice)
    with pytest.raises(AssertionError, match="Not equal"):
        check_the_past_is_safe()


# --- the router's losses ----------------------------------------------------------------------------------------------


def check_router_losses(auxiliary=moe.auxiliary, sums_of=apply):
    """Against the definitions, over the real tokens; what padding holds changes nothing."""
    config = make_config(**EXPERTS, **LOSSES)
    x_BTD, segment_ids_BT = make_inputs()
    params, real = make_params(config), segment_ids_BT > 0
    logits = x_BTD[real].astype(np.float64) @ np.asarray(params["router"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1)[:, :2]
    shares = np.bincount(chosen.reshape(-1), minlength=5) / chosen.size
    balance = 5 * (shares * p.mean(0)).sum()
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    _, sums = sums_of(config, x_BTD, segment_ids_BT)
    found = auxiliary(config, jax.tree.map(lambda x: x[None], sums))
    means = {name: float(total / weight) for name, (total, weight) in found.metrics.items()}
    expected = dict(router_balance=balance, router_z=z, dropped_share=0, max_load=5 * shares.max())
    for name, value in expected.items():
        assert means[name] == pytest.approx(value, abs=1e-5), name
    assert float(found.loss) == pytest.approx(0.1 * balance + 0.01 * z, rel=1e-5)


@pytest.mark.core
def test_the_routers_losses_are_switchs_and_st_moes_over_real_tokens():
    check_router_losses()


def test_the_check_fails_if_padding_counts_and_for_a_balance_of_choices_alone():
    with_padding = lambda config, x, segments: apply(config, x, np.maximum(segments, 1))
    with pytest.raises(AssertionError, match="router_balance"):
        check_router_losses(sums_of=with_padding)
    hard = lambda config, sums: moe.auxiliary(
        config, sums.replace(probs_E=sums.chosen_E / config.experts_per_token)
    )
    with pytest.raises(AssertionError, match="router_balance"):
        check_router_losses(auxiliary=hard)


def test_experts_that_are_used_alike_have_a_balance_of_one():
    config = make_config(**EXPERTS, **LOSSES)
    even = moe.RouterSums(
        jnp.ones(1) * 10, jnp.full((1, 5), 4.0), jnp.full((1, 5), 2.0), *[jnp.zeros(1)] * 2
    )
    metrics = moe.auxiliary(config, even).metrics
    assert metrics["router_balance"][0] == pytest.approx(1) == metrics["max_load"][0]


def test_padding_takes_no_place_and_gets_nothing():
    x_BTD, segment_ids_BT = make_inputs()
    y_BTD, sums = apply(CAPPED, x_BTD, segment_ids_BT)
    changed = np.where(segment_ids_BT[..., None] > 0, x_BTD, 7.0).astype(np.float32)
    again, other = apply(CAPPED, changed, segment_ids_BT)
    np.testing.assert_array_equal(again, y_BTD)
    assert is_close(sums, other) and not np.asarray(y_BTD)[segment_ids_BT == 0].any()


def test_a_tiny_mixture_learns_and_its_auxiliary_loss_spreads_the_load():
    model = make_gpt(**EXPERTS | dict(num_layers=1, router_aux_weight=1.0), init_std=0.1)
    rng = np.random.default_rng(0)
    tokens = (np.cumsum(rng.integers(1, 3, (16, 13)), axis=1) % 32).astype(np.int32)
    batch = {"tokens": tokens[:, :-1]}
    optimizer = optax.adam(0.02)

    def loss(params, weight):
        out = model.apply({"params": params}, batch, deterministic=False)
        logits = jnp.einsum("BTD,VD->BTV", out.hidden, out.unembed)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return nll + weight * out.auxiliary.loss, (nll, out.auxiliary.metrics["max_load"][0])

    @jax.jit
    def train(params, weight):
        def step(carry, _):
            params, state = carry
            grads, seen = jax.grad(loss, has_aux=True)(params, weight)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), seen

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=60)[1]

    params = init_params(model, batch)
    # All tokens begin at one expert: the norm's scale is positive, and so is what goes into the router's first column.
    params["layers"]["mlp"]["router"] *= 0.1
    params["layers"]["mlp"]["router"] = params["layers"]["mlp"]["router"].at[:, :, 0].mul(30.0)
    compiled = train.lower(params, 0.0).compile(compiler_options=COMPILER_OPTIONS)
    alone, balanced = compiled(params, 0.0), compiled(params, 0.3)
    for losses, _ in (alone, balanced):
        assert losses[-1] < 0.6 * losses[0]
    assert balanced[1][-1] < 1.4 < alone[1][-1]


# --- the matrix product of groups -------------------------------------------------------------------------------------


def check_grouped(multiply):
    rng = np.random.default_rng(0)
    function = jax.jit(jax.value_and_grad(lambda x, w, s: (multiply(x, w, s) ** 3).sum(), (0, 1)))
    for rows, groups in ((1, 4), (7, 4), (96, 3)):
        x, kernels = rng.normal(size=(rows, 3)), rng.normal(size=(groups, 3, 2))
        for total in (0, rows // 2, rows):
            sizes = rng.multinomial(total, rng.dirichlet(np.full(groups, 0.5)))
            of_row = np.repeat(np.arange(groups), sizes)
            y = np.zeros((rows, 2))
            y[:total] = np.einsum("ad,adf->af", x[:total], kernels[of_row])
            grad = 3 * y**2
            x_grad, kernels_grad = np.zeros_like(x), np.zeros_like(kernels)
            x_grad[:total] = np.einsum("af,adf->ad", grad[:total], kernels[of_row])
            np.add.at(kernels_grad, of_row, x[:total, :, None] * grad[:total, None, :])
            arguments = (jnp.float32(x), jnp.float32(kernels), jnp.int32(sizes))
            found = function(*arguments)
            assert is_close((found[0], *found[1]), ((y**3).sum(), x_grad, kernels_grad), 1e-4)


def test_each_group_of_rows_meets_its_kernel_and_rows_of_no_group_give_zeros():
    check_grouped(grouped_matmul)


def interpret_tiles(monkeypatch, rows=8, side=4):
    """The kernels of TPUs, here, with small tiles: of 8 rows and 2 columns of float32, unless told."""
    monkeypatch.setattr(grouped, "TILE_ROWS", rows)
    monkeypatch.setattr(grouped, "TILE_SIDE", side)
    for name in ("multiply", "outer"):
        tiles = functools.partial(getattr(grouped, f"_{name}_tiles"), interpret=True)
        monkeypatch.setattr(grouped, f"_{name}_blocks", tiles)


@pytest.mark.parametrize("rows, side", [(8, 4), (grouped.TILE_ROWS, grouped.TILE_SIDE)])
def test_the_kernels_of_tpus_say_the_same(rows, side, monkeypatch):
    interpret_tiles(monkeypatch, rows, side)
    check_grouped(grouped_matmul)


def test_the_check_fails_if_kernels_leave_rows_of_no_group_as_they_were(monkeypatch):
    interpret_tiles(monkeypatch)
    monkeypatch.setattr(grouped, "_with_rest", lambda sizes, rows: sizes)
    with pytest.raises(AssertionError):
        check_grouped(lambda *arrays: grouped_matmul(*arrays))


def test_the_check_fails_if_the_last_row_of_a_group_is_lost(monkeypatch):
    original = grouped.make_blocks

    def short(sizes_E, num_rows):
        return original(jnp.maximum(sizes_E - 1, 0), num_rows)

    monkeypatch.setattr(grouped, "make_blocks", short)
    with pytest.raises(AssertionError):
        check_grouped(lambda *arrays: grouped_matmul(*arrays))


def test_where_ragged_products_are_masked_ones_blocks_need_at_most_half_as_much_again():
    rows, groups, inner, outer = 1024, 8, 512, 768
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((rows, inner), jnp.float32),
            ((groups, inner, outer), jnp.float32),
            ((groups,), jnp.int32),
        )
    ]
    needed = 3 * 2 * rows * inner * outer

    def count(multiply):
        function = jax.grad(lambda x, w, s: (multiply(x, w, s) ** 2).sum(), (0, 1))
        return jax.jit(function).lower(*shapes).cost_analysis()["flops"] / needed

    assert count(grouped_matmul) < 1.6
    assert count(jax.lax.ragged_dot) > groups  # if this fails, blocks are no longer worth having


# --- whole models -----------------------------------------------------------------------------------------------------


def test_a_model_without_experts_is_as_it_was():
    batch = make_batch()
    model = make_gpt(**MODERN)
    params = init_params(model, batch)
    assert set(params["layers"]["mlp"]) == {"up", "gate", "down"}
    assert jax.eval_shape(lambda p: model.apply({"params": p}, batch), params).auxiliary is None


def test_what_cannot_be_is_refused_with_all_that_is_wrong():
    with pytest.raises(ValueError) as error:
        make_config(
            num_experts=4,
            experts_per_token=5,
            expert_capacity_factor=-1.0,
            mlp_bias=True,
            lora_rank=2,
            lora_targets=("query", "up"),
        )
    for part in ("experts_per_token=5: 1 to num_experts=4", "=-1.0", "mlp_bias", "['up']: experts"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"router_aux_weight=0.1 without experts: set it to 0"):
        make_config(router_aux_weight=0.1)


def test_attention_may_have_adapters_beside_experts():
    model = make_gpt(**EXPERTS, lora_rank=2)
    assert "query_lora_a" in init_params(model, make_batch())["layers"]["attention"]
