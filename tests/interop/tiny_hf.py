"""Tiny models of transformers in odd sizes: what the conversion laws run on.

A case is a class, its config and the options changed. Weights are drawn from their names and shapes, so the recorded
fixture (`record.py` writes recorded.json, with torch) needs none, and the default tests run without torch.
"""

import json
from pathlib import Path

import numpy as np

from jaxlm.interop import parity
from jaxlm.interop.mapping import Family
from jaxlm.interop.safetensors_io import DTYPES, Planned, write_folder
from tests.oracles.tiny_models import random_weights

RECORDED = Path(__file__).parent / "recorded.json"
V = 37  # a multiple of nothing
GPT2 = dict(vocab_size=V, n_positions=24, n_embd=24, n_layer=2, n_head=3)
LLAMA = dict(
    vocab_size=V,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=20,
    max_position_embeddings=24,
)
HEAD = dict(head_dim=10)  # not 24 / 4
QWEN_EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12)
BERT = dict(
    vocab_size=V,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=24,
)
T5 = dict(
    vocab_size=V,
    d_model=24,
    d_kv=10,  # not 24 / 3
    d_ff=20,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)
T5_11 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=None)
BART = dict(
    vocab_size=V,
    d_model=24,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=3,
    decoder_attention_heads=3,
    encoder_ffn_dim=20,
    decoder_ffn_dim=20,
    max_position_embeddings=24,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=10000.0, factor=3.0)

# name: (transformers class, its config's class, options)
CASES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | dict(n_inner=20)),
    "gpt2_untied": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2 | dict(tie_word_embeddings=False, activation_function="relu", layer_norm_epsilon=1e-3),
    ),
    "gpt2_base": ("GPT2Model", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | HEAD),
    "llama_rope_tied_biases": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA
        | dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
        | dict(attention_bias=True, mlp_bias=True),
    ),
    "llama_linear_rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | dict(rope_parameters=LINEAR_ROPE),
    ),
    "llama_base": ("LlamaModel", "LlamaConfig", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | HEAD | dict(sliding_window=None)),
    "mistral_window": ("MistralForCausalLM", "MistralConfig", LLAMA | dict(sliding_window=5)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen2_windows": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        LLAMA | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | HEAD | dict(tie_word_embeddings=True)),
    "qwen3_untied_biases": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        LLAMA | HEAD | dict(attention_bias=True, rms_norm_eps=1e-3),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        LLAMA | HEAD | dict(num_local_experts=5, num_experts_per_tok=2),
    ),
    "mixtral_window": (
        "MixtralForCausalLM",
        "MixtralConfig",
        LLAMA | dict(num_local_experts=3, num_experts_per_tok=3, sliding_window=5),
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", LLAMA | QWEN_EXPERTS),
    "qwen3_moe_normalised": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        LLAMA | HEAD | QWEN_EXPERTS | dict(norm_topk_prob=True, tie_word_embeddings=True),
    ),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert_untied": (
        "BertForMaskedLM",
        "BertConfig",
        BERT | dict(tie_word_embeddings=False, hidden_act="gelu_new", type_vocab_size=3),
    ),
    "bert_pretraining": ("BertForPreTraining", "BertConfig", BERT | dict(layer_norm_eps=1e-3)),
    "bert_base": ("BertModel", "BertConfig", BERT),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5_11": ("T5ForConditionalGeneration", "T5Config", T5 | T5_11),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "bart_base": (
        "BartModel",
        "BartConfig",
        BART | dict(scale_embedding=True, activation_function="relu", decoder_layers=2),
    ),
}
STARTS = {"t5": 0, "bart": 2}  # what their decoders begin with


def make_weights(shapes) -> dict[str, np.ndarray]:
    """`random_weights`, but BERT's two output biases are one, as in every file of transformers 4."""
    weights = random_weights(shapes)
    if "cls.predictions.decoder.bias" in weights:
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    return weights


def make_batch() -> dict[str, np.ndarray]:
    """Random ids, of which the first row ends in padding: tokens and segment_ids (2, 20).

    What encoders of encoder-decoders read, encoder_tokens and encoder_segment_ids, has padding in the second row.
    """
    tokens = np.random.RandomState(0).randint(0, V, (2, 20)).astype(np.int32)
    real = np.ones_like(tokens)
    real[0, 13:] = 0
    return parity.with_source({"tokens": tokens, "segment_ids": real})


# Within a layer's experts, as the files of the hub have them.
EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def named_tensors(model) -> dict:
    """transformers' parameters by the names of their files; what it fuses over experts, gate and up, as views."""
    names, found = EXPERT_NAMES.get(model.config.model_type), {}
    for name, parameter in model.named_parameters():
        layer, dot, rest = name.partition(".mlp.")
        if not (names and dot):
            found[name] = parameter
            continue
        block, gate, up, down = names
        if rest == "gate.weight":
            found[f"{layer}.{block}.gate.weight"] = parameter
            continue
        parts = {down: parameter}
        if rest == "experts.gate_up_proj":
            parts = dict(zip((gate, up), parameter.chunk(2, dim=1), strict=True))
        for part, tensor in parts.items():
            for expert in range(len(tensor)):
                found[f"{layer}.{block}.experts.{expert}.{part}.weight"] = tensor[expert]
    return found


def make_theirs(name: str):
    """transformers' model of a case, with `random_weights`."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model_class, config_class, options = CASES[name]
    config_class = getattr(transformers, config_class)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if config_class.model_type in STARTS:
        ids |= dict(decoder_start_token_id=STARTS[config_class.model_type])
    model = getattr(transformers, model_class)(config_class(**options | ids))
    if config_class.model_type == "t5" and not options.get("tie_word_embeddings", True):
        # As a published 1.1's file makes it; a new model would have one table.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        tensors = named_tensors(model)
        weights = make_weights({name: tensor.shape for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(weights[name]))
    return model.eval()


def run_theirs(model) -> np.ndarray:
    """(B, T, V) logits of `make_batch`, or a base model's last hidden states (B, T, D)."""
    import torch

    batch = {key: torch.from_numpy(value).long() for key, value in make_batch().items()}
    inputs = dict(input_ids=batch["tokens"], attention_mask=batch["segment_ids"])
    if model.config.is_encoder_decoder:
        inputs = {f"decoder_{key}": value for key, value in inputs.items()}
        inputs |= dict(input_ids=batch["encoder_tokens"])
        inputs |= dict(attention_mask=batch["encoder_segment_ids"])
    with torch.no_grad():
        out = model(**inputs)
    for key in ("logits", "prediction_logits", "last_hidden_state"):
        if key in out:
            return out[key].numpy()
    raise AssertionError(f"found none of the outputs to compare in {list(out)}")


def read_recorded() -> dict:
    """By case: the config.json that transformers wrote, the shapes of its weights, and outputs at some places."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def write_source(folder: Path, config: dict, weights: dict, **options) -> Path:
    """A Hugging Face folder without a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    planned = [Planned(n, w.shape, w.dtype, lambda w=w: w) for n, w in weights.items()]
    assert {w.dtype for w in weights.values()} <= set(DTYPES.values())
    write_folder(folder, planned, **options)
    return folder


def write_recorded(folder: Path, name: str, **options) -> tuple[Path, dict]:
    """The folder of a recorded case, and its weights by name."""
    recorded = read_recorded()[name]
    weights = make_weights(recorded["shapes"])
    return write_source(folder, recorded["config"], weights, **options), weights


def tied_names(family: Family) -> set[str]:
    return {*family.ties, *family.repeats, *family.copies}
