"""Tiny models of Hugging Face's families, by config.json and class, and the same as ours through interop's tables.

Sizes are odd on purpose: a vocabulary that is a multiple of nothing, grouped-query heads, biases on and off, tied and
untied, windows shorter than the rows, heads that are not D / N wide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from jaxlm.interop import FAMILIES
from jaxlm.interop.mapping import Piece, bind, config_from_hf
from jaxlm.interop.task_heads import TASKS, head_fields, task_of, with_head
from jaxlm.models import MODELS, Head, TransformerConfig
from jaxlm.parallel.mesh import path_names

V, T, REAL, PAD = 43, 20, 13, 1
HEADS = dict(num_attention_heads=4, num_hidden_layers=3)
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=44, max_position_embeddings=40, **HEADS
)
IDS = dict(pad_token_id=PAD, bos_token_id=2, eos_token_id=3)
BERT = dict(SIZES, hidden_act="gelu", pad_token_id=PAD)
DECODER = dict(SIZES, **IDS, num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-6)
GEMMA = dict(
    DECODER, hidden_activation="gelu_pytorch_tanh", sliding_window=5, query_pre_attn_scalar=7
)
ELECTRA = dict(BERT, embedding_size=20)
DISTILBERT = dict(
    vocab_size=V, dim=32, n_layers=3, n_heads=4, hidden_dim=44, max_position_embeddings=40
)
DISTILBERT |= dict(pad_token_id=PAD, activation="gelu")
MODERNBERT = dict(SIZES, **IDS, num_hidden_layers=5, local_attention=6, cls_token_id=2)
MODERNBERT |= dict(sep_token_id=3, global_attn_every_n_layers=3)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=40, n_inner=44, **IDS)
XLNET = dict(vocab_size=V, d_model=32, n_layer=3, n_head=4, d_inner=44, pad_token_id=PAD)
THREE = dict(id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})


class Tiny(NamedTuple):
    model_type: str
    architecture: str
    config: dict[str, Any]


TINY = {
    "mistral": Tiny("mistral", "MistralForCausalLM", dict(DECODER, sliding_window=5)),
    "roberta": Tiny("roberta", "RobertaForMaskedLM", dict(BERT, type_vocab_size=1)),
    "electra_generator": Tiny("electra", "ElectraForMaskedLM", ELECTRA),
    "electra_discriminator": Tiny("electra", "ElectraForPreTraining", ELECTRA),
    "distilbert": Tiny("distilbert", "DistilBertForMaskedLM", DISTILBERT),
    "modernbert": Tiny("modernbert", "ModernBertForMaskedLM", MODERNBERT),
    "modernbert_biased": Tiny(
        "modernbert",
        "ModernBertForMaskedLM",
        dict(
            MODERNBERT,
            attention_bias=True,
            mlp_bias=True,
            classifier_bias=True,
            norm_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "gemma2": Tiny(
        "gemma2",
        "Gemma2ForCausalLM",
        dict(GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=3.0),
    ),
    "gemma3": Tiny(
        "gemma3_text",
        "Gemma3ForCausalLM",
        dict(
            GEMMA,
            num_hidden_layers=4,
            sliding_window_pattern=3,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    ),
    "albert": Tiny("albert", "AlbertForMaskedLM", dict(ELECTRA, hidden_act="gelu_new")),
    "xlnet": Tiny("xlnet", "XLNetLMHeadModel", XLNET),
    "bert_sequence": Tiny("bert", "BertForSequenceClassification", BERT | THREE),
    "bert_tokens": Tiny("bert", "BertForTokenClassification", BERT | THREE),
    "bert_spans": Tiny("bert", "BertForQuestionAnswering", BERT),
    "roberta_sequence": Tiny("roberta", "RobertaForSequenceClassification", BERT | THREE),
    "electra_sequence": Tiny("electra", "ElectraForSequenceClassification", ELECTRA | THREE),
    "distilbert_sequence": Tiny(
        "distilbert", "DistilBertForSequenceClassification", DISTILBERT | THREE
    ),
    "distilbert_spans": Tiny("distilbert", "DistilBertForQuestionAnswering", DISTILBERT),
    "albert_sequence": Tiny("albert", "AlbertForSequenceClassification", ELECTRA | THREE),
    "modernbert_sequence": Tiny(
        "modernbert",
        "ModernBertForSequenceClassification",
        dict(MODERNBERT | THREE, classifier_pooling="mean"),
    ),
    "modernbert_tokens": Tiny("modernbert", "ModernBertForTokenClassification", MODERNBERT | THREE),
    "gpt2_sequence": Tiny("gpt2", "GPT2ForSequenceClassification", GPT2 | THREE),
    "gpt2_tokens": Tiny("gpt2", "GPT2ForTokenClassification", GPT2 | THREE),
    "llama_sequence": Tiny("llama", "LlamaForSequenceClassification", DECODER | THREE),
    "llama_spans": Tiny("llama", "LlamaForQuestionAnswering", DECODER),
    "mistral_tokens": Tiny(
        "mistral", "MistralForTokenClassification", dict(DECODER | THREE, sliding_window=5)
    ),
    "xlnet_tokens": Tiny("xlnet", "XLNetForTokenClassification", XLNET | THREE),
    "xlnet_spans": Tiny("xlnet", "XLNetForQuestionAnsweringSimple", XLNET),
    "gemma3_sequence": Tiny("gemma3_text", "Gemma3TextForSequenceClassification", GEMMA | THREE),
}


def parameter_shapes(model, batch):
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed))
    return {"/".join(path_names(path)): tuple(x.shape) for path, x in leaves}


class Twin:
    """One of TINY as ours: `model`, `family` (its table), `pieces`, `batch`; calling it converts their weights."""

    def __init__(self, name, **changes):
        self.tiny = TINY[name]
        self.hf = {
            "model_type": self.tiny.model_type,
            "architectures": [self.tiny.architecture],
            **self.tiny.config,
        }
        self.family, head = FAMILIES[self.tiny.model_type], None
        in_head = {k: v for k, v in changes.items() if k in Head.__dataclass_fields__}
        options = config_from_hf(self.family, self.hf)
        options |= {k: v for k, v in changes.items() if k not in in_head}
        self.config = TransformerConfig(**options)
        self.head = None
        if task := task_of(self.family, self.hf):
            self.head = head_fields(self.family, task, self.hf) | in_head
            self.kind = TASKS[self.tiny.model_type][task].kind
            self.family, head = with_head(self.family, task), Head(self.config, **self.head)
        self.model = MODELS[self.family.model](self.config, head=head)
        self.batch = make_batch(self.config.num_token_types)
        self.paths = parameter_shapes(self.model, self.batch)
        self.pieces: list[Piece] = bind(self.family, self.paths, V)
        self.shapes = {piece.name: piece.shape for piece in self.pieces}

    def __call__(self, weights):
        params: dict[str, Any] = {p: np.ones(shape, np.float32) for p, shape in self.paths.items()}
        for piece in self.pieces:
            for path, part in zip(piece.paths, piece.to_ours(weights[piece.name]), strict=True):
                params[path][... if piece.layer is None else piece.layer] = part
        return nest(params)

    def back(self, params):
        """Their weights by name."""
        leaves = jax.tree_util.tree_leaves_with_path(params)
        flat = {"/".join(path_names(path)): x for path, x in leaves}
        at = lambda path, layer: flat[path] if layer is None else flat[path][layer]
        return {p.name: p.to_theirs([at(path, p.layer) for path in p.paths]) for p in self.pieces}


def nest(flat):
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def make_batch(num_token_types):
    """Two rows of 20 tokens; the first has 13 and then padding."""
    rng = np.random.RandomState(0)
    tokens = rng.randint(4, V, (2, T)).astype(np.int32)
    real = np.ones_like(tokens)
    real[0, REAL:] = 0
    batch = {"tokens": np.where(real > 0, tokens, PAD).astype(np.int32), "segment_ids": real}
    if num_token_types > 1:
        batch["token_types"] = (np.arange(T)[None] > 8).astype(np.int32).repeat(2, 0)
    return batch


def twin(name):
    """A function of options to change, as in `tiny_models.MODELS`."""

    def make(**changes):
        made = Twin(name, **changes)
        return made.model, made, made.batch

    return make


FAMILY_MODELS = {name: twin(name) for name in TINY}

# For each, options with which the logits must differ: (options of the model or fields of the head, why).
WRONG: dict[str, list[dict[str, Any]]] = {
    "mistral": [dict(attention_windows=(6,)), dict(attention_windows=())],
    "roberta": [dict(position_offset=1, max_len=39)],
    "electra_generator": [dict(norm_eps=1e-2)],
    "electra_discriminator": [dict(transform="tanh")],
    "distilbert": [dict(activation="gelu_tanh", norm_eps=1e-3)],
    "modernbert": [
        dict(attention_windows=(0, 5, 5)),
        dict(attention_windows=(4, 4, 0)),
        dict(rope_local_theta=0.0),
        dict(first_norm=True),
        dict(activation="geglu_tanh", norm_eps=1e-3),
    ],
    "modernbert_biased": [dict(attention_windows=())],
    "gemma2": [
        dict(attention_windows=(0, 5)),
        dict(scale_embeddings=False),
        dict(query_scale=0.0),
        dict(norm_scale_offset=0.0),
        dict(attention_softcap=0.0),
        dict(final_softcap=0.0),
    ],
    "gemma3": [
        dict(attention_windows=(0, 5, 5)),
        dict(attention_windows=(6, 6, 0)),
        dict(rope_scaling=()),
        dict(rope_local_theta=0.0),
        dict(qk_norm=True, norm_scale_offset=0.5),
    ],
    "albert": [dict(num_layers=2), dict(activation="gelu", norm_eps=1e-3)],
    "xlnet": [dict(norm_eps=1e-2), dict(activation="relu")],
    "bert_sequence": [dict(pooling="last"), dict(transform="relu")],
    "modernbert_sequence": [dict(pooling="first"), dict(use_norm=True, transform="relu")],
    "gpt2_sequence": [dict(pooling="first"), dict(pooling="mean")],
    "roberta_sequence": [dict(transform="gelu")],
    "distilbert_sequence": [dict(transform="gelu")],
}
