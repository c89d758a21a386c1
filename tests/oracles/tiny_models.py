"""Five tiny models of Hugging Face: their sizes, random weights by name, and the same weights as our parameters.

`record_logits.py` runs them in transformers and writes logits.json; tests/models/test_hf_recorded.py compares our
models with that file, without torch. The weights are drawn again from their names and shapes, so none are stored.
"""

import zlib

import jax
import numpy as np

from jaxlm.models import BERT, GPT, TransformerConfig

V, D, L, N, K, H, F, P = 40, 32, 2, 4, 2, 8, 48, 40
BASE = dict(vocab_size=V, emb_dim=D, num_layers=L, num_heads=N, head_dim=H, mlp_dim=F, max_len=P)
CLASSIC = dict(norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True, num_kv_heads=N)
LLAMA3_SCALING = (8.0, 1.0, 4.0, 16.0)


def random_weights(shapes):
    """name -> float32 array, large enough to matter, by name and shape alone (RandomState's stream is frozen)."""

    def draw(name, shape):
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.3
        is_scale = name.endswith("weight") and len(shape) == 1
        return (noise + is_scale).astype(np.float32)

    return {name: draw(name, tuple(shape)) for name, shape in shapes.items()}


def stack(get):
    """get(layer) -> dict of arrays, stacked over the layers."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[get(i) for i in range(L)])


def gpt2_params(w):
    def layer(i):
        def get(name):
            return w[f"transformer.h.{i}.{name}"]

        q, k, v = np.split(get("attn.c_attn.weight"), 3, axis=1)  # Conv1D: (in, out)
        qb, kb, vb = np.split(get("attn.c_attn.bias"), 3)
        return {
            "attention_norm": {"scale": get("ln_1.weight"), "bias": get("ln_1.bias")},
            "mlp_norm": {"scale": get("ln_2.weight"), "bias": get("ln_2.bias")},
            "attention": {
                "query": q.reshape(D, N, H),
                "key": k.reshape(D, N, H),
                "value": v.reshape(D, N, H),
                "query_bias": qb.reshape(N, H),
                "key_bias": kb.reshape(N, H),
                "value_bias": vb.reshape(N, H),
                "out": get("attn.c_proj.weight").reshape(N, H, D),
                "out_bias": get("attn.c_proj.bias"),
            },
            "mlp": {
                "up": get("mlp.c_fc.weight"),
                "up_bias": get("mlp.c_fc.bias"),
                "down": get("mlp.c_proj.weight"),
                "down_bias": get("mlp.c_proj.bias"),
            },
        }

    return {
        "embed": {
            "embedding": w["transformer.wte.weight"],
            "positions": w["transformer.wpe.weight"],
        },
        "layers": stack(layer),
        "final_norm": {"scale": w["transformer.ln_f.weight"], "bias": w["transformer.ln_f.bias"]},
    }


def bert_params(w):
    def norm(name):
        return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    def layer(i):
        prefix = f"bert.encoder.layer.{i}."
        attention = {}
        for name in ("query", "key", "value"):
            attention[name] = w[f"{prefix}attention.self.{name}.weight"].T.reshape(D, N, H)
            attention[f"{name}_bias"] = w[f"{prefix}attention.self.{name}.bias"].reshape(N, H)
        attention["out"] = w[prefix + "attention.output.dense.weight"].T.reshape(N, H, D)
        attention["out_bias"] = w[prefix + "attention.output.dense.bias"]
        return {
            "attention": attention,
            "attention_norm": norm(prefix + "attention.output.LayerNorm"),
            "mlp": {
                "up": w[prefix + "intermediate.dense.weight"].T,
                "up_bias": w[prefix + "intermediate.dense.bias"],
                "down": w[prefix + "output.dense.weight"].T,
                "down_bias": w[prefix + "output.dense.bias"],
            },
            "mlp_norm": norm(prefix + "output.LayerNorm"),
        }

    return {
        "embed": {
            "embedding": w["bert.embeddings.word_embeddings.weight"],
            "positions": w["bert.embeddings.position_embeddings.weight"],
            "token_types": w["bert.embeddings.token_type_embeddings.weight"],
            "norm": norm("bert.embeddings.LayerNorm"),
        },
        "layers": stack(layer),
        "mlm_head": {
            "dense": w["cls.predictions.transform.dense.weight"].T,
            "bias": w["cls.predictions.transform.dense.bias"],
            "norm": norm("cls.predictions.transform.LayerNorm"),
            "vocab_bias": w["cls.predictions.bias"],
        },
    }


def modern_params(w):
    """Llama 3's or Qwen3's, with or without an output table of its own."""

    def layer(i):
        def get(name):
            return w[f"model.layers.{i}.{name}.weight"]

        attention = {
            "query": get("self_attn.q_proj").T.reshape(D, N, H),
            "key": get("self_attn.k_proj").T.reshape(D, K, H),
            "value": get("self_attn.v_proj").T.reshape(D, K, H),
            "out": get("self_attn.o_proj").T.reshape(N, H, D),
        }
        if f"model.layers.{i}.self_attn.q_norm.weight" in w:
            attention["query_norm"] = get("self_attn.q_norm")
            attention["key_norm"] = get("self_attn.k_norm")
        return {
            "attention": attention,
            "attention_norm": {"scale": get("input_layernorm")},
            "mlp_norm": {"scale": get("post_attention_layernorm")},
            "mlp": {
                "gate": get("mlp.gate_proj").T,
                "up": get("mlp.up_proj").T,
                "down": get("mlp.down_proj").T,
            },
        }

    params = {
        "embed": {"embedding": w["model.embed_tokens.weight"]},
        "layers": stack(layer),
        "final_norm": {"scale": w["model.norm.weight"]},
    }
    if "lm_head.weight" in w:
        params["unembed"] = w["lm_head.weight"]
    return params


def random_tokens(length=20):
    return np.random.RandomState(0).randint(0, V, (2, length)).astype(np.int32)


def gpt2(**changes):
    config = BASE | CLASSIC | dict(activation="gelu_tanh") | changes
    return GPT(TransformerConfig(**config)), gpt2_params, {"tokens": random_tokens()}


def bert(**changes):
    """With padding and two token types."""
    config = dict(norm_position="post", norm_eps=1e-12, activation="gelu", num_token_types=2)
    tokens = random_tokens()
    real = np.ones_like(tokens)
    real[0, 13:] = 0
    types = (np.arange(20)[None] > 8).astype(np.int32).repeat(2, 0)
    batch = {"tokens": tokens, "segment_ids": real, "token_types": types}
    return BERT(TransformerConfig(**BASE | CLASSIC | config | changes)), bert_params, batch


def modern(**changes):
    config = dict(norm="rms_norm", norm_eps=1e-6, position="rotary", activation="swiglu")
    config |= dict(num_kv_heads=K)
    model = GPT(TransformerConfig(**BASE | config | changes))
    return model, modern_params, {"tokens": random_tokens(36)}


def qwen3(**changes):
    return modern(**dict(qk_norm=True) | changes)


def llama3(**changes):
    return modern(**dict(rope_scaling=LLAMA3_SCALING) | changes)


def llama3_untied(**changes):
    return llama3(**dict(tie_embeddings=False) | changes)


# name: (options to change) -> (our model, its parameters from Hugging Face's weights, a batch)
MODELS = {
    "gpt2": gpt2,
    "bert": bert,
    "qwen3": qwen3,
    "llama3": llama3,
    "llama3_untied": llama3_untied,
}
