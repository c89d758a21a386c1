"""GPT-2 (transformers' `gpt2`): Conv1D weights (in, out), query, key and value fused in one."""

from jaxlm.interop.mapping import FLAT, SAME, Architecture, Family, Field, Row, conv1d, fused

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
QKV = ("layers/attention/query", "layers/attention/key", "layers/attention/value")
LAYER = "transformer.h.{layer}."

GPT2 = Family(
    model_type="gpt2",
    model="gpt",
    prefix="transformer.",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("emb_dim", "n_embd"),
        Field("num_layers", "n_layer"),
        Field("num_heads", "n_head"),
        Field("num_kv_heads", "n_head"),
        Field("max_len", "n_positions", lambda hf: hf["n_ctx"]),
        Field("mlp_dim", "n_inner", lambda hf: 4 * hf["n_embd"]),
        Field("activation", "activation_function", "gelu_new", ACTIVATIONS),
        Field("norm_eps", "layer_norm_epsilon", 1e-5),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Field("dropout_rate", "resid_pdrop", 0.1),
        Field("dropout_rate", "embd_pdrop", 0.1),
        Field("attention_dropout_rate", "attn_pdrop", 0.1),
        Field("init_std", "initializer_range", 0.02),
    ),
    fixed=dict(
        norm="layer_norm",
        norm_bias=True,
        norm_position="pre",
        position="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    ),
    extra_fields=("head_dim",),
    extra_from=lambda hf: {"head_dim": hf["n_embd"] // hf["n_head"]},
    expected=dict(
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    ),
    architectures=(
        Architecture("GPT2LMHeadModel"),
        Architecture("GPT2LMHeadModel", frozenset({"lm"})),
        Architecture("GPT2Model", prefixed=False),
    ),
    rows=(
        Row("embed/embedding", "transformer.wte.weight"),
        Row("embed/positions", "transformer.wpe.weight"),
        Row("layers/attention_norm/scale", LAYER + "ln_1.weight"),
        Row("layers/attention_norm/bias", LAYER + "ln_1.bias"),
        Row(QKV, LAYER + "attn.c_attn.weight", fused(conv1d(), axis=1)),
        Row(tuple(f"{p}_bias" for p in QKV), LAYER + "attn.c_attn.bias", fused(FLAT)),
        Row("layers/attention/out", LAYER + "attn.c_proj.weight", conv1d(2)),
        Row("layers/attention/out_bias", LAYER + "attn.c_proj.bias"),
        Row("layers/mlp_norm/scale", LAYER + "ln_2.weight"),
        Row("layers/mlp_norm/bias", LAYER + "ln_2.bias"),
        Row("layers/mlp/up", LAYER + "mlp.c_fc.weight", conv1d()),
        Row("layers/mlp/up_bias", LAYER + "mlp.c_fc.bias"),
        Row("layers/mlp/down", LAYER + "mlp.c_proj.weight", conv1d()),
        Row("layers/mlp/down_bias", LAYER + "mlp.c_proj.bias"),
        Row("final_norm/scale", "transformer.ln_f.weight"),
        Row("final_norm/bias", "transformer.ln_f.bias"),
        Row("unembed", "lm_head.weight", SAME, group="lm"),
    ),
    ties={"lm_head.weight": "transformer.wte.weight"},
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
)
