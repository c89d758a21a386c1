"""Gemma 2 and the text models of Gemma 3: Llama's table with norms on both sides, and layers that see a window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.llama import LLAMA
from jaxlm.interop.mapping import Architecture, Family, Field, Row
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
# Llama's post_attention_layernorm is the norm before the MLP; Gemma's is what its name says.
NORMS = (
    Row("layers/attention_out_norm/scale", LAYER + "post_attention_layernorm.weight"),
    Row("layers/mlp_norm/scale", LAYER + "pre_feedforward_layernorm.weight"),
    Row("layers/mlp_out_norm/scale", LAYER + "post_feedforward_layernorm.weight"),
)
OTHERWISE = ("activation", "head_dim", "tie_embeddings", "mlp_bias")  # fields of Llama's table
WINDOW = 4096  # where sliding_window is absent
ACTIVATIONS = {"gelu_pytorch_tanh": "geglu_tanh", "gelu_tanh": "geglu_tanh", "gelu": "geglu"}


def _shared_from_hf(
    hf: Mapping[str, Any], *, every: int, softcaps: tuple[float, float]
) -> dict[str, Any]:
    """Windows, softcaps and the scale of the scores; `every` (which layer is global) and `softcaps` are defaults."""
    every = positive(hf, "sliding_window_pattern", every, (int,))
    default = [SLIDING if (i + 1) % every else FULL for i in range(hf["num_hidden_layers"])]
    width = positive(hf, "sliding_window", WINDOW, (int,))
    scalar = positive(hf, "query_pre_attn_scalar", 256)
    return {
        "attention_windows": windows_from_layer_types(hf.get("layer_types"), width, default),
        # 0 is 1 / sqrt(head_dim)
        "query_scale": 0.0 if scalar == (hf.get("head_dim") or 256) else float(scalar) ** -0.5,
        "attention_softcap": _softcap(hf, "attn_logit_softcapping", softcaps[0]),
        "final_softcap": _softcap(hf, "final_logit_softcapping", softcaps[1]),
    }


def _softcap(hf: Mapping[str, Any], key: str, default: float) -> float:
    """Where the key is absent transformers takes its default; null means none."""
    value = hf.get(key, default) or 0.0
    return float(positive({key: value}, key, None)) if value else 0.0


def _shared_to_hf(config: TransformerConfig) -> dict[str, Any]:
    kinds = layer_types(config)
    scalar = config.head_dim if not config.query_scale else round(config.query_scale**-2)
    hf = {
        "layer_types": kinds,
        "sliding_window": only_window(config, WINDOW),
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.final_softcap or None,
    }
    if every := global_every(kinds, first=-1):
        hf["sliding_window_pattern"] = every  # what layer_types was before
    return hf


def _gemma2_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    if (rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise ValueError(f"rope scaling {rope!r}: only 'default' can be converted")
    theta = positive(rope, "rope_theta", positive(hf, "rope_theta", 10000.0))
    return {**_shared_from_hf(hf, every=2, softcaps=(50.0, 30.0)), "rope_theta": float(theta)}


def _gemma2_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return {**_shared_to_hf(config), "rope_theta": config.rope_theta}


def _gemma3_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Two rotary tables: transformers 5 has them in rope_parameters, by kind of layer; 4 in three keys."""
    both = hf.get("rope_parameters") or {}
    full = {**(hf.get("rope_scaling") or {}), **(both.get(FULL) or {})}
    sliding = both.get(SLIDING) or {}
    kind = full.get("rope_type") or full.get("type") or "default"
    local_kind = sliding.get("rope_type") or "default"
    if kind not in ("default", "linear") or local_kind != "default":
        raise ValueError(
            f"rope_type={kind!r} and {local_kind!r} of sliding layers: only 'default', and 'linear' of "
            "full_attention layers, can be converted"
        )
    theta = positive(full, "rope_theta", positive(hf, "rope_theta", 1e6))
    local = positive(sliding, "rope_theta", positive(hf, "rope_local_base_freq", 1e4))
    scaling = (float(positive(full, "factor", None)),) if kind == "linear" else ()
    return {
        **_shared_from_hf(hf, every=6, softcaps=(0.0, 0.0)),
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "rope_local_theta": float(local),
    }


def _gemma3_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """In the spelling of transformers 4, which 5 and vLLM read, too."""
    scaling = config.rope_scaling
    if len(scaling) > 1:
        raise ValueError(f"rope_scaling={scaling}: it knows (), and (factor,) for linear")
    if not config.rope_local_theta:
        raise ValueError("rope_local_theta=0: layers with a window have an angle of their own here")
    return {
        **_shared_to_hf(config),
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_theta,
        "rope_scaling": {"rope_type": "linear", "factor": scaling[0]} if scaling else None,
    }


GEMMA2 = Family(
    model_type="gemma2",
    model="gpt",
    prefix="model.",
    rows=(*(r for r in LLAMA.rows if r.ours != "layers/mlp_norm/scale"), *NORMS),
    fields=(
        *(f for f in LLAMA.fields if f.ours not in OTHERWISE),
        Field("activation", "hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS),
        Field("head_dim", "head_dim", 256),
        Field("tie_embeddings", "tie_word_embeddings", True),
    ),
    fixed=LLAMA.fixed
    | dict(norm_position="sandwich", norm_scale_offset=1.0, scale_embeddings=True),
    extra_fields=(
        "attention_windows",
        "query_scale",
        "attention_softcap",
        "final_softcap",
        "rope_theta",
    ),
    extra_from=_gemma2_from_hf,
    extra_to=_gemma2_to_hf,
    expected=dict(use_bidirectional_attention=(None, False)),
    architectures=(
        Architecture("Gemma2ForCausalLM"),
        Architecture("Gemma2ForCausalLM", frozenset({"lm"})),
        Architecture("Gemma2Model", prefixed=False),
    ),
    ties=LLAMA.ties,
    ignored=LLAMA.ignored,
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    fixed=GEMMA2.fixed | dict(qk_norm=True),
    extra_fields=(*GEMMA2.extra_fields, "rope_scaling", "rope_local_theta"),
    extra_from=_gemma3_from_hf,
    extra_to=_gemma3_to_hf,
    architectures=(
        Architecture("Gemma3ForCausalLM"),
        Architecture("Gemma3ForCausalLM", frozenset({"lm"})),
        Architecture("Gemma3TextModel", prefixed=False),
    ),
)
