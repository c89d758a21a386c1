"""Qwen3-MoE: Qwen3's table with experts in place of every layer's MLP (decoder_sparse_step 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.llama import (
    BIASES,
    FIELDS,
    FIXED,
    LLAMA,
    architectures,
    head_dim,
    rope_from_hf,
    rope_to_hf,
    windows_from_hf,
)
from jaxlm.interop.mapping import Field
from jaxlm.interop.mixtral import check_experts, expert_rows, window_to_hf
from jaxlm.models.config import TransformerConfig


def _num_experts(hf: Mapping[str, Any]) -> Any:
    """Of a config.json without num_experts: transformers 5 writes its other name."""
    return hf.get("num_local_experts", 128)


def _from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    check_experts(hf.get("num_experts", _num_experts(hf)), hf.get("num_hidden_layers"))
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return rope_from_hf(hf, 10000.0) | windows_from_hf(hf, window, [True])


def _to_hf(config: TransformerConfig) -> dict[str, Any]:
    check_experts(config.num_experts, config.num_layers)
    window = window_to_hf(config)
    return {
        **rope_to_hf(config),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN3_MOE = dataclasses.replace(
    LLAMA,
    model_type="qwen3_moe",
    rows=expert_rows(
        "mlp.", "gate.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight"
    ),
    fields=(
        *(field for field in FIELDS if field.ours != "mlp_dim"),
        *BIASES,
        Field("mlp_dim", "moe_intermediate_size", 768),
        Field("head_dim", "head_dim", head_dim),
        Field("num_experts", "num_experts", _num_experts),
        Field("experts_per_token", "num_experts_per_tok", 8),
        Field("normalise_router", "norm_topk_prob", False),
    ),
    fixed=FIXED | dict(qk_norm=True),
    expected={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    extra_fields=("rope_theta", "rope_scaling", "attention_windows"),
    extra_from=_from_hf,
    extra_to=_to_hf,
    architectures=architectures("Qwen3Moe"),
)
