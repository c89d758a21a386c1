"""Llama (2, 3 and its rope scaling), Mistral, Qwen2 and Qwen3: one table, and what each of them has of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.mapping import FLAT, MAX_LAYERS, SAME, Architecture, Family, Field, Row, linear
from jaxlm.models.config import TransformerConfig

LAYER = "model.layers.{layer}."
ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu": "geglu",
}

ROWS = (
    Row("embed/embedding", "model.embed_tokens.weight"),
    Row("layers/attention_norm/scale", LAYER + "input_layernorm.weight"),
    Row("layers/attention/query", LAYER + "self_attn.q_proj.weight", linear()),
    Row("layers/attention/key", LAYER + "self_attn.k_proj.weight", linear()),
    Row("layers/attention/value", LAYER + "self_attn.v_proj.weight", linear()),
    Row("layers/attention/query_bias", LAYER + "self_attn.q_proj.bias", FLAT),
    Row("layers/attention/key_bias", LAYER + "self_attn.k_proj.bias", FLAT),
    Row("layers/attention/value_bias", LAYER + "self_attn.v_proj.bias", FLAT),
    Row("layers/attention/query_norm", LAYER + "self_attn.q_norm.weight"),
    Row("layers/attention/key_norm", LAYER + "self_attn.k_norm.weight"),
    Row("layers/attention/out", LAYER + "self_attn.o_proj.weight", linear(2)),
    Row("layers/attention/out_bias", LAYER + "self_attn.o_proj.bias"),
    Row("layers/mlp_norm/scale", LAYER + "post_attention_layernorm.weight"),
    Row("layers/mlp/gate", LAYER + "mlp.gate_proj.weight", linear()),
    Row("layers/mlp/gate_bias", LAYER + "mlp.gate_proj.bias"),
    Row("layers/mlp/up", LAYER + "mlp.up_proj.weight", linear()),
    Row("layers/mlp/up_bias", LAYER + "mlp.up_proj.bias"),
    Row("layers/mlp/down", LAYER + "mlp.down_proj.weight", linear()),
    Row("layers/mlp/down_bias", LAYER + "mlp.down_proj.bias"),
    Row("final_norm/scale", "model.norm.weight"),
    Row("unembed", "lm_head.weight", SAME, group="lm"),
)


def rope_from_hf(hf: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """rope_theta and rope_scaling of a config.json in the spelling of transformers 4 or 5."""
    written = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = written.get("rope_theta", hf.get("rope_theta") or default_theta)
    kind = written.get("rope_type") or written.get("type") or "default"
    problems = []
    if type(theta) not in (int, float) or not 0 < theta < 1e12:
        problems.append(f"rope_theta={theta!r}: expected a positive number")
    if (written.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        problems.append(
            "partial_rotary_factor: only 1.0 (all of a head is rotated) can be converted"
        )
    scaling: tuple[float, ...] = ()
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        numbers = [written.get(key) for key in keys]
        if all(type(n) in (int, float) and 0 < n < 1e12 for n in numbers):
            scaling = tuple(float(n) for n in numbers)
        else:
            problems.append(f"rope scaling of type llama3 needs positive {', '.join(keys)}")
    elif kind == "linear" and type(written.get("factor")) in (int, float):
        scaling = (float(written["factor"]),)
    elif kind != "default":
        problems.append(f"rope_type={kind!r}: only default, linear and llama3 can be converted")
    if problems:
        raise ValueError("; ".join(problems))
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def rope_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """In the spelling of transformers 4, which 5 and vLLM read, too."""
    if not config.rope_scaling:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    if len(config.rope_scaling) == 1:
        scaling = {"rope_type": "linear", "factor": config.rope_scaling[0]}
        return {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    factor, low, high, original_len = config.rope_scaling
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": int(original_len),
    }
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def windows_from_hf(hf: Mapping[str, Any], window: Any, sliding: list[bool]) -> dict[str, Any]:
    """attention_windows, given which layers slide; a window as long as the model's longest text is none."""
    if window is None or not any(sliding):
        return {"attention_windows": ()}
    if type(window) is not int or not 0 < window < 1 << 31:
        raise ValueError(f"sliding_window={window!r}: expected a positive integer")
    if window >= hf["max_position_embeddings"]:
        return {"attention_windows": ()}
    return {"attention_windows": (window,) if all(sliding) else tuple(window * s for s in sliding)}


def head_dim(hf: Mapping[str, Any]) -> int:
    """Of a config.json that does not say it."""
    return hf["hidden_size"] // hf["num_attention_heads"]


FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("emb_dim", "hidden_size"),
    Field("num_layers", "num_hidden_layers"),
    Field("num_heads", "num_attention_heads"),
    Field("num_kv_heads", "num_key_value_heads", lambda hf: hf["num_attention_heads"]),
    Field("mlp_dim", "intermediate_size"),
    Field("max_len", "max_position_embeddings"),
    Field("activation", "hidden_act", "silu", ACTIVATIONS),
    Field("norm_eps", "rms_norm_eps", 1e-6),
    Field("tie_embeddings", "tie_word_embeddings", False),
    Field("attention_dropout_rate", "attention_dropout", 0.0),
    Field("init_std", "initializer_range", 0.02),
)
BIASES = (Field("qkv_bias", "attention_bias", False), Field("out_bias", "attention_bias", False))
FIXED = dict(norm="rms_norm", norm_position="pre", position="rotary", norm_bias=False)


def architectures(name: str) -> tuple[Architecture, ...]:
    """The classes of a decoder: with a head, tied or not, and without."""
    return (
        Architecture(f"{name}ForCausalLM"),
        Architecture(f"{name}ForCausalLM", frozenset({"lm"})),
        Architecture(f"{name}Model", prefixed=False),
    )


LLAMA = Family(
    model_type="llama",
    model="gpt",
    prefix="model.",
    rows=ROWS,
    fields=(
        *FIELDS,
        *BIASES,
        Field("mlp_bias", "mlp_bias", False),
        Field("head_dim", "head_dim", head_dim),
    ),
    fixed=FIXED,
    extra_fields=("rope_theta", "rope_scaling"),
    extra_from=lambda hf: rope_from_hf(hf, 10000.0),
    extra_to=rope_to_hf,
    architectures=architectures("Llama"),
    ties={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)


def _mistral_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    # Where the key is absent transformers takes a window of 4,096; null means none.
    window = hf.get("sliding_window", 4096)
    return rope_from_hf(hf, 10000.0) | windows_from_hf(hf, window, [True])


def _mistral_to_hf(config: TransformerConfig) -> dict[str, Any]:
    if len(windows := set(config.layer_windows)) > 1:
        raise ValueError(f"attention_windows={config.attention_windows}: its layers are all alike")
    return {**rope_to_hf(config), "sliding_window": windows.pop() or None}


MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    fields=(*FIELDS, Field("head_dim", "head_dim", head_dim)),
    extra_fields=("rope_theta", "rope_scaling", "attention_windows"),
    extra_from=_mistral_from_hf,
    extra_to=_mistral_to_hf,
    architectures=architectures("Mistral"),
)


def _qwen_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Layers slide from max_window_layers on, or as layer_types says, and only with use_sliding_window."""
    num_layers = hf["num_hidden_layers"]
    if type(num_layers) is not int or not 0 < num_layers <= MAX_LAYERS:
        return {}  # listed already
    first = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
    ]
    if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types: expected {num_layers} of sliding_attention, full_attention")
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    sliding = [kind == "sliding_attention" for kind in kinds]
    return rope_from_hf(hf, 10000.0) | windows_from_hf(hf, window, sliding)


def _qwen_to_hf(config: TransformerConfig) -> dict[str, Any]:
    windows = config.layer_windows
    if len(set(windows) - {0}) > 1:
        raise ValueError(
            f"attention_windows={config.attention_windows}: its windows are all of one size"
        )
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    about = {"use_sliding_window": any(windows), "sliding_window": max(windows) or None}
    about |= {"max_window_layers": (kinds + ["sliding_attention"]).index("sliding_attention")}
    return {**rope_to_hf(config), **about, "layer_types": kinds}


QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    fields=FIELDS,
    fixed=FIXED | dict(qkv_bias=True),
    extra_fields=("rope_theta", "rope_scaling", "attention_windows", "head_dim"),
    extra_from=lambda hf: _qwen_from_hf(hf) | {"head_dim": head_dim(hf)},
    extra_to=_qwen_to_hf,
    architectures=architectures("Qwen2"),
)

QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    fields=(*FIELDS, *BIASES, Field("head_dim", "head_dim", 128)),
    fixed=FIXED | dict(qk_norm=True),
    extra_fields=("rope_theta", "rope_scaling", "attention_windows"),
    extra_from=_qwen_from_hf,
    extra_to=_qwen_to_hf,
    architectures=architectures("Qwen3"),
)
