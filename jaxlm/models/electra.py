"""ELECTRA: a small generator fills masked places, and the model learns which tokens it replaced (arXiv:2003.10555).

    labels, masks    the  [MASK]  sat  on  the  [MASK]
    generator        the    dog   sat  on  the    mat      sampled from its masked-token head
    discriminator     0      1     0    0   0      0       was this token replaced?

What serves afterwards is the discriminator, whose parameters have BERT's names: `embed`, `layers`, and the head
`rtd_head`. The generator's lie under `generator`, but for the embeddings, which both have in common.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.models.config import TransformerConfig, unlike
from jaxlm.models.heads import HEADS, MLMHead, gather_positions
from jaxlm.models.layers import Outputs, apply_softcap, constrain
from jaxlm.models.transformer import Dense, Embed, apply_layers, batch_positions
from jaxlm.spread import num_devices

# What ELECTRA always has; its config may not say otherwise.
ALWAYS = dict(tie_embeddings=True, logit_scale=0.0)
# float32 logits that one device may hold at a time when tokens are sampled (128 MB).
LOGITS_PER_DEVICE = 2**25


class ELECTRA(nn.Module):
    """Generator and discriminator over shared embeddings.

    batch: as BERT's, with masked_positions (B, M), and for the discriminator `labels` and `weights` (B, M): the tokens
    that were masked, and 0 at slots that are not used. Without labels the generator alone predicts.
    Returns Outputs with the generator's hidden (B, M, table_dim), unembed and bias; head_logits (B, T, 1) of the
    discriminator, and head_labels (B, T), 1 where a token is not the original one.

    config: the discriminator's. width, depth: the share of its heads, width and MLP, and of its layers, that the
    generator has (section 3.2: a quarter to a half of the width works best).
    Sampling draws from the 'dropout' rng in training. Else the draws are a function of the row's tokens, so that an
    evaluation gives the same numbers however rows are put into batches.
    """

    config: TransformerConfig
    width: float = 0.25
    depth: float = 1.0

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], deterministic: bool = True) -> Outputs:
        c = self.config
        segment_ids, positions = batch_positions(batch)
        embed = Embed(c, use_norm=True, deterministic=deterministic, name="embed")
        types = batch.get("token_types")
        x_BTE, table_VE = embed(batch["tokens"], positions, types, projected=False)
        generator = Generator(generator_config(c, self.width, self.depth), name="generator")
        hidden, bias_V = generator(x_BTE, batch, segment_ids, positions, deterministic)
        outputs = Outputs(hidden, table_VE, bias_V, softcap=c.final_softcap)
        if "labels" not in batch and not self.is_initializing():
            return outputs
        tokens, replaced = self.replace(batch, outputs, deterministic)
        x_BTD, _ = embed(tokens, positions, types)
        x_BTD, _, auxiliary = apply_layers(
            c, x_BTD, segment_ids, positions, causal=False, deterministic=deterministic
        )
        head = HEADS["replaced_token_detection"](c, name="rtd_head")
        logits = head(x_BTD, batch, deterministic)
        return outputs.replace(head_logits=logits, head_labels=replaced, auxiliary=auxiliary)

    def replace(
        self, batch: Mapping[str, jax.Array], outputs: Outputs, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """(tokens (B, T) with the generator's in the masked places, (B, T) int32: is not the original)."""
        tokens = batch["tokens"]
        if "labels" not in batch:  # parameters do not depend on it
            return tokens, jnp.zeros_like(tokens)
        rng = None if deterministic else self.make_rng("dropout")
        sampled_BM = sample_tokens(outputs, row_keys(tokens, rng))
        return fill(tokens, batch, sampled_BM)


class Generator(nn.Module):
    """The masked language model: from embedded tokens (B, T, table_dim) to the factors of its logits."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x_BTE: jax.Array,
        batch: Mapping[str, jax.Array],
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """(hidden (B, M, table_dim) or (B, T, table_dim), output bias (V,))."""
        c, x = self.config, x_BTE
        if c.emb_dim != c.table_dim:
            x = Dense(c, c.emb_dim, name="projection")(x)
            x = constrain(x, ("batch", "length", "act_embed"))
        x, _, _ = apply_layers(
            c, x, segment_ids_BT, positions_BT, causal=False, deterministic=deterministic
        )
        if "masked_positions" in batch:
            x = gather_positions(x, batch["masked_positions"])
        return MLMHead(c, name="mlm_head")(constrain(x, ("batch", None, "act_embed")))


def generator_config(config: TransformerConfig, width: float, depth: float) -> TransformerConfig:
    """The generator's: heads as wide as the discriminator's, but fewer; tables as wide as the shared ones.

    Raises:
      ValueError: if a share is not in (0, 1], or for options that ELECTRA does not have.
    """
    c = config
    wrong = [
        f"generator.{name}={share}: expected over 0 and at most 1"
        for name, share in (("width", width), ("depth", depth))
        if not 0 < share <= 1
    ]
    if wrong := [*wrong, *unlike(c, ALWAYS)]:
        raise ValueError("ELECTRA:\n  " + "\n  ".join(wrong))
    share = lambda size: max(1, round(width * size))
    heads, layers = share(c.num_heads), max(1, round(depth * c.num_layers))
    return dataclasses.replace(
        c,
        emb_dim=share(c.emb_dim),
        embed_factor_dim=c.table_dim,
        num_heads=heads,
        num_kv_heads=heads if c.num_kv_heads == c.num_heads else math.gcd(heads, c.num_kv_heads),
        mlp_dim=share(c.mlp_dim),
        num_layers=layers,
        unroll=min(c.unroll, layers),
        attention_windows=c.attention_windows[:layers],
        **(NO_EXPERTS if c.num_experts else {}),
    )


NO_EXPERTS = dict(
    num_experts=0, expert_capacity_factor=0.0, router_aux_weight=0.0, router_z_weight=0.0
)


def row_keys(tokens_BT: jax.Array, rng: jax.Array | None) -> jax.Array:
    """A key for each row (B,): split from `rng`, or without one made of the row's tokens."""
    if rng is not None:
        return jax.random.split(rng, tokens_BT.shape[0])
    places = jax.lax.broadcasted_iota(jnp.uint32, tokens_BT.shape, 1)
    hashed = (tokens_BT.astype(jnp.uint32) + 1) * (2 * places + 1) * jnp.uint32(2654435761)
    checksums = hashed.sum(1, dtype=jnp.uint32)  # all of it modulo 2^32
    return jax.vmap(lambda sum: jax.random.fold_in(jax.random.key(0), sum))(checksums)


def sample_tokens(outputs: Outputs, keys_B: jax.Array) -> jax.Array:
    """Ids (B, M) int32 drawn from softmax of the logits, a few places of all rows at a time; without a gradient.

    By Gumbel's trick: the largest of logits plus noise. The noise of a place is that of its row's key and its number.
    """
    hidden, table, bias = jax.lax.stop_gradient(
        (outputs.hidden, outputs.unembed, outputs.unembed_bias)
    )
    compute_VE = table.astype(hidden.dtype)

    def sample(place):
        hidden_BE, number = place
        logits_BV = jnp.einsum(
            "be,ve->bv", hidden_BE, compute_VE, preferred_element_type=jnp.float32
        )
        logits_BV = logits_BV if bias is None else logits_BV + bias[None].astype(jnp.float32)
        logits_BV = apply_softcap(logits_BV, outputs.softcap)
        draw = lambda key: jax.random.gumbel(jax.random.fold_in(key, number), bias_shape)
        return jnp.argmax(logits_BV + jax.vmap(draw)(keys_B), axis=-1).astype(jnp.int32)

    bias_shape = table.shape[:1]
    rows = -(-hidden.shape[0] // num_devices("batch"))
    at_once = max(1, LOGITS_PER_DEVICE // (rows * table.shape[0]))
    places = (hidden.swapaxes(0, 1), jnp.arange(hidden.shape[1]))
    if at_once >= hidden.shape[1]:
        return jax.vmap(sample)(places).swapaxes(0, 1)
    return jax.lax.map(sample, places, batch_size=at_once).swapaxes(0, 1)


def fill(
    tokens_BT: jax.Array, batch: Mapping[str, jax.Array], sampled_BM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(tokens with `sampled` at the masked places, int32: differs from the original), each (B, T).

    A place where the generator hits the original counts as original (section 3.1). Slots of weight 0 change nothing.
    """
    length = tokens_BT.shape[1]
    places_BM = jnp.where(batch["weights"] > 0, batch["masked_positions"], length)
    rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    put = lambda x_BT, values: x_BT.at[rows_B1, places_BM].set(values, mode="drop")
    replaced_BM = (sampled_BM != batch["labels"]).astype(jnp.int32)
    return put(tokens_BT, sampled_BM), put(jnp.zeros_like(tokens_BT), replaced_BM)
