"""XLNet pretraining recipes: `configs/xlnet.py:base`, with `optimizer=…` and `schedule=…`.

Sizes and recipes of the paper (arXiv:1906.08237, appendix A.4). Documents are packed, so there is no memory of the
segment before (Transformer-XL's recurrence), and no pairs of segments.

tiny     1.0M        128-token rows of the running Python's standard library
base     117M        the base of the paper's ablations: BERT-Base's size; 256 rows of 512 tokens, as on BERT's data
large    360M        500,000 steps of 8,192 x 512 tokens, 5.5 days on 512 TPU v3 chips; GLUE's MNLI 90.8
"""

from ml_collections import ConfigDict

from configs.bert import make_large
from configs.bert import make_tiny as make_tiny_bert
from configs.common import OPTIMIZERS, SCHEDULES, base, choose_optimizer, make_model, parse_arg

# name: (layers, width, heads)
XLNET = {"tiny": (2, 128, 2), "base": (12, 768, 12), "large": (24, 1024, 16)}
# name: (rows in a batch, steps, learning rate, warm-up steps)
RECIPES = {"base": (256, 1_000_000, 1e-4, 20_000), "large": (8192, 500_000, 4e-4, 40_000)}
VARIANTS = tuple(XLNET)


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see the module's docstring. arg: 'variant[,optimizer=…][,schedule=…]'."""
    chosen = parse_arg(
        arg, VARIANTS, optimizer=("", *OPTIMIZERS), schedule=("", *SCHEDULES, "plateau")
    )
    variant = chosen["variant"]
    layers, width, heads = XLNET[variant]
    config = base()
    config.family = "xlnet"
    config.model = make_model(
        vocab_size=32000,
        emb_dim=width,
        num_layers=layers,
        num_heads=heads,
        max_len=512,
        norm_position="post",
        norm_eps=1e-12,
        position="none",
        qkv_bias=False,
        out_bias=False,
        activation="gelu",
        dropout_rate=0.1,
        attention_dropout_rate=0.1,
    )
    config.objective = ConfigDict(
        dict(
            name="permutation",
            partial=6,
            max_span=5,
            static=False,
            label_smoothing=0.0,
            chunk_tokens=0,
        )
    )
    if variant == "tiny":
        recipe = make_tiny_bert(config)
    else:
        recipe = make_published(config, *RECIPES[variant])
    config.optimizer = choose_optimizer(recipe, chosen["optimizer"], chosen["schedule"])
    return config


def make_published(
    config: ConfigDict, batch_size: int, steps: int, learning_rate: float, warmup_steps: int
) -> dict:
    config.tokenizer.update(kind="unigram", vocab_size=32000)
    config.batch_size, config.seq_len, config.num_train_steps = batch_size, 512, steps
    make_large(config)
    return dict(
        name="adamw",
        learning_rate=learning_rate,
        b2=0.999,
        eps=1e-6,
        weight_decay=0.01,
        schedule="linear",
        warmup_steps=warmup_steps,
    )
