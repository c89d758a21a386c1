"""The same tiny random weights in Hugging Face's models and in ours give the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import BERT, GPT, TransformerConfig

pytestmark = pytest.mark.oracles
torch = pytest.importorskip("torch", reason="torch is missing: bash tools/check.sh --oracles")
transformers = pytest.importorskip(
    "transformers", reason="transformers is missing: bash tools/check.sh --oracles"
)

V, D, L, N, K, H, F, P = 96, 32, 2, 4, 2, 8, 48, 40
BASE = dict(vocab_size=V, emb_dim=D, num_layers=L, num_heads=N, head_dim=H, mlp_dim=F, max_len=P)
CLASSIC = dict(norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True, num_kv_heads=N)


def randomised(model):
    """The Hugging Face model with all weights random and large enough to matter, and its numpy weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.endswith("weight") and parameter.ndim == 1
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + (1.0 if is_scale else 0.0))
    model.eval()
    return model, {k: v.detach().numpy() for k, v in model.state_dict().items()}


def stack(get):
    """get(layer) -> dict of arrays, stacked over the layers."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[get(i) for i in range(L)])


def compare(hf_logits, model, params, batch):
    params = jax.tree.map(jnp.asarray, params)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    ours = jax.tree.map(lambda x: x.shape, params)
    expected = jax.tree.map(lambda x: x.value.shape, shapes, is_leaf=lambda x: hasattr(x, "names"))
    assert ours == expected
    out = jax.jit(lambda p: model.apply({"params": p}, batch))(params)
    logits = jnp.einsum("BTD,VD->BTV", out.hidden, out.unembed)
    if out.unembed_bias is not None:
        logits = logits + out.unembed_bias[None, None]
    expected = hf_logits.detach().numpy()
    real = np.asarray(batch.get("segment_ids", np.ones(expected.shape[:2]))) > 0
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], atol=1e-4, rtol=1e-4)


def random_tokens(length=20):
    return np.random.default_rng(0).integers(0, V, (2, length)).astype(np.int32)


def check_gpt2(activation):
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_layer=L, n_head=N, n_inner=F, n_positions=P
    )
    hf, w = randomised(transformers.GPT2LMHeadModel(config))

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

    params = {
        "embed": {
            "embedding": w["transformer.wte.weight"],
            "positions": w["transformer.wpe.weight"],
        },
        "layers": stack(layer),
        "final_norm": {"scale": w["transformer.ln_f.weight"], "bias": w["transformer.ln_f.bias"]},
    }
    model = GPT(TransformerConfig(**BASE, **CLASSIC, activation=activation))
    tokens = random_tokens()
    compare(hf(torch.tensor(tokens).long()).logits, model, params, {"tokens": jnp.asarray(tokens)})


def test_gpt2_gives_hugging_faces_logits():
    check_gpt2("gelu_tanh")


def test_the_gpt2_check_fails_for_another_gelu():
    with pytest.raises(AssertionError, match="Not equal"):
        check_gpt2("gelu")


def check_bert(norm_eps):
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=N,
        intermediate_size=F,
        max_position_embeddings=P,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
    )
    hf, w = randomised(transformers.BertForMaskedLM(config))

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

    params = {
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
    model = BERT(
        TransformerConfig(
            **BASE,
            **CLASSIC,
            norm_position="post",
            norm_eps=norm_eps,
            activation="gelu",
            num_token_types=2,
        )
    )
    tokens = random_tokens()
    real = np.ones_like(tokens)
    real[0, 13:] = 0
    types = (np.arange(20)[None] > 8).astype(np.int32).repeat(2, 0)
    hf_logits = hf(
        torch.tensor(tokens).long(),
        attention_mask=torch.tensor(real),
        token_type_ids=torch.tensor(types).long(),
    ).logits
    batch = {"tokens": tokens, "segment_ids": real, "token_types": types}
    compare(hf_logits, model, params, {k: jnp.asarray(v) for k, v in batch.items()})


def test_bert_gives_hugging_faces_logits_with_padding_and_token_types():
    check_bert(1e-12)


def test_the_bert_check_fails_for_another_epsilon():
    with pytest.raises(AssertionError, match="Not equal"):
        check_bert(1e-3)


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def check_modern(family, *, tied, rope, scaling=()):
    """Llama 3 (untied or tied, with scaled rotary positions) or Qwen3 (QK norm)."""
    sizes = dict(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        intermediate_size=F,
        max_position_embeddings=P,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters=rope,
    )
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    make_config, make_model = classes[family]
    hf, w = randomised(make_model(make_config(**sizes)))

    def layer(i):
        def get(name):
            return w[f"model.layers.{i}.{name}.weight"]

        attention = {
            "query": get("self_attn.q_proj").T.reshape(D, N, H),
            "key": get("self_attn.k_proj").T.reshape(D, K, H),
            "value": get("self_attn.v_proj").T.reshape(D, K, H),
            "out": get("self_attn.o_proj").T.reshape(N, H, D),
        }
        if family == "qwen3":
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
    if not tied:
        params["unembed"] = w["lm_head.weight"]
    model = GPT(
        TransformerConfig(
            **BASE,
            num_kv_heads=K,
            norm="rms_norm",
            norm_eps=1e-6,
            position="rotary",
            rope_scaling=scaling,
            activation="swiglu",
            qk_norm=family == "qwen3",
            tie_embeddings=tied,
        )
    )
    tokens = random_tokens(36)
    compare(hf(torch.tensor(tokens).long()).logits, model, params, {"tokens": jnp.asarray(tokens)})


def test_qwen3_gives_hugging_faces_logits():
    check_modern("qwen3", tied=True, rope=ROPE)


@pytest.mark.parametrize("tied", [False, True])
def test_llama3_gives_hugging_faces_logits(tied):
    check_modern("llama", tied=tied, rope=LLAMA3_ROPE, scaling=(8.0, 1.0, 4.0, 16.0))


def test_the_llama_check_fails_without_the_scaling_of_rotary_positions():
    with pytest.raises(AssertionError, match="Not equal"):
        check_modern("llama", tied=True, rope=LLAMA3_ROPE)
