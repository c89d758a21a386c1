r"""T5: encoder-decoders with relative positions, pretrained by span corruption.

    python -m jaxlm.pretrain --config=configs/t5.py:tiny --workdir=/tmp/t5

The argument is a variant and optional choices, e.g. `configs/t5.py:tiny,objective=ul2,optimizer=adamw`.

variant                 what, hardware, what to expect
tiny                    T5 v1.1's shape in miniature (3.4M), on the running Python's standard library; see `make_tiny`
small, base, large,     Raffel et al. 2019, arXiv:1910.10683, section 3.1 and 3.7: 524,288 steps of 128 x 512 tokens of C4
3b, 11b                 (the paper's final models: 1M steps of 2,048 x 512), slices of a TPU v3 pod; GLUE 77.4 (small),
                        82.7 (base), 86.4 (large), 88.5 (3b), 90.3 (11b)
v1_1_small, base,       T5 v1.1 and, by size and shape, Flan-T5 (arXiv:2210.11416): gated GELU (arXiv:2002.05202), an output
large, xl, xxl          table of its own, no dropout in pretraining; 1M steps of 2,048 x 512 tokens of C4
                        (github.com/google-research/text-to-text-transfer-transformer, released_checkpoints.md)

objective: span_corruption (theirs), ul2 (Tay et al. 2022, arXiv:2205.05131), seq2seq_prefix_lm, or mixture: span corruption,
denoising and prefix LM, a third of the rows each.
"""

from ml_collections import ConfigDict

from configs.common import (
    NO_BIAS,
    OPTIMIZERS,
    SCHEDULES,
    base,
    choose_optimizer,
    make_model,
    parse_arg,
    seq2seq_objective,
    set_intervals,
)

# name: (layers of each stack, width, heads, head_dim, mlp_dim)
T5 = {
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3b": (24, 1024, 32, 128, 16384),
    "11b": (24, 1024, 128, 128, 65536),
}
T5_1_1 = {
    "v1_1_small": (8, 512, 6, 64, 1024),
    "v1_1_base": (12, 768, 12, 64, 2048),
    "v1_1_large": (24, 1024, 16, 64, 2816),
    "v1_1_xl": (24, 2048, 32, 64, 5120),
    "v1_1_xxl": (24, 4096, 64, 64, 10240),
}

VARIANTS = ("tiny", *T5, *T5_1_1)


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see the module's docstring.

    arg: 'variant[,objective=span_corruption|ul2|seq2seq_prefix_lm|mixture][,optimizer=…][,schedule=…]'.
    """
    chosen = parse_arg(
        arg,
        VARIANTS,
        objective=("span_corruption", "ul2", "seq2seq_prefix_lm", "mixture"),
        optimizer=("", *OPTIMIZERS),
        schedule=("", *SCHEDULES, "plateau"),
    )
    variant = chosen["variant"]
    config = base()
    config.family = "encoder_decoder"
    config.objective = seq2seq_objective(chosen["objective"], "pad", z_loss=1e-4)
    if variant == "tiny":
        recipe = make_tiny(config)
    elif variant in T5:
        recipe = make_t5(config, *T5[variant])
    else:
        recipe = make_t5_1_1(config, *T5_1_1[variant])
    config.optimizer = choose_optimizer(recipe, chosen["optimizer"], chosen["schedule"])
    return config


def make_t5_model(
    layers: int, width: int, heads: int, head_dim: int, mlp_dim: int, **fields
) -> ConfigDict:
    """What both versions share; v1.1 unless `fields` says otherwise."""
    options = dict(
        vocab_size=32128,
        emb_dim=width,
        num_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        max_len=512,
        norm="rms_norm",
        norm_eps=1e-6,
        position="relative",
        activation="geglu_tanh",
        query_scale=1.0,  # no division by the root of head_dim
        tie_embeddings=False,
        **NO_BIAS,
    )
    return make_model(**options | fields)


def make_tiny(config: ConfigDict) -> dict:
    """A vocabulary of 2,048 with 100 sentinels, zero-initialised outputs, and divided queries, as trains fastest."""
    config.model = make_t5_model(
        3, 192, 4, 48, 384, vocab_size=2048, query_scale=0.0, zero_init_out=True
    )
    config.tokenizer.update(kind="byte_bpe", vocab_size=2048, num_sentinels=100)
    config.batch_size, config.seq_len, config.num_train_steps = 16, 192, 600
    config.eval_every_steps = config.checkpoint_every_steps = 200
    config.eval.update(num_batches=16)
    config.unroll = 0
    return dict(
        name="muon",
        learning_rate=0.02,
        adam_learning_rate_ratio=0.2,
        weight_decay=0.01,
        schedule="linear",
        warmup_steps=20,
    )


def make_t5(
    config: ConfigDict, layers: int, width: int, heads: int, head_dim: int, mlp_dim: int
) -> dict:
    config.model = make_t5_model(
        layers,
        width,
        heads,
        head_dim,
        mlp_dim,
        activation="relu",
        tie_embeddings=True,
        embed_init_std=1.0,  # so that tied logits, which are scaled down, begin at size 1
        logit_scale=width**-0.5,
        dropout_rate=0.1,
        attention_dropout_rate=0.1,
    )
    return make_large(config, batch_size=128, num_train_steps=2**19)


def make_t5_1_1(
    config: ConfigDict, layers: int, width: int, heads: int, head_dim: int, mlp_dim: int
) -> dict:
    config.model = make_t5_model(layers, width, heads, head_dim, mlp_dim)
    return make_large(config, batch_size=2048, num_train_steps=1_000_000)


def make_large(config: ConfigDict, batch_size: int, num_train_steps: int) -> dict:
    """Section 3.1.2's recipe, and the intervals and evaluation of a run of days on many devices."""
    # UL2's densest denoiser hides 128 spans in 512 tokens, and three sentinels name its modes.
    num_sentinels = 131 if config.objective.name == "ul2" else 100
    config.tokenizer.update(kind="unigram", vocab_size=32100, num_sentinels=num_sentinels)
    config.batch_size, config.seq_len, config.num_train_steps = batch_size, 512, num_train_steps
    set_intervals(config, 5000)
    if config.model.emb_dim >= 1024:
        config.mesh.update(data=1, fsdp=-1)
        config.remat = "dots"
    return dict(
        name="adafactor",
        learning_rate=0.01,
        schedule="inverse_sqrt",
        warmup_steps=10_000,
        grad_clip_norm=0.0,
    )
