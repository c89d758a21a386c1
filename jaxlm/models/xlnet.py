"""XLNet: two-stream attention over relative positions, for predictions in any order (arXiv:1906.08237).

The content stream is an encoder whose places see themselves and what comes before them in an order; the query stream
stands at the places to predict, knows where it is and what comes before it, but not the token there (section 2.3):

    tokens           the  cat  sat  on  mats          order 1: sat, order 2: cat, the others are context (0)
    order             0    2    1   0    0
    content of cat    x    x    x   x    x
    query at cat      x    .    x   x    x
    content of sat    x    .    x   x    x
    query at sat      x    .    .   x    x
    content of the    x    .    .   x    x

Both streams have the same parameters, so they go through the layers as one array (B, Q, D): T places of content, then M
queries; only content is attended to. Places are told apart by how far they are from each other (Transformer-XL,
arXiv:1901.02860, section 3.3): a score is (q + u) k + (q + v) r(distance), with r of a sinusoid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.models.attention import MASKED, Attention, is_unrolled
from jaxlm.models.config import TransformerConfig, unlike
from jaxlm.models.gpt import make_unembed
from jaxlm.models.heads import Head
from jaxlm.models.layers import LOOKED_AT, Outputs, constrain, dropout, dropout_key, make_param
from jaxlm.models.transformer import MLP, Embed, batch_positions, make_norm, rematerialised

to_float32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

# What XLNet always has; its config may not say otherwise.
ALWAYS = dict(
    norm_position="post",
    position="none",
    attention_windows=(),
    query_scale=0.0,
    qk_norm=False,
    qkv_bias=False,
    embed_factor_dim=0,
    share_layers=False,
    num_experts=0,
    num_token_types=0,
    attention_softcap=0.0,
    embed_norm=False,
    logit_scale=0.0,
)


class XLNet(nn.Module):
    """Predictions at chosen places from what comes before them in an order, or hidden states of all places.

    batch: tokens (B, T); optionally segment_ids, token_types (B, T); masked_positions (B, M): where the query stream
    predicts; order (B, T): 0 for context, and another number from 1 on for each place to predict. Without an order each
    place is predicted from context alone, so that the tokens at these places do not matter.
    Returns Outputs with hidden (B, M, D) of the query stream, or without masked_positions hidden (B, T, D) of the content
    stream, which then sees its whole segment. With a `head` of a task there are no others: hidden is the content stream's.

    Token types tell only whether two places have the same one (section 2.5). max_len is no limit of the parameters.
    """

    config: TransformerConfig
    head: Head | None = None

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], deterministic: bool = True) -> Outputs:
        c = self.config
        check_options(c)
        segment_ids, positions = batch_positions(batch)
        embed = Embed(c, deterministic=deterministic, name="embed")
        h_BTD, table_VD = embed(batch["tokens"], positions, None)
        places = None if self.head is not None else batch.get("masked_positions")
        order = find_order(batch, places)
        sight = make_sight(c, segment_ids, batch.get("token_types"), order, places)
        init = nn.initializers.normal(c.init_std)
        start_D = make_param(self, "mask_embedding", init, (c.emb_dim,), ("norm",), c.param_dtype)
        x_BQD = h_BTD if places is None else add_queries(h_BTD, start_D, places.shape[1])
        loop = nn.scan(
            rematerialised(XLNetBlock, c),
            variable_axes={"params": 0, LOOKED_AT: 0},
            split_rngs={"params": True, "dropout": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
            in_axes=(nn.broadcast,),
            length=c.num_layers,
            unroll=c.unroll or c.num_layers,
        )
        x_BQD, _ = loop(c, deterministic, name="layers")(x_BQD, sight)
        if self.head is not None:
            return Outputs(x_BQD, None, head_logits=self.head(x_BQD, batch, deterministic))
        bias_V = VocabBias(c, name="mlm_head")()
        hidden = x_BQD if places is None else x_BQD[:, h_BTD.shape[1] :]
        return Outputs(
            hidden, make_unembed(self, c, table_VD), unembed_bias=bias_V, softcap=c.final_softcap
        )


def add_queries(h_BTD: jax.Array, start_D: jax.Array, count: int) -> jax.Array:
    """Content, and after it `count` queries a row that all start as the same vector: (B, T + M, D)."""
    shape = (len(h_BTD), count, h_BTD.shape[-1])
    g_BMD = jnp.broadcast_to(start_D.astype(h_BTD.dtype)[None, None], shape)
    return constrain(jnp.concatenate([h_BTD, g_BMD], axis=1), ("batch", None, "act_embed"))


class VocabBias(nn.Module):
    """The output bias (V,): all that XLNet's head has besides the table."""

    config: TransformerConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        c, zeros = self.config, nn.initializers.zeros
        return make_param(self, "vocab_bias", zeros, (c.vocab_size,), ("vocab",), c.param_dtype)


def check_options(config: TransformerConfig) -> None:
    """Raises ValueError that lists every option that XLNet does not have."""
    problems = unlike(config, ALWAYS)
    if config.num_kv_heads != config.num_heads:
        problems.append(f"num_kv_heads={config.num_kv_heads}: set it to {config.num_heads}")
    if config.emb_dim % 2:
        problems.append(f"emb_dim={config.emb_dim}: sinusoidal distances need an even one")
    if problems:
        raise ValueError("XLNet:\n  " + "\n  ".join(problems))


# --- who sees whom ----------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Sight:
    """What the T places of content, then the M queries, see; the same for all layers.

    mask_BQS: True = attend. same_BQS: has the same token type, or None where there are none.
    distances_RD: the sinusoids of T, T - 1, …, 1 - T places from key to query. places_BM: of the queries, or None.
    """

    mask_BQS: jax.Array
    distances_RD: jax.Array
    same_BQS: jax.Array | None = None
    places_BM: jax.Array | None = None


def find_order(batch: Mapping[str, jax.Array], places_BM: jax.Array | None) -> jax.Array:
    """The batch's order (B, T), or 1 at the places to predict and 0 elsewhere; 0 everywhere if there are none."""
    tokens = batch["tokens"]
    if places_BM is None:
        return jnp.zeros_like(tokens)
    if "order" in batch:
        return batch["order"]
    # Places are in order, so a 0 that is not the first one fills up a row with fewer of them.
    slot_BM = jax.lax.broadcasted_iota(jnp.int32, places_BM.shape, 1)
    places_BM = jnp.where((places_BM > 0) | (slot_BM == 0), places_BM, tokens.shape[1])
    rows_B1 = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros_like(tokens).at[rows_B1, places_BM].set(1, mode="drop")


def make_sight(
    config: TransformerConfig,
    segment_ids_BT: jax.Array,
    token_types_BT: jax.Array | None,
    order_BT: jax.Array,
    places_BM: jax.Array | None,
) -> Sight:
    """Content sees what is not later in the order, in its own segment; queries what is earlier (section 2.3, eq. 3)."""

    def with_queries(x_BT):
        if places_BM is None:
            return x_BT
        return jnp.concatenate([x_BT, jnp.take_along_axis(x_BT, places_BM, axis=1)], axis=1)

    length = segment_ids_BT.shape[1]
    seen_BQ = see_up_to(with_queries(order_BT), length)
    mask_BQS = order_BT[:, None, :] <= seen_BQ[:, :, None]
    mask_BQS &= equal(with_queries(segment_ids_BT), segment_ids_BT)
    types = token_types_BT
    return Sight(
        mask_BQS=constrain(mask_BQS, ("batch", None, "kv_length")),
        distances_RD=distance_table(length, config.emb_dim).astype(config.dtype),
        same_BQS=None if types is None else equal(with_queries(types), types),
        places_BM=places_BM,
    )


def see_up_to(order_BQ: jax.Array, length: int) -> jax.Array:
    """(B, Q): the last of the order that each place sees: content its own, queries the one before."""
    is_query_Q = jnp.arange(order_BQ.shape[1]) >= length
    return order_BQ - is_query_Q[None].astype(order_BQ.dtype)


def equal(a_BQ: jax.Array, b_BS: jax.Array) -> jax.Array:
    """bool (B, Q, S): where a (B, Q) and b (B, S) are alike."""
    return a_BQ[:, :, None] == b_BS[:, None, :]


def distance_table(length: int, width: int) -> jax.Array:
    """Sines, then cosines, (2 T, width) float32, of the distances T, T - 1, …, 1 - T (arXiv:1901.02860, section 3.3)."""
    distance_R = jnp.arange(length, -length, -1, dtype=jnp.float32)
    frequency_h = jnp.exp(-math.log(10000.0) * jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = distance_R[:, None] * frequency_h[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def align(scores_BNQR: jax.Array, length: int, places_BM: jax.Array | None) -> jax.Array:
    """From scores of distances, as in `distance_table`, to scores of keys: (B, N, Q, S).

        T = 3, distances   3 2 1 0 -1 -2        of content    keys 0 1 2
        a query at 0             x  x  x        as rows that      0 -1 -2
        a query at 1          x  x  x           begin one         1  0 -1
        a query at 2       x  x  x              earlier each      2  1  0

    Content is cut out of the rows written one after the other, without a gather; queries are anywhere, so each has its own
    slice.
    """
    batch, heads, _, width = scores_BNQR.shape
    content = scores_BNQR[:, :, :length].reshape(batch, heads, width, length)[:, :, 1:]
    content = content.reshape(batch, heads, length, width - 1)[..., :length]
    if places_BM is None:
        return content
    cut = lambda row_NR, place: jax.lax.dynamic_slice_in_dim(row_NR, length - place, length, -1)
    queries = jax.vmap(jax.vmap(cut, (1, 0), 1))(scores_BNQR[:, :, length:], places_BM)
    return jnp.concatenate([content, queries], axis=2)


# --- layers -----------------------------------------------------------------------------------------------------------


class XLNetBlock(nn.Module):
    """One post-norm layer; returns what a scan wants."""

    config: TransformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BQD: jax.Array, sight: Sight) -> tuple[jax.Array, None]:
        c = self.config
        attended = RelativeAttention(c, self.deterministic, name="attention")(x_BQD, sight)
        x = make_norm(c, "attention_norm")(x_BQD + self.drop(attended))
        x = make_norm(c, "mlp_norm")(x + self.drop(MLP(c, name="mlp")(x)))
        names = ("batch", "length" if sight.places_BM is None else None, "act_embed")
        x = constrain(x, names)
        self.sow(LOOKED_AT, "hidden", x)
        return x, None

    def drop(self, x: jax.Array) -> jax.Array:
        """Dropout at the config's rate, the shape kept."""
        rate = self.config.dropout_rate
        return dropout(x, rate, dropout_key(self, rate, self.deterministic))


class RelativeAttention(Attention):
    """Attention to the content stream with Transformer-XL's relative positions and relative token types.

    Scores are ((q + content_bias) k + (q + position_bias) r + (q + segment_bias) s) / sqrt(H): r by distance, and s by
    whether query and key have the same token type (segment[0]) or not (segment[1]). No fused kernel has such scores.
    """

    @nn.compact
    def __call__(self, x_BQD: jax.Array, sight: Sight) -> jax.Array:  # type: ignore[override]
        c, length = self.config, sight.mask_BQS.shape[-1]
        query = self.project("query", x_BQD, c.num_heads, "heads")
        key, value = (
            self.project(x, x_BQD[:, :length], c.num_heads, "kv") for x in ("key", "value")
        )
        key, value = self.gather(key, value)
        distance = self.project("position", sight.distances_RD[None], c.num_heads, "heads")[0]
        biases = [self.vector(f"{name}_bias") for name in ("content", "position", "segment")]
        rate, kept = c.attention_dropout_rate, None
        if (rng := dropout_key(self, rate, self.deterministic)) is not None:
            shape = (len(query), c.num_heads, *sight.mask_BQS.shape[1:])
            kept = dropout(jnp.ones(shape, jnp.float32), rate, rng)
        attend = attend_relative
        if c.remat == "attention":
            attend = jax.checkpoint(attend, prevent_cse=is_unrolled(c))
        scored = (query, key, distance, biases, self.vector("segment", 2), sight)
        if self.is_mutable_collection(LOOKED_AT):
            self.sow(LOOKED_AT, "probs", relative_probs(*scored))
        out = attend(value, kept, *scored)
        return self.merge(constrain(out, ("batch", None, "act_heads", None)))

    def vector(self, name: str, *leading: int) -> jax.Array:
        """A parameter (…, N, H)."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        shape, axes = (
            (*leading, c.num_heads, c.head_dim),
            (*[None] * len(leading), "heads", "head_dim"),
        )
        return make_param(self, name, init, shape, axes, c.param_dtype).astype(c.dtype)


def attend_relative(value_BSNH: jax.Array, kept_BNQS: jax.Array | None, *scored: Any) -> jax.Array:
    """`relative_probs` of `scored` times the values: (B, Q, N, H). kept: multiplies the probabilities (dropout), or None."""
    probs = relative_probs(*scored)
    probs = probs if kept_BNQS is None else probs * kept_BNQS
    out = to_float32("BNQS,BSNH->BQNH", probs.astype(value_BSNH.dtype), value_BSNH)
    return out.astype(value_BSNH.dtype)


def relative_probs(
    query_BQNH: jax.Array,
    key_BSNH: jax.Array,
    distance_RNH: jax.Array,
    biases: list[jax.Array],
    segment_2NH: jax.Array,
    sight: Sight,
) -> jax.Array:
    """softmax of the three scores (see `RelativeAttention`), (B, N, Q, S), float32. biases: of content, positions and segments,
    each (N, H)."""
    for_content, for_position, for_segment = (query_BQNH + bias[None, None] for bias in biases)
    scores = to_float32("BQNH,BSNH->BNQS", for_content, key_BSNH)
    of_distance = to_float32("BQNH,RNH->BNQR", for_position, distance_RNH)
    scores += align(of_distance, key_BSNH.shape[1], sight.places_BM)
    if sight.same_BQS is not None:
        of_type = to_float32("BQNH,CNH->CBNQ", for_segment, segment_2NH)[..., None]
        scores += jnp.where(sight.same_BQS[:, None], of_type[0], of_type[1])
    scores = scores / math.sqrt(query_BQNH.shape[-1])
    return jax.nn.softmax(jnp.where(sight.mask_BQS[:, None], scores, MASKED), axis=-1)
