"""Mixture of experts: an MLP of which each token uses the few that a router chooses for it.

    p = softmax(x W) over E experts, float32        J chosen: the J largest p, the lower index first where they are equal
    y = sum over the chosen of w_j MLP_j(x)         w = their p, or with `normalise_router` their p over the sum of them

The second w is the softmax over the chosen logits alone (Mixtral, arXiv:2401.04088, eq. 1; Qwen3's norm_topk_prob). The
first is Switch's (arXiv:2101.03961, eq. 2). All experts are in one array: up (E, D, F), gate (E, D, F), down (E, F, D).

With an `expert_capacity_factor` an expert takes at most C = ceil(factor T J / E) tokens of each row of a batch when the
model trains (a row is a group of GShard, arXiv:2006.16668, section 2.2, so devices do not change what is dropped).
Whoever comes first in the row is taken, with all choices at once: no token loses its place to a later one, so what a
decoder learns from never depends on the future, only on how many before it, other documents of the row included, chose
the same. Padding takes no place. A dropped choice adds nothing; the residual is then all that passes.
Without a factor, and always when `deterministic` (evaluation, decoding), nothing is dropped.

In this module E counts experts, J the choices of a token, A = tokens x J, and S the places of all experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxlm.models.attention import residual_std
from jaxlm.models.config import TransformerConfig
from jaxlm.models.grouped import grouped_matmul
from jaxlm.models.layers import ACTIVATIONS, Auxiliary, Axes, constrain, make_param
from jaxlm.spread import mesh_axes, num_devices

# What experts work on: (B, E, C, D) and (B, E, C, F).
GROUPED, GROUPED_INNER = (("act_group", "act_expert", None, x) for x in ("act_embed", "act_mlp"))


class Kernels(NamedTuple):
    """Of all experts, in the compute dtype. gate: None where the activation has none."""

    up_EDF: jax.Array
    gate_EDF: jax.Array | None
    down_EFD: jax.Array


class Routes(NamedTuple):
    """Which experts a token goes to, (B, T, J) int32, and what their outputs are multiplied by, float32.

    Padding goes nowhere: to expert E, which there is not, with weight 0.
    """

    experts_BTJ: jax.Array
    weights_BTJ: jax.Array


@flax.struct.dataclass
class RouterSums:
    """What one layer's router did, summed over the real tokens of the (micro-)batch; float32.

    tokens (). chosen (E,): how often each expert was. probs (E,): of p. z (): of logsumexp(logits)^2. dropped (): choices.
    """

    tokens: jax.Array
    chosen_E: jax.Array
    probs_E: jax.Array
    z: jax.Array
    dropped: jax.Array


class MoE(nn.Module):
    """The experts of one layer and their router. Returns y (B, T, D), zeros at padding, and what the router did."""

    config: TransformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, RouterSums]:
        c = self.config
        init = nn.initializers.normal(c.init_std)
        shape = (c.emb_dim, c.num_experts)
        router_DE = make_param(self, "router", init, shape, ("embed", None), c.param_dtype)
        real_BT = segment_ids_BT > 0
        logits_BTE = router_logits(x_BTD, router_DE)
        probs_BTE = jax.nn.softmax(logits_BTE)
        routes = route(c, probs_BTE, real_BT)
        kernels = Kernels(
            up_EDF=self.kernel("up"),
            gate_EDF=self.kernel("gate") if c.is_gated else None,
            down_EFD=self.kernel("down"),
        )
        if c.expert_capacity_factor and not self.deterministic:
            y_BTD, dropped = apply_with_capacity(c, x_BTD, routes, kernels)
        else:
            y_BTD, dropped = apply_to_all(c, x_BTD, routes, kernels), jnp.float32(0)
        chosen_BTE = is_chosen(routes.experts_BTJ, c.num_experts)
        sums = RouterSums(
            tokens=real_BT.sum(dtype=jnp.float32),
            chosen_E=chosen_BTE.sum((0, 1), dtype=jnp.float32),
            probs_E=jnp.where(real_BT[..., None], probs_BTE, 0.0).sum((0, 1)),
            z=jnp.where(real_BT, jax.nn.logsumexp(logits_BTE, axis=-1) ** 2, 0.0).sum(),
            dropped=dropped,
        )
        y_BTD = constrain(y_BTD, ("batch", "length", "act_embed"))
        return checkpoint_name(y_BTD, "mlp_out"), sums

    def kernel(self, name: str) -> jax.Array:
        """The experts' matrices `name`, (E, D, F) or for 'down' (E, F, D), in the compute dtype."""
        c = self.config
        down = name == "down"
        init = nn.initializers.normal(residual_std(c) if down else c.init_std)
        shape, axes = (c.emb_dim, c.mlp_dim), ("embed", "mlp")
        if down:
            shape, axes = shape[::-1], axes[::-1]
        shape, axes = (c.num_experts, *shape), ("expert", *axes)
        return make_param(self, name, init, shape, axes, c.param_dtype).astype(c.dtype)


def router_logits(x_BTD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """(B, T, E) float32, of products in float32: near ties must not be decided by rounding (arXiv:2101.03961, 2.4)."""
    x, router = x_BTD.astype(jnp.float32), router_DE.astype(jnp.float32)
    return jnp.einsum("BTD,DE->BTE", x, router, precision=jax.lax.Precision.HIGHEST)


def route(config: TransformerConfig, probs_BTE: jax.Array, real_BT: jax.Array) -> Routes:
    """The `experts_per_token` experts of the largest p."""
    weights_BTJ, experts_BTJ = find_largest(probs_BTE, config.experts_per_token)
    real_BT1 = real_BT[..., None]
    if config.normalise_router:
        weights_BTJ = weights_BTJ / weights_BTJ.sum(-1, keepdims=True)
    experts_BTJ = jnp.where(real_BT1, experts_BTJ, config.num_experts)
    return Routes(experts_BTJ, jnp.where(real_BT1, weights_BTJ, 0.0))


def find_largest(x_XE: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of the last axis, (..., count) in order, and their indices int32; the lower first among equals.

    As `jax.lax.top_k`, for which XLA gathers the rows of all devices; and its gradient is a product, not a scatter.
    """
    values, indices, left_XE = [], [], jax.lax.stop_gradient(x_XE)
    for _ in range(count):
        index_X = jnp.argmax(left_XE, axis=-1).astype(jnp.int32)
        is_it_XE = jax.nn.one_hot(index_X, x_XE.shape[-1], dtype=bool)
        values.append(jnp.where(is_it_XE, x_XE, 0.0).sum(-1))
        indices.append(index_X)
        left_XE = jnp.where(is_it_XE, -jnp.inf, left_XE)
    return jnp.stack(values, axis=-1), jnp.stack(indices, axis=-1)


def is_chosen(experts_XJ: jax.Array, num_experts: int) -> jax.Array:
    """(..., E) bool: whether the token chose the expert."""
    one_hot_XJE = jax.nn.one_hot(experts_XJ, num_experts, dtype=bool)
    return one_hot_XJE.any(-2)


def feed_forward(
    config: TransformerConfig,
    kernels: Kernels,
    x: jax.Array,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    inner_axes: Axes | None = None,
) -> jax.Array:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))).

    multiply(x, kernels): each row by its expert's. inner_axes: names of what lies between, where XLA is to place it.
    """
    activate = ACTIVATIONS[config.activation]
    hidden = checkpoint_name(multiply(x, kernels.up_EDF), "up")
    if kernels.gate_EDF is None:
        hidden = activate(hidden)
    else:
        hidden = activate(checkpoint_name(multiply(x, kernels.gate_EDF), "gate")) * hidden
    hidden = hidden if inner_axes is None else constrain(hidden, inner_axes)
    return multiply(hidden, kernels.down_EFD)


# --- moving rows to their places and back -----------------------------------------------------------------------------


@jax.custom_vjp
def spread(x_ND: jax.Array, source_S: jax.Array, places_NJ: jax.Array) -> jax.Array:
    """(S, D): at each place the row of x that belongs there, zeros where source is N.

    places_NJ are the places that each row has, S if it has none, so that the gradient is a gather as well: scatters of
    rows are what accelerators are slowest at.
    """
    return jnp.take(x_ND, source_S, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def collect(y_SD: jax.Array, source_S: jax.Array, places_NJ: jax.Array) -> jax.Array:
    """(N, D): the sum of what stands at the places of each row: the transpose of `spread`."""
    rows_NJD = jnp.take(y_SD, places_NJ, axis=0, mode="fill", fill_value=0)
    return rows_NJD.sum(1, dtype=jnp.float32).astype(y_SD.dtype)


spread.defvjp(
    lambda x, source, places: (spread(x, source, places), (source, places)),
    lambda moves, grad: (collect(grad, *moves), None, None),
)
collect.defvjp(
    lambda y, source, places: (collect(y, source, places), (source, places)),
    lambda moves, grad: (spread(grad, *moves), None, None),
)


def spread_weights(weights_NJ: jax.Array, choice_S: jax.Array, places_NJ: jax.Array) -> jax.Array:
    """(S, 1): the weight of the choice (of N J) that stands at each place, 0 where there is none."""
    return spread(weights_NJ.reshape(-1, 1), choice_S, places_NJ.reshape(-1, 1))


def rank_choices(experts_NJ: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """(N, J): how many tokens before this one chose the same expert; and (E,): how many did in all. int32.

    Of a choice of expert E, which there is not, the rank means nothing.
    """
    chosen_NE = is_chosen(experts_NJ, num_experts).astype(jnp.int32)
    until_NE = jnp.cumsum(chosen_NE, axis=0)
    rank_NJ = jnp.take_along_axis(until_NE - chosen_NE, experts_NJ, axis=1, mode="clip")
    return rank_NJ, until_NE[-1]


def choices_at(places_NJ: jax.Array, num_places: int) -> jax.Array:
    """(S,): which of the N J choices stands at each place, N J where none does."""
    choices = places_NJ.size
    nobody_S = jnp.full(num_places, choices, jnp.int32)
    order = jnp.arange(choices, dtype=jnp.int32)
    return nobody_S.at[places_NJ.reshape(-1)].set(order, mode="drop")


# --- with a capacity --------------------------------------------------------------------------------------------------


def capacity(config: TransformerConfig, length: int) -> int:
    """Tokens that one expert takes of a row of `length`; `length` is always enough, as a token chooses it once."""
    c = config
    mean = length * c.experts_per_token / c.num_experts
    return min(length, math.ceil(c.expert_capacity_factor * mean - 1e-9))


def apply_with_capacity(
    config: TransformerConfig,
    x_BTD: jax.Array,
    routes: Routes,
    kernels: Kernels,
) -> tuple[jax.Array, jax.Array]:
    """(y, how many choices of real tokens were dropped).

    Devices of the `expert` axis have some rows of the batch before, and some experts of all their rows in between: the
    constraints around the products make XLA exchange them by all-to-all.
    """
    c, (batch, length, width) = config, x_BTD.shape
    size = capacity(c, length)
    places_BTJ, choice_BS = jax.vmap(functools.partial(find_places, c, size))(routes.experts_BTJ)
    source_BS = choice_BS // c.experts_per_token  # length where there is none
    x_BSD = jax.vmap(spread)(x_BTD, source_BS, places_BTJ)
    x_BECD = constrain(x_BSD.reshape(batch, c.num_experts, size, width), GROUPED)

    multiply = functools.partial(jnp.einsum, "BECD,EDF->BECF")
    y_BECD = constrain(feed_forward(c, kernels, x_BECD, multiply, GROUPED_INNER), GROUPED)
    y_BSD = constrain(y_BECD.reshape(batch, -1, width), ("batch", None, "act_embed"))
    weights_BS1 = jax.vmap(spread_weights)(routes.weights_BTJ, choice_BS, places_BTJ)
    y_BSD = (y_BSD * weights_BS1).astype(y_BSD.dtype)
    is_real_BTJ = routes.experts_BTJ < c.num_experts
    is_dropped = (places_BTJ == c.num_experts * size) & is_real_BTJ
    return jax.vmap(collect)(y_BSD, source_BS, places_BTJ), is_dropped.sum(dtype=jnp.float32)


def find_places(
    config: TransformerConfig, size: int, experts_TJ: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of one row: the place of each choice, (T, J), and the choice (of T J) at each place, (E size,).

    Expert e has the places from e * size on, filled in the order of the row. A choice without a place has E size, a place
    without a choice T J.
    """
    nowhere = config.num_experts * size
    rank_TJ, _ = rank_choices(experts_TJ, config.num_experts)
    has_place_TJ = (rank_TJ < size) & (experts_TJ < config.num_experts)
    places_TJ = jnp.where(has_place_TJ, experts_TJ * size + rank_TJ, nowhere)
    return places_TJ, choices_at(places_TJ, nowhere)


# --- without dropping -------------------------------------------------------------------------------------------------


def apply_to_all(
    config: TransformerConfig, x_BTD: jax.Array, routes: Routes, kernels: Kernels
) -> jax.Array:
    """y (B, T, D) of all choices. Over a mesh each device sorts the tokens that it has.

    Devices of the `expert` axis first gather each other's tokens, then each applies the experts that it has, and the sums
    are scattered back. (Sending each token only to the experts it chose would need room for all of them at each device
    just the same, and an exchange of ragged sizes, which no other backend than TPU has.)
    """
    c, mesh = config, jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return apply_locally(c, x_BTD, routes, kernels, 0)
    rows, length = find_axes("batch", x_BTD.shape[0]), find_axes("length", x_BTD.shape[1])
    experts, inner = find_axes("expert", c.num_experts), find_axes("mlp", c.mlp_dim)
    tokens = PartitionSpec(rows, length)
    wide, narrow = PartitionSpec(experts, None, inner), PartitionSpec(experts, inner, None)
    is_spread = bool(experts) and set(experts) <= set(rows)  # each has tokens of its own

    def apply(x_BTD, routes, kernels):
        if is_spread:
            x_BTD, routes = jax.tree.map(
                lambda x: jax.lax.all_gather(x, experts, tiled=True), (x_BTD, routes)
            )
        first = jax.lax.axis_index(experts) * len(kernels.up_EDF) if experts else 0
        y_BTD = apply_locally(c, x_BTD, routes, kernels, first)
        if is_spread:
            y_BTD = jax.lax.psum_scatter(y_BTD, experts, tiled=True)
        partial = inner if is_spread else inner + experts
        return jax.lax.psum(y_BTD, partial) if partial else y_BTD

    kernel_specs = Kernels(wide, None if kernels.gate_EDF is None else wide, narrow)
    return jax.shard_map(
        apply,
        in_specs=(tokens, Routes(tokens, tokens), kernel_specs),
        out_specs=tokens,
        check_vma=False,
    )(x_BTD, routes, kernels)


def find_axes(name: str, size: int) -> tuple[str, ...]:
    """`spread.mesh_axes`; none if they do not divide `size`.

    (The few rows of a decoder may not be divisible, and its new tokens are one in length.)
    """
    return mesh_axes(name) if size % num_devices(name) == 0 else ()


def apply_locally(
    config: TransformerConfig,
    x_BTD: jax.Array,
    routes: Routes,
    kernels: Kernels,
    first: jax.Array | int,
) -> jax.Array:
    """y (B, T, D) of the experts from `first` on, of which these are the kernels; what others add is left out."""
    c, num_experts = config, len(kernels.up_EDF)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    experts_NJ, weights_NJ = (x.reshape(len(x_ND), -1) for x in routes)
    experts_NJ = experts_NJ - first
    is_here_NJ = (experts_NJ >= 0) & (experts_NJ < num_experts)
    experts_NJ = jnp.where(is_here_NJ, experts_NJ, num_experts)
    rank_NJ, sizes_E = rank_choices(experts_NJ, num_experts)
    start_E = jnp.cumsum(sizes_E) - sizes_E
    rows = experts_NJ.size
    places_NJ = jnp.where(is_here_NJ, start_E[experts_NJ] + rank_NJ, rows)
    choice_S = choices_at(places_NJ, rows)
    source_S = choice_S // c.experts_per_token

    x_SD = spread(x_ND, source_S, places_NJ)
    y_SD = feed_forward(c, kernels, x_SD, lambda x, w: grouped_matmul(x, w, sizes_E))
    y_SD = (y_SD * spread_weights(weights_NJ, choice_S, places_NJ)).astype(y_SD.dtype)
    return collect(y_SD, source_S, places_NJ).reshape(x_BTD.shape)


# --- losses of the router ---------------------------------------------------------------------------------------------


def auxiliary(config: TransformerConfig, sums: RouterSums) -> Auxiliary:
    """The router's losses and metrics, means over the layers (sums have them on leading axes).

    balance: E sum_e f_e P_e, f_e the share of all choices that fell on expert e, P_e the mean of its p (arXiv:2101.03961,
      eq. 4 to 6, for J choices divided by J): 1 if all are used alike, up to E.
    z: the mean of logsumexp(logits)^2 (arXiv:2202.08906, eq. 5).
    dropped_share: of all choices. max_load: the most used expert's share of the choices times E, 1 to E.
    loss: router_aux_weight * balance + router_z_weight * z.

    Real tokens of the whole (micro-)batch count, over all devices. f P is no mean over tokens: accumulation takes the
    mean over micro-batches, which is not the same, and is the declared exception.
    """
    c, experts = config, config.num_experts
    tokens = jnp.maximum(sums.tokens, 1.0)
    shares_E = sums.chosen_E / (c.experts_per_token * tokens[..., None])
    balance = experts * (shares_E * sums.probs_E / tokens[..., None]).sum(-1).mean()
    z = (sums.z / tokens).mean()
    loss = c.router_aux_weight * balance + c.router_z_weight * z
    one, max_load = jnp.float32(1), experts * shares_E.max(-1).mean()
    metrics = {
        "router_balance": (balance, one),
        "router_z": (sums.z.sum(), sums.tokens.sum()),
        "dropped_share": (sums.dropped.sum(), c.experts_per_token * sums.tokens.sum()),
        "max_load": (max_load, one),
    }
    return Auxiliary(loss, jax.lax.stop_gradient(metrics))
