"""Encoder with a masked-token head: BERT, RoBERTa, and by options ELECTRA's parts, ALBERT and ModernBERT."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.models.config import TransformerConfig
from jaxlm.models.gpt import make_unembed, scale_logits
from jaxlm.models.heads import Head, MLMHead, gather_positions, pool_first
from jaxlm.models.layers import Outputs, constrain
from jaxlm.models.transformer import Dense, Embed, apply_layers, batch_positions


class BERT(nn.Module):
    """Each position sees its whole segment.

    batch: tokens (B, T); optionally segment_ids, positions, token_types (B, T);
    masked_positions (B, M): predict there only, so that no larger hidden or logits array is ever made, else everywhere;
    example_positions (B, E): where the pair head reads ([CLS]), position 0 if absent.
    Returns Outputs with hidden (B, M, D) or (B, T, D), and pair_logits (B, E, num_pair_classes) if that is not 0.
    With a `head` of a task there are no others: hidden is (B, T, D), and head_logits are the head's.
    """

    config: TransformerConfig
    num_pair_classes: int = 0
    head: Head | None = None

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], deterministic: bool = True) -> Outputs:
        c = self.config
        segment_ids, positions = batch_positions(batch)
        embed = Embed(c, use_norm=True, deterministic=deterministic, name="embed")
        x_BTD, table_VD = embed(batch["tokens"], positions, batch.get("token_types"))
        x_BTD, _, auxiliary = apply_layers(
            c, x_BTD, segment_ids, positions, causal=False, deterministic=deterministic
        )
        if self.head is not None:
            logits = self.head(x_BTD, batch, deterministic)
            return Outputs(x_BTD, None, head_logits=logits, auxiliary=auxiliary)
        x_BMD = x_BTD
        if "masked_positions" in batch:
            x_BMD = gather_positions(x_BTD, batch["masked_positions"])
        hidden, vocab_bias = MLMHead(c, name="mlm_head")(
            constrain(x_BMD, ("batch", None, "act_embed"))
        )
        return Outputs(
            hidden=scale_logits(c, hidden),
            unembed=make_unembed(self, c, table_VD),
            unembed_bias=vocab_bias,
            pair_logits=self.classify_pairs(x_BTD, batch) if self.num_pair_classes else None,
            auxiliary=auxiliary,
            softcap=c.final_softcap,
        )

    def classify_pairs(self, x_BTD: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Float32 logits (B, E, C) from tanh-pooled [CLS] vectors."""
        c = self.config
        pooled = jnp.tanh(Dense(c, c.emb_dim, name="pooler")(pool_first(x_BTD, batch)))
        logits = Dense(c, self.num_pair_classes, name="pair_head")(pooled)
        return logits.astype(jnp.float32)
