"""Mixtral: Mistral's table with experts in place of the MLP.

Files of the hub, and those that transformers 5 writes, have three tensors for each expert; ours are stacked. The weights
of training (router_aux_loss_coef) stay where they are: transformers' balance is J times ours (`moe.auxiliary`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.llama import (
    FIELDS,
    LAYER,
    LLAMA,
    ROWS,
    architectures,
    head_dim,
    rope_from_hf,
    rope_to_hf,
    windows_from_hf,
)
from jaxlm.interop.mapping import Field, Row, linear
from jaxlm.models.config import TransformerConfig

MAX_EXPERTS = 1 << 16  # of all layers together, in a config.json that nobody vouches for


def expert_rows(block: str, router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The rows of Llama with those of a router and its experts for the MLP's; names within a layer."""
    rows = [row for row in ROWS if not row.paths[0].startswith("layers/mlp/")]
    expert = LAYER + block + "experts.{expert}."
    return (
        *rows,
        Row("layers/mlp/router", LAYER + block + router, linear()),
        Row("layers/mlp/gate", expert + gate, linear()),
        Row("layers/mlp/up", expert + up, linear()),
        Row("layers/mlp/down", expert + down, linear()),
    )


def check_experts(num_experts: Any, num_layers: Any) -> None:
    """Raises ValueError for a model without experts, and for absurdly many."""
    if type(num_experts) is not int or type(num_layers) is not int:
        return  # listed already
    if not 1 <= num_experts * num_layers <= MAX_EXPERTS:
        raise ValueError(
            f"{num_experts} experts in each of {num_layers} layers: expected 1 to {MAX_EXPERTS} in all"
        )


def window_to_hf(config: TransformerConfig) -> int | None:
    """Their `sliding_window`: tokens, or None. Raises ValueError where layers differ."""
    if len(windows := set(config.layer_windows)) > 1:
        raise ValueError(f"attention_windows={config.attention_windows}: its layers are all alike")
    return windows.pop() or None


def _from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    check_experts(hf.get("num_local_experts", 8), hf.get("num_hidden_layers"))
    return rope_from_hf(hf, 1e6) | windows_from_hf(hf, hf.get("sliding_window"), [True])


def _to_hf(config: TransformerConfig) -> dict[str, Any]:
    check_experts(config.num_experts, config.num_layers)
    return {**rope_to_hf(config), "sliding_window": window_to_hf(config)}


MIXTRAL = dataclasses.replace(
    LLAMA,
    model_type="mixtral",
    rows=expert_rows("block_sparse_moe.", "gate.weight", "w1.weight", "w3.weight", "w2.weight"),
    fields=(
        *FIELDS,
        Field("head_dim", "head_dim", head_dim),
        Field("num_experts", "num_local_experts", 8),
        Field("experts_per_token", "num_experts_per_tok", 2),
    ),
    extra_fields=("rope_theta", "rope_scaling", "attention_windows"),
    extra_from=_from_hf,
    extra_to=_to_hf,
    architectures=architectures("Mixtral"),
)
