r"""The Transformer as it was published: sinusoidal positions, norms after each sum, one table for all tokens.

    python -m jaxlm.pretrain --config=configs/transformer.py:tiny --workdir=/tmp/transformer

The argument is a variant and optional choices, e.g. `configs/transformer.py:tiny,objective=denoising`.

variant     what, hardware, what to expect
tiny        its shape in miniature (3.5M), on the running Python's standard library; see `make_tiny`
base, big   Vaswani et al. 2017, arXiv:1706.03762, table 3: 100,000 and 300,000 steps of about 25,000 source and 25,000 target
            tokens, 8 P100 for 12 hours and 3.5 days; WMT 2014 English-German 27.3 and 28.4 BLEU

The paper has no pretraining: translation alone is `configs/finetune/translation.py`. Here the same recipe learns an objective
on plain text first.
"""

from ml_collections import ConfigDict

from configs.common import (
    OPTIMIZERS,
    SCHEDULES,
    SEQ2SEQ,
    base,
    choose_optimizer,
    make_model,
    parse_arg,
    seq2seq_objective,
)

# name: (layers of each stack, width, heads, dropout, steps)
TRANSFORMER = {
    "tiny": (3, 192, 4, 0.0, 600),
    "base": (6, 512, 8, 0.1, 100_000),
    "big": (6, 1024, 16, 0.3, 300_000),
}

VARIANTS = tuple(TRANSFORMER)


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see the module's docstring. arg: 'variant[,objective=…][,optimizer=…][,schedule=…]'."""
    chosen = parse_arg(
        arg,
        VARIANTS,
        objective=tuple(SEQ2SEQ),
        optimizer=("", *OPTIMIZERS),
        schedule=("", *SCHEDULES, "plateau"),
    )
    variant = chosen["variant"]
    config = base()
    config.family = "encoder_decoder"
    config.objective = seq2seq_objective(chosen["objective"], "bos", label_smoothing=0.1)
    recipe = make_transformer(config, *TRANSFORMER[variant])
    if variant == "tiny":
        recipe = make_tiny(config)
    config.optimizer = choose_optimizer(recipe, chosen["optimizer"], chosen["schedule"])
    return config


def make_transformer(
    config: ConfigDict, layers: int, width: int, heads: int, dropout: float, steps: int
) -> dict:
    config.model = make_model(
        vocab_size=37000,
        emb_dim=width,
        num_layers=layers,
        num_heads=heads,
        max_len=1024,
        norm_position="post",
        position="sinusoidal",
        scale_embeddings=True,
        embed_init_std=width**-0.5,
        activation="relu",
        qkv_bias=False,
        out_bias=False,
        dropout_rate=dropout,
    )
    config.tokenizer.update(kind="byte_bpe", vocab_size=37000, num_sentinels=100)
    config.batch_size, config.seq_len, config.num_train_steps = 96, 256, steps
    config.log_every_steps = 50
    config.eval_every_steps = config.checkpoint_every_steps = 2000
    config.eval.update(batch_size=64, num_batches=100)
    config.data.validation_fraction = 0.001
    # Section 5.3: width^-0.5 min(step^-0.5, step 4000^-1.5).
    return dict(
        name="adamw",
        learning_rate=(width * 4000) ** -0.5,
        b2=0.98,
        eps=1e-9,
        weight_decay=0.0,
        schedule="inverse_sqrt",
        warmup_steps=4000,
        grad_clip_norm=0.0,
    )


def make_tiny(config: ConfigDict) -> dict:
    """A vocabulary of 2,048 and a short recipe."""
    config.model.update(vocab_size=2048)
    config.tokenizer.update(vocab_size=2048)
    config.batch_size, config.seq_len = 16, 192
    config.log_every_steps = 10
    config.eval_every_steps = config.checkpoint_every_steps = 200
    config.eval.update(batch_size=16, num_batches=16)
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
