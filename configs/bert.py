r"""Encoders with a masked-token head: BERT, its miniatures, and RoBERTa.

    python -m jaxlm.pretrain --config=configs/bert.py:tiny --workdir=/tmp/bert

The argument is a variant and optional choices, e.g. `configs/bert.py:base,objective=mlm_nsp,optimizer=lamb`.

variant              what, hardware, what to expect
tiny                 BERT-Tiny's shape (2 layers, 128 wide) with 4,096 pieces, on the running Python's standard library;
                     7 minutes on 2 CPU cores; measured: masked loss 5.24 (unigram entropy 6.45), accuracy 0.146
                     (commonest token 0.028)
mini, small, medium  Turc et al. 2019, arXiv:1908.08962 (the miniatures' table in github.com/google-research/bert)
base, large          Devlin et al. 2018, arXiv:1810.04805, appendix A.2: 1M steps of 256 x 512 tokens (the first 90%
                     of them at 128: set seq_len), 4 days on 4 and 16 Cloud TPUs; masked accuracy about 0.70 for base;
                     the released models were trained with objective=mlm_nsp
                     objective=mlm_sop: arXiv:1909.11942; optimizer=lamb: arXiv:1904.00962
roberta_base, large  Liu et al. 2019, arXiv:1907.11692, table 9: 500,000 steps of 8,192 x 512 tokens, 1,024 V100 for a
                     day (large); perplexity 3.7 (base)
"""

from ml_collections import ConfigDict

from configs.common import (
    OPTIMIZERS,
    SCHEDULES,
    base,
    choose_optimizer,
    make_model,
    parse_arg,
    set_intervals,
)

# name: (layers, width, heads)
BERT = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}

# name: (layers, width, heads, learning rate, warm-up steps)
ROBERTA = {
    "roberta_base": (12, 768, 12, 6e-4, 24_000),
    "roberta_large": (24, 1024, 16, 4e-4, 30_000),
}

VARIANTS = (*BERT, *ROBERTA)


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see the module's docstring.

    arg: 'variant[,objective=mlm|mlm_nsp|mlm_sop][,optimizer=…][,schedule=…]'.
    """
    chosen = parse_arg(
        arg,
        VARIANTS,
        objective=("mlm", "mlm_nsp", "mlm_sop"),
        optimizer=("", *OPTIMIZERS),
        schedule=("", *SCHEDULES, "plateau"),
    )
    variant = chosen["variant"]
    config = base()
    config.family = "bert"
    config.objective = dict(
        name=chosen["objective"],
        rate=0.15,
        mask_share=0.8,
        random_share=0.1,
        whole_word=False,
        max_ngram=1,
        ngram_decay=0.0,
        static=False,
        label_smoothing=0.0,
        chunk_tokens=0,
    )
    if variant in BERT:
        recipe = make_bert(config, *BERT[variant])
    else:
        recipe = make_roberta(config, *ROBERTA[variant])
    if variant == "tiny":
        recipe = make_tiny(config)
    config.optimizer = choose_optimizer(recipe, chosen["optimizer"], chosen["schedule"])
    return config


def make_encoder(layers: int, width: int, heads: int, **fields) -> ConfigDict:
    return make_model(
        emb_dim=width,
        num_layers=layers,
        num_heads=heads,
        max_len=512,
        norm_position="post",
        activation="gelu",
        dropout_rate=0.1,
        attention_dropout_rate=0.1,
        **fields,
    )


def make_bert(config: ConfigDict, layers: int, width: int, heads: int) -> dict:
    config.model = make_encoder(
        layers, width, heads, vocab_size=30522, norm_eps=1e-12, num_token_types=2
    )
    config.tokenizer.update(kind="unigram", vocab_size=30522)
    config.batch_size, config.seq_len, config.num_train_steps = 256, 512, 1_000_000
    make_large(config)
    return dict(
        name="adamw",
        learning_rate=1e-4,
        b2=0.999,
        eps=1e-6,
        weight_decay=0.01,
        schedule="linear",
        warmup_steps=10_000,
    )


def make_tiny(config: ConfigDict) -> dict:
    """Google's BERT-Tiny with a small vocabulary, no dropout (it never sees a text often) and a short recipe."""
    config.model.update(vocab_size=4096, dropout_rate=0.0, attention_dropout_rate=0.0)
    config.tokenizer.update(kind="byte_bpe", vocab_size=4096)
    config.batch_size, config.seq_len, config.num_train_steps = 32, 128, 1500
    config.log_every_steps = 20
    config.eval_every_steps = config.checkpoint_every_steps = 500
    config.eval.update(batch_size=64, num_batches=0, prompts=("import [MASK]", "def [MASK](self):"))
    config.checkpoint.keep_every = 0
    config.data.validation_fraction = 0.05
    config.unroll = 0
    return dict(
        name="muon",
        learning_rate=0.02,
        adam_learning_rate_ratio=0.15,
        weight_decay=0.01,
        schedule="linear",
        warmup_steps=50,
    )


def make_roberta(
    config: ConfigDict, layers: int, width: int, heads: int, rate: float, warmup_steps: int
) -> dict:
    # RoBERTa counts positions from pad_id + 1: 2 in the released models, 1 with the tokenizers that are made here.
    config.model = make_encoder(
        layers, width, heads, vocab_size=50265, norm_eps=1e-5, num_token_types=1, position_offset=1
    )
    config.tokenizer.update(kind="byte_bpe", vocab_size=50265)
    config.batch_size, config.seq_len, config.num_train_steps = 8192, 512, 500_000
    make_large(config)
    return dict(
        name="adamw",
        learning_rate=rate,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.01,
        schedule="linear",
        warmup_steps=warmup_steps,
        grad_clip_norm=0.0,
    )


def make_large(config: ConfigDict) -> None:
    set_intervals(config, 5000)
    config.eval.prompts = ("The capital of France is [MASK].",)
