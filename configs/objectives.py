"""One small model by each of six objectives, on as much text: what `tools/compare_objectives.py` pretrains.

    python -m jaxlm.pretrain --config=configs/objectives.py:span_corruption --workdir=W

The Block is the same in all: 4 layers, 128 wide, rotary positions, RMS norm, SwiGLU; 1.1M parameters in an encoder or a
decoder. An encoder-decoder has two such stacks, and rtd a generator half as wide beside its encoder. All read 1.6M raw tokens
of the running Python's standard library (`num_train_steps` follows from how many a row reads), by the same optimizer; rows of
other lengths are cut elsewhere and come in another order, so these tokens are not the same ones in all. A minute or two each
on one CPU core.

objective        family            paper
mlm              encoder           Devlin et al. 2018, arXiv:1810.04805
rtd              encoder           Clark et al. 2020, arXiv:2003.10555
causal           decoder           Radford et al. 2018
prefix_lm        decoder           Raffel et al. 2020, arXiv:1910.10683, section 3.2.2
span_corruption  encoder-decoder   Raffel et al. 2020, arXiv:1910.10683, section 3.1.4
denoising        encoder-decoder   Lewis et al. 2019, arXiv:1910.13461: text infilling
"""

from ml_collections import ConfigDict

from configs.common import NO_BIAS, base, make_model, make_optimizer

MASKING = dict(
    rate=0.15,
    mask_share=0.8,
    random_share=0.1,
    whole_word=False,
    max_ngram=1,
    ngram_decay=0.0,
    static=False,
)
ENDING = dict(label_smoothing=0.0, chunk_tokens=0)
SEQ2SEQ = dict(decoder_start="pad", z_loss=0.0, **ENDING)

# objective: (family, its options, raw tokens that a row of 128 reads)
OBJECTIVES = {
    "mlm": ("bert", MASKING | ENDING, 126),
    "rtd": (
        "electra",
        MASKING | dict(mask_share=0.85, random_share=0.0, discriminator_weight=10.0) | ENDING,
        126,
    ),
    "causal": ("gpt", dict(z_loss=0.0, **ENDING), 128),
    "prefix_lm": ("gpt", dict(z_loss=0.0, **ENDING), 128),
    "span_corruption": ("encoder_decoder", dict(noise_density=0.15, mean_span=3.0, **SEQ2SEQ), 141),
    "denoising": (
        "encoder_decoder",
        dict(
            permute_sentences=0.0,
            rotate=0.0,
            infill_rate=0.3,
            mean_span=3.0,
            delete_rate=0.0,
            mask_rate=0.0,
            **SEQ2SEQ | dict(decoder_start="eos"),
        ),
        128,
    ),
}
TOKENS, ROWS, LENGTH = 1_600_000, 32, 128


def get_config(arg: str = "mlm") -> ConfigDict:
    """The config of one objective."""
    if arg not in OBJECTIVES:
        raise ValueError(f"unknown objective {arg!r}; known: {', '.join(OBJECTIVES)}")
    family, options, row_tokens = OBJECTIVES[arg]
    config = base()
    config.family = family
    config.objective = dict(name=arg, **options)
    config.model = make_model(
        vocab_size=2048,
        emb_dim=128,
        num_layers=4,
        num_heads=4,
        mlp_dim=384,
        max_len=1024,
        norm="rms_norm",
        norm_eps=1e-6,
        position="rotary",
        activation="swiglu",
        qk_norm=True,
        zero_init_out=True,
        **NO_BIAS,
    )
    if family == "electra":
        config.generator = ConfigDict(dict(width=0.5, depth=1.0))
    config.tokenizer.update(kind="byte_bpe", vocab_size=2048, num_sentinels=32)
    config.batch_size, config.seq_len = ROWS, LENGTH
    config.num_train_steps = round(TOKENS / (ROWS * row_tokens))
    config.eval_every_steps = config.checkpoint_every_steps = config.num_train_steps
    config.eval.update(num_batches=16, prompts=())
    config.unroll = 0
    config.optimizer = make_optimizer(
        "muon",
        0.02,
        "linear",
        adam_learning_rate_ratio=0.15,
        weight_decay=0.01,
        warmup_steps=20,
    )
    return config
