"""ELECTRA, generator and discriminator: BERT's layers, embeddings that may be narrower, and a head for each of the two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.bert import BERT
from jaxlm.interop.mapping import Architecture, Field, Row, linear
from jaxlm.interop.roberta import body_rows
from jaxlm.models.config import TransformerConfig


def _from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    width, narrow = hf["hidden_size"], hf.get("embedding_size", 128)
    if type(narrow) is not int or narrow < 1:
        raise ValueError(f"embedding_size={narrow!r}: expected a positive integer")
    # Only where the widths differ is there a projection.
    factor_dim = 0 if narrow == width else narrow
    return {"head_dim": width // hf["num_attention_heads"], "embed_factor_dim": factor_dim}


def _to_hf(config: TransformerConfig) -> dict[str, Any]:
    if config.embed_factor_dim == config.emb_dim:
        raise ValueError(
            f"embed_factor_dim={config.embed_factor_dim}: electra has no projection between equal "
            "widths; 0 has none"
        )
    return {"embedding_size": config.table_dim}


# An ELECTRA run's discriminator as a model with a task's head: fields of models.Head, and its key in models.HEADS.
HEAD, HEAD_KIND = dict(num_classes=1, transform="gelu"), "replaced_token_detection"


def discriminator(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by path without a generator's, the discriminator's head being the model's; others as they are."""
    return {
        f"head/{path.removeprefix('rtd_head/')}" if path.startswith("rtd_head/") else path: array
        for path, array in arrays.items()
        if not path.startswith("generator/")
    }


ELECTRA = dataclasses.replace(
    BERT,
    model_type="electra",
    prefix="electra.",
    # The generator's head knows exact GELU only, whatever hidden_act says.
    fields=tuple(
        Field("activation", "hidden_act", "gelu", {"gelu": "gelu"}) if f.ours == "activation" else f
        for f in BERT.fields
    ),
    extra_fields=("head_dim", "embed_factor_dim"),
    extra_from=_from_hf,
    extra_to=_to_hf,
    architectures=(
        Architecture("ElectraForMaskedLM", frozenset({"mlm"})),
        Architecture("ElectraModel", frozenset(), prefixed=False),
    ),
    rows=(
        *body_rows("electra."),
        Row("embed/projection/kernel", "electra.embeddings_project.weight", linear()),
        Row("embed/projection/bias", "electra.embeddings_project.bias"),
        Row("mlm_head/dense", "generator_predictions.dense.weight", linear(), "mlm"),
        Row("mlm_head/bias", "generator_predictions.dense.bias", group="mlm"),
        Row("mlm_head/norm/scale", "generator_predictions.LayerNorm.weight", group="mlm"),
        Row("mlm_head/norm/bias", "generator_predictions.LayerNorm.bias", group="mlm"),
        Row("mlm_head/vocab_bias", "generator_lm_head.bias", group="mlm"),
        Row("unembed", "generator_lm_head.weight", group="mlm"),
    ),
    ties={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    repeats={},
    ignored=("electra.embeddings.position_ids",),
)
