"""BART (transformers' `bart`): post-norm stacks, each with positions and a norm of its embeddings.

Its learned positions begin at row 2 of their tables. `final_logits_bias` is a buffer that nothing trains; it is all zeros
in every published file, and a source with other values is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.interop.gpt2 import ACTIVATIONS
from jaxlm.interop.mapping import FLAT, Architecture, Family, Field, Row, linear
from jaxlm.models.config import TransformerConfig

ENCODER, DECODER = "model.encoder.layers.{layer}.", "model.decoder.layers.{layer}."
OFFSET = 2  # rows of a table of positions before position 0


def attention_rows(ours: str, theirs: str, norm: str) -> tuple[Row, ...]:
    """The projections, and the norm after their sum with the residual."""
    projections = (("query", "q"), ("key", "k"), ("value", "v"))
    return (
        *(Row(f"{ours}/{a}", f"{theirs}.{b}_proj.weight", linear()) for a, b in projections),
        *(Row(f"{ours}/{a}_bias", f"{theirs}.{b}_proj.bias", FLAT) for a, b in projections),
        Row(f"{ours}/out", f"{theirs}.out_proj.weight", linear(2)),
        Row(f"{ours}/out_bias", f"{theirs}.out_proj.bias"),
        Row(f"{ours}_norm/scale", f"{norm}.weight"),
        Row(f"{ours}_norm/bias", f"{norm}.bias"),
    )


def mlp_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """The rows of a feed-forward layer, two matrices with biases, and of its norm."""
    return (
        Row(f"{ours}/up", f"{theirs}fc1.weight", linear()),
        Row(f"{ours}/up_bias", f"{theirs}fc1.bias"),
        Row(f"{ours}/down", f"{theirs}fc2.weight", linear()),
        Row(f"{ours}/down_bias", f"{theirs}fc2.bias"),
        Row(f"{ours}_norm/scale", f"{theirs}final_layer_norm.weight"),
        Row(f"{ours}_norm/bias", f"{theirs}final_layer_norm.bias"),
    )


def embed_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """What a stack has of its own beside the shared table."""
    return (
        Row(f"{ours}/positions", f"{theirs}.embed_positions.weight"),
        Row(f"{ours}/norm/scale", f"{theirs}.layernorm_embedding.weight"),
        Row(f"{ours}/norm/bias", f"{theirs}.layernorm_embedding.bias"),
    )


def _from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Options that our two stacks share must be the same in theirs."""
    problems = []
    for key in ("attention_heads", "ffn_dim"):
        one, other = (hf.get(f"{stack}_{key}") for stack in ("encoder", "decoder"))
        if one != other:
            problems.append(f"encoder_{key}={one!r}, decoder_{key}={other!r}: expected the same")
    if problems:
        raise ValueError("; ".join(problems))
    return {"head_dim": hf.get("d_model", 1024) // hf.get("encoder_attention_heads", 16)}


def _to_hf(config: TransformerConfig) -> dict[str, Any]:
    return {
        "decoder_layers": config.decoder.num_layers,
        "decoder_attention_heads": config.num_heads,
        "decoder_ffn_dim": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "is_encoder_decoder": True,
    }


BART = Family(
    model_type="bart",
    model="encoder_decoder",
    prefix="model.",
    fields=(
        Field("vocab_size", "vocab_size", 50265),
        Field("emb_dim", "d_model", 1024),
        Field("num_layers", "encoder_layers", 12),
        Field("num_decoder_layers", "decoder_layers", 12),
        Field("num_heads", "encoder_attention_heads", 16),
        Field("num_kv_heads", "encoder_attention_heads", 16),
        Field("mlp_dim", "encoder_ffn_dim", 4096),
        Field("max_len", "max_position_embeddings", 1024),
        Field("activation", "activation_function", "gelu", ACTIVATIONS),
        Field("scale_embeddings", "scale_embedding", False),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Field("dropout_rate", "dropout", 0.1),
        Field("attention_dropout_rate", "attention_dropout", 0.0),
        Field("init_std", "init_std", 0.02),
    ),
    fixed=dict(
        norm="layer_norm",
        norm_eps=1e-5,
        norm_bias=True,
        norm_position="post",
        position="learned",
        position_offset=OFFSET,
        embed_norm=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    ),
    extra_fields=("head_dim",),
    extra_from=_from_hf,
    extra_to=_to_hf,
    expected=dict(
        is_encoder_decoder=(True,),
        is_decoder=(False,),
        # Of configs from the time when one class also read mBART and Marian.
        normalize_before=(False,),
        normalize_embedding=(True,),
        add_final_layer_norm=(False,),
        add_bias_logits=(False,),
        static_position_embeddings=(False,),
        extra_pos_embeddings=(OFFSET,),
    ),
    architectures=(
        Architecture("BartForConditionalGeneration"),
        Architecture("BartForConditionalGeneration", frozenset({"lm"})),
        Architecture("BartModel", prefixed=False),
    ),
    rows=(
        Row("embed/embedding", "model.shared.weight"),
        *embed_rows("encoder/embed", "model.encoder"),
        *attention_rows(
            "encoder/layers/attention", ENCODER + "self_attn", ENCODER + "self_attn_layer_norm"
        ),
        *mlp_rows("encoder/layers/mlp", ENCODER),
        *embed_rows("decoder/embed", "model.decoder"),
        *attention_rows(
            "decoder/layers/attention", DECODER + "self_attn", DECODER + "self_attn_layer_norm"
        ),
        *attention_rows(
            "decoder/layers/cross_attention",
            DECODER + "encoder_attn",
            DECODER + "encoder_attn_layer_norm",
        ),
        *mlp_rows("decoder/layers/mlp", DECODER),
        Row("unembed", "lm_head.weight", group="lm"),
    ),
    ties={"lm_head.weight": "model.shared.weight"},
    copies={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    },
    ignored=("model.encoder.version", "model.decoder.version"),
    zeros=("final_logits_bias",),
)
