"""Writes logits.json: what transformers' models give for the weights and batches of tiny_models.py and tiny_families.py.

    python -m tests.oracles.record_logits        (needs torch and transformers)

For each model the shapes of its weights and the logits of each row's first and last two real positions; for those of
tiny_families.py, whose shapes are in interop's tables, some logits at two positions.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.oracles import tiny_families as families
from tests.oracles import tiny_models as tiny
from tools import torch_reference

PATH = Path(__file__).parent / "logits.json"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": tiny.LLAMA3_SCALING[0],
    "low_freq_factor": tiny.LLAMA3_SCALING[1],
    "high_freq_factor": tiny.LLAMA3_SCALING[2],
    "original_max_position_embeddings": int(tiny.LLAMA3_SCALING[3]),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def make_modern(make_config, make_model, *, rope, tied):
    config = make_config(
        vocab_size=tiny.V,
        hidden_size=tiny.D,
        num_hidden_layers=tiny.L,
        num_attention_heads=tiny.N,
        num_key_value_heads=tiny.K,
        head_dim=tiny.H,
        intermediate_size=tiny.F,
        max_position_embeddings=tiny.P,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters=rope,
    )
    return make_model(config)


def make_llama3(tied):
    return make_modern(
        transformers.LlamaConfig, transformers.LlamaForCausalLM, rope=LLAMA3_ROPE, tied=tied
    )


def make_qwen3():
    return make_modern(
        transformers.Qwen3Config, transformers.Qwen3ForCausalLM, rope=ROPE, tied=True
    )


HF_MODELS = {
    "gpt2": lambda: torch_reference.make_gpt2(transformers, tiny.gpt2()[0].config),
    "bert": lambda: torch_reference.make_bert(transformers, tiny.bert()[0].config),
    "qwen3": make_qwen3,
    "llama3": lambda: make_llama3(True),
    "llama3_untied": lambda: make_llama3(False),
}


def run(name):
    """(shapes of the parameters by name, logits (B, T, V)) of transformers' model."""
    model = HF_MODELS[name]().eval()
    shapes = {key: list(p.shape) for key, p in model.named_parameters()}
    weights = tiny.random_weights(shapes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[key]))
        batch = {k: torch.from_numpy(v).long() for k, v in tiny.MODELS[name]()[2].items()}
        names = {"tokens": "input_ids", "segment_ids": "attention_mask"}
        names["token_types"] = "token_type_ids"
        logits = model(**{names[k]: v for k, v in batch.items()}).logits
    return shapes, logits.numpy()


def record(name):
    shapes, logits = run(name)
    real = tiny.MODELS[name]()[2].get("segment_ids", np.ones(logits.shape[:2]))
    places = [[0, int(row.sum()) - 2, int(row.sum()) - 1] for row in real]
    rows = [[[float(f"{x:.6g}") for x in logits[i, t]] for t in ts] for i, ts in enumerate(places)]
    return {"shapes": shapes, "positions": places, "logits": rows}


def make_family_model(twin):
    """The model of transformers, built from the config.json that the twin is built from."""
    about = {k: v for k, v in twin.hf.items() if k not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(twin.tiny.model_type, **about)
    config._attn_implementation = "eager"
    return getattr(transformers, twin.tiny.architecture)(config).eval()


def run_family(name):
    """(shapes of the parameters by name, logits) of a model of tiny_families.py in transformers."""
    twin = families.Twin(name)
    return run_model(make_family_model(twin), twin)


def run_model(model, twin, weights=None):
    """`weights` by name, drawn if None. Logits are (B, T, V or C), or (B, 1, C) of a pooled head."""
    repeats = twin.family.repeats
    named = {repeats.get(key, key): p for key, p in model.named_parameters()}
    shapes = {key: tuple(p.shape) for key, p in named.items()}
    weights = tiny.random_weights(shapes) if weights is None else weights
    names = {"tokens": "input_ids", "segment_ids": "attention_mask"}
    names["token_types"] = "token_type_ids"
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights[key])))
        out = model(**{names[k]: torch.from_numpy(v).long() for k, v in twin.batch.items()})
    if "start_logits" in out:
        return shapes, torch.stack([out.start_logits, out.end_logits], dim=-1).numpy()
    logits = out.logits.numpy()
    pooled = twin.head and twin.head["pooling"]
    if pooled:
        return shapes, logits[:, None]
    return shapes, logits if logits.ndim == 3 else logits[..., None]


def record_family(name):
    """[row, position, the first twelve logits…] at two real positions, the last one before padding among them."""
    _, logits = run_family(name)
    places = [(0, 0), (1, 0)] if logits.shape[1] == 1 else [(0, families.REAL - 1), (1, 7)]
    return [[*place, *(float(f"{x:.6g}") for x in logits[place][:12])] for place in places]


if __name__ == "__main__":
    recorded = {name: record(name) for name in HF_MODELS}
    recorded["families"] = {name: record_family(name) for name in families.TINY}
    PATH.write_text(json.dumps(recorded, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{PATH}: {PATH.stat().st_size} bytes")
