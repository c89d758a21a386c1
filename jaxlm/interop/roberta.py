"""RoBERTa: BERT's layers under another prefix, a head of its own spelling, and positions that start after the padding's.

theirs counts the real tokens of a row from pad_token_id + 1 (so 2); ours from 0, `position_offset` rows further down:

    tokens    <s> the cat </s> <pad>          their rows  2 3 4 5 1        our positions  0 1 2 3 …, offset 2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.bert import BERT
from jaxlm.interop.mapping import Architecture, Row, linear
from jaxlm.models.config import TransformerConfig


def body_rows(prefix: str) -> tuple[Row, ...]:
    """BERT's embeddings and layers, under another prefix."""
    return tuple(
        row._replace(theirs=prefix + row.theirs.removeprefix(BERT.prefix))
        for row in BERT.rows
        if not row.group
    )


def _from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    pad, rows = hf.get("pad_token_id", 1), hf.get("max_position_embeddings", 512)
    if type(pad) is not int or type(rows) is not int or not 0 <= pad < rows - 1:
        raise ValueError(
            f"pad_token_id={pad!r}, max_position_embeddings={rows!r}: positions start at "
            "pad_token_id + 1, and none is left"
        )
    return {
        "head_dim": hf["hidden_size"] // hf["num_attention_heads"],
        "position_offset": pad + 1,
        "max_len": rows - pad - 1,
    }


def _to_hf(config: TransformerConfig) -> dict[str, Any]:
    if not config.position_offset:
        raise ValueError(
            "position_offset=0: roberta's positions start at pad_token_id + 1, so it is at least 1"
        )
    return {
        "max_position_embeddings": config.position_offset + config.max_len,
        "pad_token_id": config.position_offset - 1,
    }


ROBERTA = dataclasses.replace(
    BERT,
    model_type="roberta",
    prefix="roberta.",
    fields=tuple(field for field in BERT.fields if field.ours != "max_len"),
    extra_fields=("head_dim", "position_offset", "max_len"),
    extra_from=_from_hf,
    extra_to=_to_hf,
    architectures=(
        Architecture("RobertaForMaskedLM", frozenset({"mlm"})),
        Architecture("RobertaModel", frozenset({"pooler"}), prefixed=False),
        Architecture("RobertaModel", frozenset(), prefixed=False),
    ),
    rows=(
        *body_rows("roberta."),
        Row("pooler/kernel", "roberta.pooler.dense.weight", linear(), "pooler"),
        Row("pooler/bias", "roberta.pooler.dense.bias", group="pooler"),
        # Our pooler has a pair head above it, which no class of theirs has: one that was trained is refused.
        Row("pair_head/kernel", "cls.seq_relationship.weight", linear(), "nsp"),
        Row("pair_head/bias", "cls.seq_relationship.bias", group="nsp"),
        Row("mlm_head/dense", "lm_head.dense.weight", linear(), "mlm"),
        Row("mlm_head/bias", "lm_head.dense.bias", group="mlm"),
        Row("mlm_head/norm/scale", "lm_head.layer_norm.weight", group="mlm"),
        Row("mlm_head/norm/bias", "lm_head.layer_norm.bias", group="mlm"),
        Row("mlm_head/vocab_bias", "lm_head.bias", group="mlm"),
        Row("unembed", "lm_head.decoder.weight", group="mlm"),
    ),
    ties={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"},
    repeats={"lm_head.decoder.bias": "lm_head.bias"},
    ignored=("roberta.embeddings.position_ids",),
    renames=(),
)
