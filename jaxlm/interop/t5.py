"""T5 1.0 and 1.1, and what was made of them (Flan-T5): transformers' `t5`.

    encoder.block.{layer}   layer.0 self-attention            layer.1 MLP
    decoder.block.{layer}   layer.0 self-attention   layer.1 cross-attention   layer.2 MLP

The biases of relative positions lie in the first block's self-attention and serve all blocks of their stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.interop.mapping import Architecture, Family, Field, Row, linear
from jaxlm.models.config import TransformerConfig

ENCODER, DECODER = "encoder.block.{layer}.", "decoder.block.{layer}."
ENCODER_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
DECODER_BIAS = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
# feed_forward_proj -> (ours, dense_act_fn, which a config.json of transformers 5 repeats it as)
ACTIVATIONS = {
    "relu": ("relu", "relu"),
    "gelu": ("gelu", "gelu"),
    "gated-gelu": ("geglu_tanh", "gelu_new"),
    "gated-silu": ("swiglu", "silu"),
}


def attention_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """The rows of an attention: four matrices without biases."""
    return (
        Row(f"{ours}/query", f"{theirs}.q.weight", linear()),
        Row(f"{ours}/key", f"{theirs}.k.weight", linear()),
        Row(f"{ours}/value", f"{theirs}.v.weight", linear()),
        Row(f"{ours}/out", f"{theirs}.o.weight", linear(2)),
    )


def mlp_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """wi, or with a gate wi_0 and wi_1."""
    gate = f"{ours}/gate"
    return (
        Row(gate, f"{theirs}.wi_0.weight", linear()),
        Row(f"{ours}/up", f"{theirs}.wi_1.weight", linear(), beside=gate),
        Row(f"{ours}/up", f"{theirs}.wi.weight", linear(), without=gate),
        Row(f"{ours}/down", f"{theirs}.wo.weight", linear()),
    )


def _from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Output tables that are their own are multiplied as they are, tied ones with hidden states times D ** -0.5.

    transformers 4 takes both from tie_word_embeddings; 5 writes that as true and says the second as
    scale_decoder_outputs.
    """
    projection = hf.get("feed_forward_proj") or "relu"
    if projection not in ACTIVATIONS:
        raise ValueError(f"feed_forward_proj={projection!r}: known are {', '.join(ACTIVATIONS)}")
    activation, name = ACTIVATIONS[projection]
    if (found := hf.get("dense_act_fn") or name) != name:
        raise ValueError(f"dense_act_fn={found!r}: feed_forward_proj says {name!r}")
    is_untied = False in (hf.get("tie_word_embeddings"), hf.get("scale_decoder_outputs"))
    return {
        "activation": activation,
        "tie_embeddings": not is_untied,
        "logit_scale": 0.0 if is_untied else hf["d_model"] ** -0.5,
    }


def _to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Raises ValueError where logits are scaled without being tied, or the other way round."""
    words = {ours: (theirs, name) for theirs, (ours, name) in ACTIVATIONS.items()}
    problems = []
    if config.activation not in words:
        problems.append(f"activation={config.activation!r}: t5 knows {', '.join(words)}")
    wanted = config.emb_dim**-0.5 if config.tie_embeddings else 0.0
    if abs(config.logit_scale - wanted) > 1e-6 * wanted:
        problems.append(
            f"logit_scale={config.logit_scale} with tie_embeddings={config.tie_embeddings}: t5 has {wanted}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    projection, name = words[config.activation]
    return {
        "feed_forward_proj": projection,
        "dense_act_fn": name,
        "is_gated_act": config.is_gated,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.tie_embeddings,
        "num_decoder_layers": config.decoder.num_layers,
        "is_encoder_decoder": True,
    }


T5 = Family(
    model_type="t5",
    model="encoder_decoder",
    prefix="",
    fields=(
        Field("vocab_size", "vocab_size", 32128),
        Field("emb_dim", "d_model", 512),
        Field("head_dim", "d_kv", 64),
        Field("mlp_dim", "d_ff", 2048),
        Field("num_layers", "num_layers", 6),
        Field("num_decoder_layers", "num_decoder_layers", lambda hf: hf.get("num_layers", 6)),
        Field("num_heads", "num_heads", 8),
        Field("num_kv_heads", "num_heads", 8),
        Field("max_len", "n_positions", 512),
        Field("relative_buckets", "relative_attention_num_buckets", 32),
        Field("relative_max_distance", "relative_attention_max_distance", 128),
        Field("norm_eps", "layer_norm_epsilon", 1e-6),
        Field("dropout_rate", "dropout_rate", 0.1),
        Field("attention_dropout_rate", "dropout_rate", 0.1),
    ),
    fixed=dict(norm="rms_norm", norm_position="pre", position="relative", query_scale=1.0),
    extra_fields=("activation", "tie_embeddings", "logit_scale"),
    extra_from=_from_hf,
    extra_to=_to_hf,
    expected=dict(is_encoder_decoder=(True,), is_decoder=(False,)),
    architectures=(Architecture("T5ForConditionalGeneration"),),
    rows=(
        Row("embed/embedding", "shared.weight"),
        Row("encoder/relative_bias/table", ENCODER_BIAS),
        Row("encoder/layers/attention_norm/scale", ENCODER + "layer.0.layer_norm.weight"),
        *attention_rows("encoder/layers/attention", ENCODER + "layer.0.SelfAttention"),
        Row("encoder/layers/mlp_norm/scale", ENCODER + "layer.1.layer_norm.weight"),
        *mlp_rows("encoder/layers/mlp", ENCODER + "layer.1.DenseReluDense"),
        Row("encoder/final_norm/scale", "encoder.final_layer_norm.weight"),
        Row("decoder/relative_bias/table", DECODER_BIAS),
        Row("decoder/layers/attention_norm/scale", DECODER + "layer.0.layer_norm.weight"),
        *attention_rows("decoder/layers/attention", DECODER + "layer.0.SelfAttention"),
        Row("decoder/layers/cross_attention_norm/scale", DECODER + "layer.1.layer_norm.weight"),
        *attention_rows("decoder/layers/cross_attention", DECODER + "layer.1.EncDecAttention"),
        Row("decoder/layers/mlp_norm/scale", DECODER + "layer.2.layer_norm.weight"),
        *mlp_rows("decoder/layers/mlp", DECODER + "layer.2.DenseReluDense"),
        Row("decoder/final_norm/scale", "decoder.final_layer_norm.weight"),
        Row("unembed", "lm_head.weight"),
    ),
    ties={"lm_head.weight": "shared.weight"},
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    # In files of 1.0; nothing has ever read it.
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
)
