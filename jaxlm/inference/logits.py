"""Logits from a model's outputs, which hold only their two factors."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.models.layers import Outputs, apply_softcap


def unembed(outputs: Outputs, hidden_BMD: jax.Array, num_ids: int | None = None) -> jax.Array:
    """Float32 logits (B, M, V) of hidden vectors of `outputs`.

    num_ids: the tokenizer's; a padded vocabulary has rows past it, which stand for nothing. None = all.
    """
    assert outputs.unembed is not None
    table_VD = outputs.unembed[:num_ids].astype(hidden_BMD.dtype)
    # The large factor first, or XLA:CPU takes twice as long for the few rows of a decoding step.
    logits_VBM = jax.lax.dot_general(
        table_VD, hidden_BMD, (((1,), (2,)), ((), ())), preferred_element_type=jnp.float32
    )
    logits = logits_VBM.transpose(1, 2, 0)
    if outputs.unembed_bias is not None:
        logits = logits + outputs.unembed_bias[:num_ids].astype(jnp.float32)[None, None]
    return apply_softcap(logits, outputs.softcap)
