"""ELECTRA pretraining recipes: `configs/electra.py:base`, with `optimizer=…` and `schedule=…`.

Sizes, data and recipes of the paper (arXiv:2003.10555, section 3 and table 6); the parameter counts are those of the
discriminator, which is what is left afterwards: fine-tuning and export take it and leave the generator.

tiny     1.0M        BERT-Tiny's width, a generator half as wide, 128-token rows of the running Python's standard library
small    13.5M       1M steps of 128 x 128 tokens, 4 days on one V100; GLUE 79.9 (BERT-Small 75.1)
base     109M        766,000 steps of 256 x 512 tokens; GLUE 85.1 (BERT-Base 82.2)
large    334M        400,000 steps of 2,048 x 512 tokens, a quarter of RoBERTa's compute; 25% of the tokens are masked
"""

from ml_collections import ConfigDict

from configs.bert import make_encoder, make_large
from configs.bert import make_tiny as make_tiny_bert
from configs.common import OPTIMIZERS, SCHEDULES, base, choose_optimizer, parse_arg

# name: (layers, width, heads, width of the embeddings, generator's share of the width, masked share)
ELECTRA = {
    "tiny": (2, 128, 2, 128, 1 / 2, 0.15),
    "small": (12, 256, 4, 128, 1 / 4, 0.15),
    "base": (12, 768, 12, 768, 1 / 3, 0.15),
    "large": (24, 1024, 16, 1024, 1 / 4, 0.25),
}

# name: (rows in a batch, tokens in a row, steps, learning rate)
RECIPES = {
    "small": (128, 128, 1_000_000, 5e-4),
    "base": (256, 512, 766_000, 2e-4),
    "large": (2048, 512, 400_000, 2e-4),
}

VARIANTS = tuple(ELECTRA)


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see the module's docstring. arg: 'variant[,optimizer=…][,schedule=…]'."""
    chosen = parse_arg(
        arg, VARIANTS, optimizer=("", *OPTIMIZERS), schedule=("", *SCHEDULES, "plateau")
    )
    variant = chosen["variant"]
    layers, width, heads, embeddings, share, rate = ELECTRA[variant]
    config = base()
    config.family = "electra"
    config.model = make_encoder(
        layers,
        width,
        heads,
        vocab_size=30522,
        norm_eps=1e-12,
        num_token_types=2,
        embed_factor_dim=0 if embeddings == width else embeddings,
    )
    config.generator = ConfigDict(dict(width=share, depth=1.0))
    config.objective = ConfigDict(
        dict(
            name="rtd",
            rate=rate,
            mask_share=0.85,
            random_share=0.0,
            whole_word=False,
            max_ngram=1,
            ngram_decay=0.0,
            static=False,
            label_smoothing=0.0,
            chunk_tokens=0,
            discriminator_weight=50.0,
        )
    )
    recipe = make_tiny(config) if variant == "tiny" else make_published(config, *RECIPES[variant])
    config.optimizer = choose_optimizer(recipe, chosen["optimizer"], chosen["schedule"])
    return config


def make_tiny(config: ConfigDict) -> dict:
    """Of BERT's tiny, with 10 in place of 50 before the detection loss: a short run has to learn to fill masks first."""
    recipe = make_tiny_bert(config)
    config.objective.discriminator_weight = 10.0
    return recipe


def make_published(
    config: ConfigDict, batch_size: int, seq_len: int, steps: int, learning_rate: float
) -> dict:
    config.tokenizer.update(kind="unigram", vocab_size=30522)
    config.batch_size, config.seq_len, config.num_train_steps = batch_size, seq_len, steps
    make_large(config)
    return dict(
        name="adamw",
        learning_rate=learning_rate,
        b2=0.999,
        eps=1e-6,
        weight_decay=0.01,
        schedule="linear",
        warmup_steps=10_000,
    )
