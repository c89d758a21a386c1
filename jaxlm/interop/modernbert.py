"""ModernBERT: pre-norm without biases, fused projections, every third layer global, its first attention without a norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.interop.mapping import FLAT, SAME, Architecture, Family, Field, Row, fused, linear
from jaxlm.interop.windows import (
    FULL,
    SLIDING,
    global_every,
    layer_types,
    only_window,
    positive,
    windows_from_layer_types,
)
from jaxlm.models.config import TransformerConfig

LAYER = "model.layers.{layer}."
QKV = ("layers/attention/query", "layers/attention/key", "layers/attention/value")
ACTIVATIONS = {"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}


def _from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    head_bias, mlp_bias = hf.get("classifier_bias", False), hf.get("mlp_bias", False)
    activation = hf.get("hidden_activation", "gelu")
    if head_bias != mlp_bias:
        raise ValueError(
            f"classifier_bias={head_bias} with mlp_bias={mlp_bias}: they have to agree"
        )
    if (of_head := hf.get("classifier_activation", "gelu")) != activation:
        raise ValueError(
            f"classifier_activation={of_head!r} with hidden_activation={activation!r}: they have to agree"
        )
    both = hf.get("rope_parameters") or {}
    full, sliding = both.get(FULL) or {}, both.get(SLIDING) or {}
    kinds = {rope.get("rope_type") or "default" for rope in (full, sliding)}
    if kinds != {"default"} or hf.get("rope_scaling"):
        raise ValueError(f"rope scaling {sorted(kinds)}: only 'default' can be converted")
    every = positive(hf, "global_attn_every_n_layers", 3, (int,))
    default = [SLIDING if i % every else FULL for i in range(hf["num_hidden_layers"])]
    # Theirs counts both sides together, ours the place itself and one side.
    window = positive(hf, "local_attention", 128, (int,)) // 2 + 1
    theta = positive(full, "rope_theta", positive(hf, "global_rope_theta", 160_000.0))
    local = positive(sliding, "rope_theta", positive(hf, "local_rope_theta", 10_000.0))
    return {
        "head_dim": hf["hidden_size"] // hf["num_attention_heads"],
        "attention_windows": windows_from_layer_types(hf.get("layer_types"), window, default),
        "rope_theta": float(theta),
        "rope_local_theta": float(local),
    }


def _to_hf(config: TransformerConfig) -> dict[str, Any]:
    if not config.rope_local_theta:
        raise ValueError("rope_local_theta=0: layers with a window have an angle of their own here")
    kinds = layer_types(config)
    words = {ours: theirs for theirs, ours in reversed(list(ACTIVATIONS.items()))}
    hf = {
        "layer_types": kinds,
        "local_attention": 2 * (only_window(config, 65) - 1),
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": config.rope_local_theta,
        "classifier_bias": config.mlp_bias,
        "classifier_activation": words.get(config.activation, config.activation),
    }
    if every := global_every(kinds, first=0):
        hf["global_attn_every_n_layers"] = every  # what layer_types was before
    return hf


MODERNBERT = Family(
    model_type="modernbert",
    model="bert",
    prefix="model.",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("emb_dim", "hidden_size"),
        Field("num_layers", "num_hidden_layers"),
        Field("num_heads", "num_attention_heads"),
        Field("num_kv_heads", "num_attention_heads"),
        Field("mlp_dim", "intermediate_size"),
        Field("max_len", "max_position_embeddings", 8192),
        Field("activation", "hidden_activation", "gelu", ACTIVATIONS),
        Field("norm_eps", "norm_eps", 1e-5),
        Field("norm_bias", "norm_bias", False),
        Field("qkv_bias", "attention_bias", False),
        Field("out_bias", "attention_bias", False),
        Field("mlp_bias", "mlp_bias", False),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Field("dropout_rate", "mlp_dropout", 0.0),
        Field("attention_dropout_rate", "attention_dropout", 0.0),
        Field("init_std", "initializer_range", 0.02),
    ),
    fixed=dict(norm="layer_norm", norm_position="pre", first_norm=False, position="rotary"),
    extra_fields=("head_dim", "attention_windows", "rope_theta", "rope_local_theta"),
    extra_from=_from_hf,
    extra_to=_to_hf,
    expected=dict(decoder_bias=(True,)),
    architectures=(
        Architecture("ModernBertForMaskedLM", frozenset({"mlm"})),
        Architecture("ModernBertModel", frozenset(), prefixed=False),
    ),
    rows=(
        Row("embed/embedding", "model.embeddings.tok_embeddings.weight"),
        Row("embed/norm/scale", "model.embeddings.norm.weight"),
        Row("embed/norm/bias", "model.embeddings.norm.bias"),
        Row("layers/attention_norm/scale", LAYER + "attn_norm.weight", first_layer=1),
        Row("layers/attention_norm/bias", LAYER + "attn_norm.bias", first_layer=1),
        Row(QKV, LAYER + "attn.Wqkv.weight", fused(linear())),
        Row(tuple(f"{p}_bias" for p in QKV), LAYER + "attn.Wqkv.bias", fused(FLAT)),
        Row("layers/attention/out", LAYER + "attn.Wo.weight", linear(2)),
        Row("layers/attention/out_bias", LAYER + "attn.Wo.bias"),
        Row("layers/mlp_norm/scale", LAYER + "mlp_norm.weight"),
        Row("layers/mlp_norm/bias", LAYER + "mlp_norm.bias"),
        Row(("layers/mlp/gate", "layers/mlp/up"), LAYER + "mlp.Wi.weight", fused(linear())),
        Row(("layers/mlp/gate_bias", "layers/mlp/up_bias"), LAYER + "mlp.Wi.bias", fused(SAME)),
        Row("layers/mlp/down", LAYER + "mlp.Wo.weight", linear()),
        Row("layers/mlp/down_bias", LAYER + "mlp.Wo.bias"),
        Row("final_norm/scale", "model.final_norm.weight"),
        Row("final_norm/bias", "model.final_norm.bias"),
        Row("mlm_head/dense", "head.dense.weight", linear(), "mlm"),
        Row("mlm_head/bias", "head.dense.bias", group="mlm"),
        Row("mlm_head/norm/scale", "head.norm.weight", group="mlm"),
        Row("mlm_head/norm/bias", "head.norm.bias", group="mlm"),
        Row("mlm_head/vocab_bias", "decoder.bias", group="mlm"),
        Row("unembed", "decoder.weight", group="mlm"),
    ),
    ties={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
)
