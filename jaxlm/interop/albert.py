"""ALBERT: one layer's parameters for all layers, narrow embeddings, and the sentence-order head."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.interop.bert import ACTIVATIONS, BERT
from jaxlm.interop.mapping import FLAT, Architecture, Field, Row, linear
from jaxlm.models.config import TransformerConfig


def _to_hf(config: TransformerConfig) -> dict[str, Any]:
    if not config.embed_factor_dim:
        raise ValueError(
            f"embed_factor_dim=0: albert always projects its embeddings; {config.emb_dim} keeps the width"
        )
    return {}


LAYER = "albert.encoder.albert_layer_groups.{layer}.albert_layers.0."

ALBERT = dataclasses.replace(
    BERT,
    model_type="albert",
    prefix="albert.",
    fields=(
        *(field for field in BERT.fields if field.ours != "activation"),
        Field("activation", "hidden_act", "gelu_new", ACTIVATIONS),
        Field("embed_factor_dim", "embedding_size", 128),
    ),
    fixed=BERT.fixed | dict(share_layers=True),
    extra_to=_to_hf,
    expected=dict(num_hidden_groups=(1,), inner_group_num=(1,), **BERT.expected),
    architectures=(
        Architecture("AlbertForMaskedLM", frozenset({"mlm"})),
        Architecture("AlbertForPreTraining", frozenset({"pooler", "mlm", "sop"})),
        Architecture("AlbertModel", frozenset({"pooler"}), prefixed=False),
        Architecture("AlbertModel", frozenset(), prefixed=False),
    ),
    rows=(
        Row("embed/embedding", "albert.embeddings.word_embeddings.weight"),
        Row("embed/positions", "albert.embeddings.position_embeddings.weight"),
        Row("embed/token_types", "albert.embeddings.token_type_embeddings.weight"),
        Row("embed/norm/scale", "albert.embeddings.LayerNorm.weight"),
        Row("embed/norm/bias", "albert.embeddings.LayerNorm.bias"),
        Row(
            "embed/projection/kernel", "albert.encoder.embedding_hidden_mapping_in.weight", linear()
        ),
        Row("embed/projection/bias", "albert.encoder.embedding_hidden_mapping_in.bias"),
        Row("layers/attention/query", LAYER + "attention.query.weight", linear()),
        Row("layers/attention/key", LAYER + "attention.key.weight", linear()),
        Row("layers/attention/value", LAYER + "attention.value.weight", linear()),
        Row("layers/attention/query_bias", LAYER + "attention.query.bias", FLAT),
        Row("layers/attention/key_bias", LAYER + "attention.key.bias", FLAT),
        Row("layers/attention/value_bias", LAYER + "attention.value.bias", FLAT),
        Row("layers/attention/out", LAYER + "attention.dense.weight", linear(2)),
        Row("layers/attention/out_bias", LAYER + "attention.dense.bias"),
        Row("layers/attention_norm/scale", LAYER + "attention.LayerNorm.weight"),
        Row("layers/attention_norm/bias", LAYER + "attention.LayerNorm.bias"),
        Row("layers/mlp/up", LAYER + "ffn.weight", linear()),
        Row("layers/mlp/up_bias", LAYER + "ffn.bias"),
        Row("layers/mlp/down", LAYER + "ffn_output.weight", linear()),
        Row("layers/mlp/down_bias", LAYER + "ffn_output.bias"),
        Row("layers/mlp_norm/scale", LAYER + "full_layer_layer_norm.weight"),
        Row("layers/mlp_norm/bias", LAYER + "full_layer_layer_norm.bias"),
        Row("pooler/kernel", "albert.pooler.weight", linear(), "pooler"),
        Row("pooler/bias", "albert.pooler.bias", group="pooler"),
        Row("mlm_head/dense", "predictions.dense.weight", linear(), "mlm"),
        Row("mlm_head/bias", "predictions.dense.bias", group="mlm"),
        Row("mlm_head/norm/scale", "predictions.LayerNorm.weight", group="mlm"),
        Row("mlm_head/norm/bias", "predictions.LayerNorm.bias", group="mlm"),
        Row("mlm_head/vocab_bias", "predictions.bias", group="mlm"),
        Row("unembed", "predictions.decoder.weight", group="mlm"),
        Row("pair_head/kernel", "sop_classifier.classifier.weight", linear(), "sop"),
        Row("pair_head/bias", "sop_classifier.classifier.bias", group="sop"),
    ),
    ties={"predictions.decoder.weight": "albert.embeddings.word_embeddings.weight"},
    repeats={"predictions.decoder.bias": "predictions.bias"},
    ignored=("albert.embeddings.position_ids",),
)
