r"""BART: encoder-decoders with learned positions, pretrained to restore text that was broken.

    python -m jaxlm.pretrain --config=configs/bart.py:tiny --workdir=/tmp/bart

The argument is a variant and optional choices, e.g. `configs/bart.py:tiny,objective=span_corruption`.

variant       what, hardware, what to expect
tiny          BART's shape in miniature (3.6M), on the running Python's standard library; see `make_tiny`
base, large   Lewis et al. 2019, arXiv:1910.13461, section 5: 500,000 steps of 8,000 rows of 512 tokens of RoBERTa's 160 GB, of
              which text infilling hides 30%, sentences permuted; the rest of the recipe is RoBERTa's, since theirs is
              unpublished; XSum ROUGE-1/2/L 45.1/22.3/37.3, SQuAD 1.1 F1 94.6 (large)
"""

from ml_collections import ConfigDict

from configs.common import (
    OPTIMIZERS,
    SCHEDULES,
    base,
    choose_optimizer,
    make_model,
    parse_arg,
    seq2seq_objective,
    set_intervals,
)

# name: (layers of each stack, width, heads, learning rate, warm-up steps)
BART = {
    "tiny": (3, 192, 4, 1e-3, 50),
    "base": (6, 768, 12, 6e-4, 24_000),
    "large": (12, 1024, 16, 4e-4, 30_000),
}

VARIANTS = tuple(BART)


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see the module's docstring.

    arg: 'variant[,objective=denoising|span_corruption][,optimizer=…][,schedule=…]'.
    """
    chosen = parse_arg(
        arg,
        VARIANTS,
        objective=("denoising", "span_corruption"),
        optimizer=("", *OPTIMIZERS),
        schedule=("", *SCHEDULES, "plateau"),
    )
    variant = chosen["variant"]
    config = base()
    config.family = "encoder_decoder"
    config.objective = seq2seq_objective(chosen["objective"], "eos")
    recipe = make_bart(config, *BART[variant])
    if variant == "tiny":
        recipe = make_tiny(config)
    config.optimizer = choose_optimizer(recipe, chosen["optimizer"], chosen["schedule"])
    return config


def make_bart(
    config: ConfigDict, layers: int, width: int, heads: int, rate: float, warmup_steps: int
) -> dict:
    # Positions begin at row 2 of their table, as in the released models.
    config.model = make_model(
        vocab_size=50265,
        emb_dim=width,
        num_layers=layers,
        num_heads=heads,
        max_len=1024,
        norm_position="post",
        position_offset=2,
        embed_norm=True,
        activation="gelu",
        dropout_rate=0.1,
        attention_dropout_rate=0.1,
    )
    config.tokenizer.update(kind="byte_bpe", vocab_size=50265, num_sentinels=100)
    config.batch_size, config.seq_len, config.num_train_steps = 8000, 512, 500_000
    set_intervals(config, 5000)
    return dict(
        name="adamw",
        learning_rate=rate,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.01,
        schedule="linear",
        warmup_steps=warmup_steps,
    )


def make_tiny(config: ConfigDict) -> dict:
    """A vocabulary of 2,048, no dropout (it never sees a text often) and a short recipe."""
    config.model.update(vocab_size=2048, max_len=256, dropout_rate=0.0, attention_dropout_rate=0.0)
    config.tokenizer.update(vocab_size=2048)
    config.batch_size, config.seq_len, config.num_train_steps = 16, 128, 600
    config.log_every_steps = 10
    config.eval_every_steps = config.checkpoint_every_steps = 200
    config.eval.update(batch_size=16, num_batches=16)
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
