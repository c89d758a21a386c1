"""XLNet: the two-stream encoder, the vector that its queries start from, and the output bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.interop.mapping import SAME, Architecture, Family, Field, Row, Transform, linear
from jaxlm.models.xlnet import ALWAYS

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
LAYER = "transformer.layer.{layer}."
ATTENTION = LAYER + "rel_attn."
MAX_LEN = 512  # of released models' training; the parameters know no length

# (N, H, D) <-> (D, N, H), and (D,) <-> (1, 1, D).
WIDTH_FIRST = Transform(
    merge=lambda arrays: arrays[0].transpose(2, 0, 1),
    split=lambda tensor, shapes: [tensor.transpose(1, 2, 0)],
    shape=lambda shapes: (shapes[0][2], *shapes[0][:2]),
)
ROW = Transform(
    merge=lambda arrays: arrays[0][None, None],
    split=lambda tensor, shapes: [tensor[0, 0]],
    shape=lambda shapes: (1, 1, *shapes[0]),
)


def _from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = hf["d_model"], hf["n_head"]
    head_dim = width // heads
    if hf.get("d_head") not in (None, head_dim) or width % heads:
        raise ValueError(f"d_head={hf.get('d_head')!r}: expected d_model / n_head = {head_dim}")
    return {"head_dim": head_dim}


XLNET = Family(
    model_type="xlnet",
    model="xlnet",
    prefix="transformer.",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("emb_dim", "d_model"),
        Field("num_layers", "n_layer"),
        Field("num_heads", "n_head"),
        Field("num_kv_heads", "n_head"),
        Field("mlp_dim", "d_inner"),
        Field("max_len", "max_len", MAX_LEN),
        Field("activation", "ff_activation", "gelu", ACTIVATIONS),
        Field("norm_eps", "layer_norm_eps", 1e-12),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Field("dropout_rate", "dropout", 0.1),
        Field("attention_dropout_rate", "dropout", 0.1),
        Field("init_std", "initializer_range", 0.02),
    ),
    fixed=dict(ALWAYS, norm="layer_norm", norm_bias=True, mlp_bias=True),
    extra_fields=("head_dim",),
    extra_from=_from_hf,
    extra_to=lambda config: {"d_head": config.head_dim, "mem_len": None},
    # Memories of earlier segments (mem_len, reuse_len) are state of a caller's, not of the model.
    expected=dict(
        attn_type=("bi",), bi_data=(False,), clamp_len=(-1,), same_length=(False,), untie_r=(True,)
    ),
    architectures=(
        Architecture("XLNetLMHeadModel", frozenset({"mlm"})),
        Architecture("XLNetModel", frozenset(), prefixed=False),
    ),
    rows=(
        Row("embed/embedding", "transformer.word_embedding.weight"),
        Row("mask_embedding", "transformer.mask_emb", ROW),
        Row("layers/attention/query", ATTENTION + "q"),
        Row("layers/attention/key", ATTENTION + "k"),
        Row("layers/attention/value", ATTENTION + "v"),
        Row("layers/attention/position", ATTENTION + "r"),
        Row("layers/attention/out", ATTENTION + "o", WIDTH_FIRST),
        Row("layers/attention/content_bias", ATTENTION + "r_w_bias"),
        Row("layers/attention/position_bias", ATTENTION + "r_r_bias"),
        Row("layers/attention/segment_bias", ATTENTION + "r_s_bias"),
        Row("layers/attention/segment", ATTENTION + "seg_embed"),
        Row("layers/attention_norm/scale", ATTENTION + "layer_norm.weight"),
        Row("layers/attention_norm/bias", ATTENTION + "layer_norm.bias"),
        Row("layers/mlp/up", LAYER + "ff.layer_1.weight", linear()),
        Row("layers/mlp/up_bias", LAYER + "ff.layer_1.bias"),
        Row("layers/mlp/down", LAYER + "ff.layer_2.weight", linear()),
        Row("layers/mlp/down_bias", LAYER + "ff.layer_2.bias"),
        Row("layers/mlp_norm/scale", LAYER + "ff.layer_norm.weight"),
        Row("layers/mlp_norm/bias", LAYER + "ff.layer_norm.bias"),
        Row("mlm_head/vocab_bias", "lm_loss.bias", SAME, "mlm"),
        Row("unembed", "lm_loss.weight", SAME, "mlm"),
    ),
    ties={"lm_loss.weight": "transformer.word_embedding.weight"},
)
