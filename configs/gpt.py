r"""Decoder-only language models: a laptop's, nanoGPT's, GPT-2, GPT-3, Llama 3 and Qwen3.

    python -m jaxlm.pretrain --config=configs/gpt.py:tiny --workdir=/tmp/tiny

The argument is a variant and optional choices, e.g. `configs/gpt.py:tiny,optimizer=lion,schedule=wsd`.

variant            what, command, hardware, what to expect
tiny               Qwen3's shape in miniature (2.7M), on the running Python's standard library; 400 steps, 6 minutes on
                   2 CPU cores; measured: 1.74 bits per byte of held-out text (gzip -9 1.94, xz -9 1.56)
nanogpt            0.80M parameters on tinyshakespeare's characters, as in github.com/karpathy/nanoGPT (README, "I only
                   have a macbook"): 2,000 steps of 12 x 64, about 2 minutes on 2 CPU cores, held-out loss 1.88 there, 1.896 here
                   python -m jaxlm.pretrain --config=configs/gpt.py:nanogpt --workdir=W \
                     --config.data.sources="('input.txt',)"
shakespeare        the same size and data as nanogpt, our recipe (Muon, rotary positions, QK norm, ReLU^2, zero-initialised
                   outputs, softcap): held-out loss 1.573, mean of seeds 0, 1, 2; 6 minutes on one CPU core
gpt2 … gpt2_xl     Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; recipe of nanoGPT for
                   OpenWebText: 600,000 steps of 0.5M tokens, 8 A100 for 4 days for the smallest, held-out loss 2.85
gpt3_125m … 175b   Brown et al. 2020, arXiv:2005.14165, tables 2.1 and D.1, dense attention in every layer; 300B tokens;
                   V100 cluster; 175b: 20.5 perplexity on Penn Treebank, zero-shot
llama3_1b/8b/70b   Grattafiori et al. 2024, arXiv:2407.21783, table 3 (1b: the model card of Llama 3.2); 15T tokens on
                   up to 16,384 H100; here with fsdp over all devices, e.g. a v5p-128 pod slice for 8b
tiny_moe           tiny's shape with 8 experts of which a token uses 2 (6.8M parameters, 2.7M of them active), dropless
mixtral_8x7b       Jiang et al. 2024, arXiv:2401.04088, table 1: 46.7B parameters, 12.9B active; what it was trained on and how
                   is unpublished: the recipe is Llama 3's
qwen3_30b_a3b      Yang et al. 2025, arXiv:2505.09388, table 3: 30.5B parameters, 3.3B active; its recipe as for qwen3_8b
qwen3_0_6b/8b      Yang et al. 2025, arXiv:2505.09388, tables 1 and 2; 36T tokens; its learning rates are unpublished, so
                   they are ours

objective: causal, prefix_lm (each document's prefix is seen whole and not predicted), fim (half of the documents are
rearranged to fill in the middle; arXiv:2207.14255), or mixture: all three, a third of the rows each.
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
    set_intervals,
)

# name: (layers, width, heads, head_dim, tokens a batch, learning rate) of arXiv:2005.14165, table 2.1. Where that table
# contradicts itself (XL: 24 heads of 128 in a width of 2048; 13B: a width of 5140), the sizes are those that give
# table D.1's parameter counts.
GPT3 = {
    "gpt3_125m": (12, 768, 12, 64, 0.5e6, 6e-4),
    "gpt3_350m": (24, 1024, 16, 64, 0.5e6, 3e-4),
    "gpt3_760m": (24, 1536, 16, 96, 0.5e6, 2.5e-4),
    "gpt3_1_3b": (24, 2048, 16, 128, 1e6, 2e-4),
    "gpt3_2_7b": (32, 2560, 32, 80, 1e6, 1.6e-4),
    "gpt3_6_7b": (32, 4096, 32, 128, 2e6, 1.2e-4),
    "gpt3_13b": (40, 5120, 40, 128, 2e6, 1e-4),
    "gpt3_175b": (96, 12288, 96, 128, 3.2e6, 0.6e-4),
}

# name: (layers, width, heads, learning rate); the rates are GPT-3's for models of these sizes.
GPT2 = {
    "gpt2": (12, 768, 12, 6e-4),
    "gpt2_medium": (24, 1024, 16, 3e-4),
    "gpt2_large": (36, 1280, 20, 2.5e-4),
    "gpt2_xl": (48, 1600, 25, 2e-4),
}

# name: (layers, width, heads, kv heads, head_dim, mlp_dim, tied, rope factor, learning rate)
LLAMA3 = {
    "llama3_1b": (16, 2048, 32, 8, 64, 8192, True, 32.0, 3e-4),
    "llama3_8b": (32, 4096, 32, 8, 128, 14336, False, 8.0, 3e-4),
    "llama3_70b": (80, 8192, 64, 8, 128, 28672, False, 8.0, 1.5e-4),
}

# Of Switch (arXiv:2101.03961, section 2.2) and ST-MoE (arXiv:2202.08906, section 3.3).
ROUTER_LOSSES = dict(router_aux_weight=0.01, router_z_weight=0.001)

# name: (layers, width, heads, kv heads, mlp_dim, tied, learning rate)
QWEN3 = {
    "qwen3_0_6b": (28, 1024, 16, 8, 3072, True, 1e-3),
    "qwen3_8b": (36, 4096, 32, 8, 12288, False, 3e-4),
}

MOE = ("mixtral_8x7b", "qwen3_30b_a3b")

VARIANTS = ("tiny", "tiny_moe", "nanogpt", "shakespeare", *GPT2, *GPT3, *LLAMA3, *QWEN3, *MOE)


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see the module's docstring.

    arg: 'variant[,objective=causal|prefix_lm|fim|mixture][,optimizer=…][,schedule=…]'; schedule 'plateau' lowers a constant rate by the held-out loss.
    """
    chosen = parse_arg(
        arg,
        VARIANTS,
        objective=("causal", "prefix_lm", "fim", "mixture"),
        optimizer=("", *OPTIMIZERS),
        schedule=("", *SCHEDULES, "plateau"),
    )
    variant = chosen["variant"]
    config = base()
    config.family = "gpt"
    config.objective = make_objective(chosen["objective"])
    config.tokenizer.num_sentinels = 3 if chosen["objective"] in ("fim", "mixture") else 0
    if variant == "tiny":
        recipe = make_tiny(config)
    elif variant == "tiny_moe":
        recipe = make_tiny_moe(config)
    elif variant == "nanogpt":
        recipe = make_nanogpt(config)
    elif variant == "shakespeare":
        recipe = make_shakespeare(config)
    elif variant in GPT2:
        recipe = make_gpt2(config, *GPT2[variant])
    elif variant in GPT3:
        recipe = make_gpt3(config, *GPT3[variant])
    elif variant in LLAMA3:
        recipe = make_llama3(config, *LLAMA3[variant])
    elif variant in QWEN3:
        recipe = make_qwen3(config, *QWEN3[variant])
    elif variant == "mixtral_8x7b":
        recipe = make_mixtral_8x7b(config)
    else:
        recipe = make_qwen3_30b_a3b(config)
    config.optimizer = choose_optimizer(recipe, chosen["optimizer"], chosen["schedule"])
    return config


def make_objective(name: str) -> ConfigDict:
    """The objective's group. A mixture is of all three, a third of the rows each."""
    own = dict(causal={}, prefix_lm={}, fim=dict(rate=0.5, spm_share=0.5))
    own["mixture"] = dict(
        objectives={part: dict(name=part, **options) for part, options in own.items()},
        shares=(),
        loss_weights="",
        adapt=0.0,
    )
    return ConfigDict(dict(name=name, **own[name], z_loss=0.0, label_smoothing=0.0, chunk_tokens=0))


def make_tiny(config: ConfigDict) -> dict:
    config.model = make_model(
        vocab_size=2048,
        emb_dim=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=448,
        max_len=1024,
        norm="rms_norm",
        norm_eps=1e-6,
        position="rotary",
        activation="swiglu",
        qk_norm=True,
        zero_init_out=True,
        **NO_BIAS,
    )
    config.tokenizer.update(kind="byte_bpe", vocab_size=2048)
    config.batch_size, config.seq_len, config.num_train_steps = 8, 256, 400
    config.eval_every_steps = config.checkpoint_every_steps = 200
    config.eval.update(num_batches=16, prompts=("def main(", "class ", "import "))
    config.unroll = 0
    # Muon: a step takes 1.5 times as long as with AdamW on two CPU cores, and is worth more than that: after equal
    # time 1.96 against 2.28 bits per byte.
    return dict(
        name="muon",
        learning_rate=0.03,
        adam_learning_rate_ratio=0.2,
        weight_decay=0.01,
        schedule="linear",
        warmup_steps=20,
    )


def make_tiny_moe(config: ConfigDict) -> dict:
    recipe = make_tiny(config)
    config.model.update(mlp_dim=224, num_experts=8, experts_per_token=2, **ROUTER_LOSSES)
    return recipe


def make_nanogpt(config: ConfigDict) -> dict:
    config.model = make_model(
        vocab_size=80,
        emb_dim=128,
        num_layers=4,
        num_heads=4,
        max_len=64,
        activation="gelu",
        **NO_BIAS,
    )
    make_characters(config)
    return dict(
        name="adamw",
        learning_rate=1e-3,
        b2=0.99,
        weight_decay=0.1,
        schedule="cosine",
        warmup_steps=100,
        final_ratio=0.1,
    )


def make_shakespeare(config: ConfigDict) -> dict:
    config.model = make_model(
        vocab_size=80,
        emb_dim=128,
        num_layers=4,
        num_heads=4,
        max_len=64,
        norm="rms_norm",
        position="rotary",
        activation="relu2",
        qk_norm=True,
        final_softcap=15.0,
        zero_init_out=True,
        **NO_BIAS,
    )
    make_characters(config)
    return dict(
        name="muon",
        learning_rate=0.02,
        adam_learning_rate_ratio=0.25,
        weight_decay=0.01,
        schedule="linear",
        warmup_steps=50,
    )


def make_characters(config: ConfigDict) -> None:
    """nanoGPT's data and its amount of training: tinyshakespeare by characters, the last tenth held out."""
    config.tokenizer.update(kind="chars", vocab_size=80)
    config.data.update(sources=("input.txt",), split="tail", validation_fraction=0.1)
    config.batch_size, config.seq_len, config.num_train_steps = 12, 64, 2000
    config.eval_every_steps = config.checkpoint_every_steps = 500
    config.eval.update(batch_size=64, prompts=("ROMEO:", "First Citizen:\n"), sample_tokens=48)
    config.unroll = 0


def make_gpt2(config: ConfigDict, layers: int, width: int, heads: int, rate: float) -> dict:
    config.model = make_model(
        emb_dim=width, num_layers=layers, num_heads=heads, vocab_size=50257, max_len=1024
    )
    config.tokenizer.update(kind="byte_bpe", vocab_size=50257)
    config.batch_size, config.seq_len, config.num_train_steps = 480, 1024, 600_000
    make_large(config)
    return dict(
        name="adamw", learning_rate=rate, schedule="cosine", warmup_steps=2000, final_ratio=0.1
    )


def make_gpt3(
    config: ConfigDict,
    layers: int,
    width: int,
    heads: int,
    head_dim: int,
    batch_tokens: float,
    rate: float,
) -> dict:
    config.model = make_model(
        emb_dim=width, num_layers=layers, num_heads=heads, head_dim=head_dim, max_len=2048
    )
    config.tokenizer.update(kind="byte_bpe", vocab_size=50257)
    config.seq_len = 2048
    config.batch_size = round(batch_tokens / 2048 / 64) * 64
    config.num_train_steps = int(300e9 / (config.batch_size * config.seq_len))
    make_large(config)
    if width >= 2048:
        config.mesh.update(data=1, fsdp=-1)
        config.remat = "dots"
    # Warm-up over 375M tokens, as in the paper's appendix B; its decay ends at 260B of 300B tokens, ours at the end.
    return dict(
        name="adamw",
        learning_rate=rate,
        schedule="cosine",
        warmup_steps=round(375e6 / (config.batch_size * config.seq_len)),
        final_ratio=0.1,
    )


def make_llama3(
    config: ConfigDict,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    tied: bool,
    rope_factor: float,
    rate: float,
) -> dict:
    config.model = make_model(
        vocab_size=128256,
        emb_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        max_len=131072,
        norm="rms_norm",
        position="rotary",
        rope_theta=500000.0,
        rope_scaling=(rope_factor, 1.0, 4.0, 8192.0),
        activation="swiglu",
        tie_embeddings=tied,
        **NO_BIAS,
    )
    config.tokenizer.update(kind="byte_bpe", vocab_size=128256)
    config.batch_size, config.seq_len, config.num_train_steps = 512, 8192, 1_200_000
    make_large(config)
    config.mesh.update(data=1, fsdp=-1)
    config.remat = "dots"
    return dict(
        name="adamw",
        learning_rate=rate,
        eps=1e-5,
        schedule="cosine",
        warmup_steps=8000,
        final_ratio=0.01,
    )


def make_qwen3(
    config: ConfigDict,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp_dim: int,
    tied: bool,
    rate: float,
) -> dict:
    config.model = make_model(
        vocab_size=151936,
        emb_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        mlp_dim=mlp_dim,
        max_len=40960,
        norm="rms_norm",
        norm_eps=1e-6,
        position="rotary",
        rope_theta=1000000.0,
        activation="swiglu",
        qk_norm=True,
        tie_embeddings=tied,
        **NO_BIAS,
    )
    config.tokenizer.update(kind="byte_bpe", vocab_size=151936)
    config.batch_size, config.seq_len, config.num_train_steps = 1024, 4096, 500_000
    make_large(config)
    config.mesh.update(data=1, fsdp=-1)
    config.remat = "dots"
    return dict(
        name="adamw", learning_rate=rate, schedule="wsd", warmup_steps=2000, final_ratio=0.1
    )


def make_mixtral_8x7b(config: ConfigDict) -> dict:
    recipe = make_llama3(config, 32, 4096, 32, 8, 128, 14336, False, 1.0, 3e-4)
    config.model.update(vocab_size=32000, max_len=32768, rope_theta=1e6, rope_scaling=())
    config.model.update(num_experts=8, experts_per_token=2, **ROUTER_LOSSES)
    config.tokenizer.update(vocab_size=32000)
    config.seq_len = 4096
    return recipe


def make_qwen3_30b_a3b(config: ConfigDict) -> dict:
    recipe = make_qwen3(config, 48, 2048, 32, 4, 768, False, 3e-4)
    config.model.update(num_experts=128, experts_per_token=8, **ROUTER_LOSSES)
    return recipe


def make_large(config: ConfigDict) -> None:
    set_intervals(config, 2000)
    config.eval.prompts = ("The meaning of life is",)
