"""Encoder-decoder: the Transformer of Vaswani et al. 2017, BART, T5, and what lies between, by options."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.models.cache import KVCache
from jaxlm.models.config import TransformerConfig
from jaxlm.models.gpt import make_unembed, scale_logits
from jaxlm.models.heads import Head
from jaxlm.models.layers import Auxiliary, Outputs
from jaxlm.models.transformer import Embed, apply_layers, batch_positions, make_token_table

ENCODER = "encoder_"  # what the encoder's part of a batch is prefixed with


class EncoderDecoder(nn.Module):
    """The encoder's places see their whole segment; the decoder's see it, and themselves and what comes before in theirs.

        encoder_tokens        a  b  c  x  y  .         tokens        S  A  B  S  X
        encoder_segment_ids   1  1  1  2  2  0         segment_ids   1  1  1  2  2

    batch: encoder_tokens (B, S) and tokens (B, T), each optionally with segment_ids and positions; S is the start id.
    Both streams share one token table (arXiv:1706.03762, section 3.4); positions, norms and biases are each stack's own.
    Returns Outputs with hidden (B, T, D): hidden[:, t] predicts the token after t.
    With a `head` of a task the encoder alone reads `tokens` (arXiv:2108.08877, section 3.2): there are no decoder and no
    unembed, and head_logits are the head's.

    With a `cache` (`make_cache(config, B, size, S)`) text is made: the first call, which has encoder_tokens, runs the
    encoder and puts what the decoder wants of it into the cache; later ones have the decoder's next tokens alone.
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
        c, source, routed = self.config, None, None
        table_VD = TokenTable(c, name="embed")()
        if self.head is not None:
            encoder = Stack(c, False, deterministic, name="encoder")
            hidden, _, auxiliary = encoder(batch, table_VD)
            logits = self.head(hidden, batch, deterministic)
            return Outputs(hidden, None, head_logits=logits, auxiliary=auxiliary)
        check_inputs(c, batch, cache)
        if ENCODER + "tokens" in batch:
            prefix = len(ENCODER)
            inputs = {k[prefix:]: x for k, x in batch.items() if k.startswith(ENCODER)}
            encoder = Stack(c, False, deterministic, name="encoder")
            encoded, _, routed = encoder(inputs, table_VD)
            source = encoded, batch_positions(inputs)[0]
        decoder = Stack(c.decoder, True, deterministic, name="decoder")
        hidden, cache, auxiliary = decoder(batch, table_VD, cache, source)
        return Outputs(
            hidden=scale_logits(c, hidden),
            unembed=make_unembed(self, c, table_VD),
            cache=cache,
            auxiliary=add_auxiliary(routed, auxiliary),
            softcap=c.final_softcap,
        )


class TokenTable(nn.Module):
    """The token table (V, D) that several streams read."""

    config: TransformerConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        return make_token_table(self, self.config)


class Stack(nn.Module):
    """The embeddings and layers of one stream: (x (B, T, D), cache, auxiliary) as `apply_layers` gives them."""

    config: TransformerConfig
    causal: bool
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        table_VD: jax.Array,
        cache: KVCache | None = None,
        source: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, KVCache | None, Auxiliary | None]:
        c = self.config
        segment_ids, positions = batch_positions(batch, cache)
        embed = Embed(c, c.embed_norm, self.deterministic, name="embed")
        x_BTD, _ = embed(batch["tokens"], positions, batch.get("token_types"), table_VD)
        return apply_layers(
            c,
            x_BTD,
            segment_ids,
            positions,
            causal=self.causal,
            deterministic=self.deterministic,
            cache=cache,
            source=source,
        )


def check_inputs(config: TransformerConfig, batch: Mapping, cache: KVCache | None) -> None:
    """Raises ValueError for what would otherwise be found deep inside, or not at all."""
    if config.embed_factor_dim:
        raise ValueError(
            f"embed_factor_dim={config.embed_factor_dim}: an encoder-decoder's output table is as wide as its layers; "
            "set it to 0"
        )
    if cache is None and ENCODER + "tokens" not in batch:
        raise ValueError(
            f"the batch has {sorted(batch)}: an encoder-decoder also reads encoder_tokens (B, S); add them, or give "
            "the cache of an earlier call that had them"
        )
    if cache is not None and cache.memory is None:
        raise ValueError(
            "a cache without memory: make it by make_cache(config, rows, size, source_len), with the encoder's length"
        )


def add_auxiliary(first: Auxiliary | None, second: Auxiliary | None) -> Auxiliary | None:
    """What the routers of both stacks add to the loss; their metrics are means over both."""
    if first is None or second is None:
        return second
    return jax.tree.map(jnp.add, first, second)
