"""Decoder-only language model: GPT-2 and GPT-3, Llama, Mistral, Qwen, Gemma, and what lies between, by options."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.models.cache import KVCache
from jaxlm.models.config import TransformerConfig
from jaxlm.models.heads import Head
from jaxlm.models.layers import Outputs, make_param
from jaxlm.models.transformer import Embed, apply_layers, batch_positions


class GPT(nn.Module):
    """Each position sees itself and what comes before it in its own segment.

    batch: tokens (B, T), and optionally segment_ids and positions (B, T), and is_prefix (B, T), bool: the places of a
      segment's prefix see one another, too (prefix LM).
    Returns Outputs with hidden (B, T, D): hidden[:, t] predicts the token after t. With a `head` of a task there is no
    unembed, and head_logits are the head's.
    With a `cache` (`cache.make_cache`) each position also sees its segment in there; tokens are padded on the left, by
    segment_ids 0, and the cache with them in it is in Outputs. The caller sees to it that there is room for T more.
    """

    config: TransformerConfig
    head: Head | None = None

    @nn.compact
    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        deterministic: bool = True,
        cache: KVCache | None = None,
    ) -> Outputs:
        c = self.config
        if c.embed_factor_dim:
            raise ValueError(
                f"embed_factor_dim={c.embed_factor_dim}: only the encoder's output transform leads back to that "
                "width; set it to 0"
            )
        segment_ids, positions = batch_positions(batch, cache)
        embed = Embed(c, c.embed_norm, deterministic, name="embed")
        x_BTD, table_VD = embed(batch["tokens"], positions, batch.get("token_types"))
        hidden, cache, auxiliary = apply_layers(
            c,
            x_BTD,
            segment_ids,
            positions,
            causal=True,
            deterministic=deterministic,
            cache=cache,
            is_prefix_BT=batch.get("is_prefix"),
        )
        if self.head is not None:
            logits = self.head(hidden, batch, deterministic)
            return Outputs(hidden, None, head_logits=logits, auxiliary=auxiliary)
        return Outputs(
            hidden=scale_logits(c, hidden),
            unembed=make_unembed(self, c, table_VD),
            cache=cache,
            auxiliary=auxiliary,
            softcap=c.final_softcap,
        )


def scale_logits(config: TransformerConfig, hidden: jax.Array) -> jax.Array:
    """Hidden states (..., D) whose products with the output table are logit_scale times as large."""
    scale = config.logit_scale
    return hidden * jnp.asarray(scale, hidden.dtype) if scale else hidden


def make_unembed(module: nn.Module, config: TransformerConfig, table_VD: jax.Array) -> jax.Array:
    """The output table (V, D): the embedding itself if tied, else the parameter `unembed`."""
    if config.tie_embeddings:
        return table_VD
    init = nn.initializers.normal(config.init_std)
    return make_param(
        module, "unembed", init, table_VD.shape, ("vocab", "embed"), config.param_dtype
    )
