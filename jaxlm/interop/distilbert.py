"""DistilBERT: BERT without token types and pooler, in names of its own."""

from jaxlm.interop.bert import ACTIVATIONS, BERT
from jaxlm.interop.mapping import FLAT, Architecture, Family, Field, Row, linear

LAYER = "distilbert.transformer.layer.{layer}."

DISTILBERT = Family(
    model_type="distilbert",
    model="bert",
    prefix="distilbert.",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("emb_dim", "dim"),
        Field("num_layers", "n_layers"),
        Field("num_heads", "n_heads"),
        Field("num_kv_heads", "n_heads"),
        Field("mlp_dim", "hidden_dim"),
        Field("max_len", "max_position_embeddings", 512),
        Field("activation", "activation", "gelu", ACTIVATIONS),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Field("dropout_rate", "dropout", 0.1),
        Field("attention_dropout_rate", "attention_dropout", 0.1),
        Field("init_std", "initializer_range", 0.02),
    ),
    fixed=BERT.fixed | dict(norm_eps=1e-12),
    extra_fields=("head_dim",),
    extra_from=lambda hf: {"head_dim": hf["dim"] // hf["n_heads"]},
    expected=dict(sinusoidal_pos_embds=(False,)),
    architectures=(
        Architecture("DistilBertForMaskedLM", frozenset({"mlm"})),
        Architecture("DistilBertModel", frozenset(), prefixed=False),
    ),
    rows=(
        Row("embed/embedding", "distilbert.embeddings.word_embeddings.weight"),
        Row("embed/positions", "distilbert.embeddings.position_embeddings.weight"),
        Row("embed/norm/scale", "distilbert.embeddings.LayerNorm.weight"),
        Row("embed/norm/bias", "distilbert.embeddings.LayerNorm.bias"),
        Row("layers/attention/query", LAYER + "attention.q_lin.weight", linear()),
        Row("layers/attention/key", LAYER + "attention.k_lin.weight", linear()),
        Row("layers/attention/value", LAYER + "attention.v_lin.weight", linear()),
        Row("layers/attention/query_bias", LAYER + "attention.q_lin.bias", FLAT),
        Row("layers/attention/key_bias", LAYER + "attention.k_lin.bias", FLAT),
        Row("layers/attention/value_bias", LAYER + "attention.v_lin.bias", FLAT),
        Row("layers/attention/out", LAYER + "attention.out_lin.weight", linear(2)),
        Row("layers/attention/out_bias", LAYER + "attention.out_lin.bias"),
        Row("layers/attention_norm/scale", LAYER + "sa_layer_norm.weight"),
        Row("layers/attention_norm/bias", LAYER + "sa_layer_norm.bias"),
        Row("layers/mlp/up", LAYER + "ffn.lin1.weight", linear()),
        Row("layers/mlp/up_bias", LAYER + "ffn.lin1.bias"),
        Row("layers/mlp/down", LAYER + "ffn.lin2.weight", linear()),
        Row("layers/mlp/down_bias", LAYER + "ffn.lin2.bias"),
        Row("layers/mlp_norm/scale", LAYER + "output_layer_norm.weight"),
        Row("layers/mlp_norm/bias", LAYER + "output_layer_norm.bias"),
        Row("mlm_head/dense", "vocab_transform.weight", linear(), "mlm"),
        Row("mlm_head/bias", "vocab_transform.bias", group="mlm"),
        Row("mlm_head/norm/scale", "vocab_layer_norm.weight", group="mlm"),
        Row("mlm_head/norm/bias", "vocab_layer_norm.bias", group="mlm"),
        Row("mlm_head/vocab_bias", "vocab_projector.bias", group="mlm"),
        Row("unembed", "vocab_projector.weight", group="mlm"),
    ),
    ties={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ignored=("distilbert.embeddings.position_ids",),
)
