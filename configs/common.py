"""Field groups that every pretraining config is made of, and the argument after its colon.

A config holds decisions only: nothing derived, nothing optional, and in the optimizer's group only what that optimizer
and its schedule read. Leaves are int, float, str, bool or tuple.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

# What each optimizer reads besides learning_rate, schedule and grad_clip_norm.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1),
    "adafactor": dict(),
    "lion": dict(b1=0.9, b2=0.99, weight_decay=1.0),
    "lamb": dict(b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01),
    "muon": dict(
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        weight_decay=0.1,
        adam_learning_rate_ratio=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
    ),
    "sgd": dict(momentum=0.9),
}

# A first guess of an optimizer's learning rate, in units of AdamW's: what `optimizer=` changes a recipe's rate by.
RELATIVE_RATES = {
    "adamw": 1.0,
    "adafactor": 10.0,
    "lion": 0.2,
    "lamb": 5.0,
    "muon": 10.0,
    "sgd": 100.0,
}

# What each schedule reads besides learning_rate and num_train_steps.
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": dict(warmup_steps=0),
    "linear": dict(warmup_steps=0, final_ratio=0.0),
    "cosine": dict(warmup_steps=0, final_ratio=0.1),
    "inverse_sqrt": dict(warmup_steps=1000),
    "wsd": dict(warmup_steps=0, final_ratio=0.0, cooldown_fraction=0.2, cooldown_shape="linear"),
}

# What each objective of an encoder-decoder reads besides what all of them do (`seq2seq_objective`).
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "span_corruption": dict(noise_density=0.15, mean_span=3.0),
    "denoising": dict(
        permute_sentences=1.0,
        rotate=0.0,
        infill_rate=0.3,
        mean_span=3.0,
        delete_rate=0.0,
        mask_rate=0.0,
    ),
    "ul2": dict(),
    "seq2seq_prefix_lm": dict(rate=0.0),
}
SEQ2SEQ["mixture"] = dict(
    objectives={
        name: dict(name=name, **SEQ2SEQ[name])
        for name in ("span_corruption", "denoising", "seq2seq_prefix_lm")
    },
    shares=(),
    loss_weights="",
    adapt=0.0,
)


def parse_arg(arg: str, variants: Iterable[str], **choices: Any) -> dict[str, Any]:
    """Reads 'variant,key=value,…' into a dict with `variant` and every key of `choices`.

    choices: for each key a tuple of the allowed strings, the first being the default, or a plain default (str, int,
    float, bool) whose type the value takes.
    Raises ValueError that lists everything unknown, and what is known.
    """
    known = tuple(variants)
    first, *rest = arg.split(",")
    if "=" in first:
        first, rest = "", [first, *rest]
    values: dict[str, Any] = {
        key: choice[0] if isinstance(choice, tuple) else choice for key, choice in choices.items()
    }
    problems = []
    variant = first.strip() or known[0]
    if variant not in known:
        problems.append(
            f"unknown variant {variant!r}{meant(variant, known)}; known: {', '.join(known)}"
        )
    for part in filter(str.strip, rest):
        key, equals, text = part.partition("=")
        key = key.strip()
        if key not in choices or not equals:
            near = meant(key, choices)
            problems.append(
                f"unknown {part!r}{near}; expected key=value with a key of {', '.join(choices)}"
            )
            continue
        try:
            values[key] = parse_value(text, choices[key])
        except ValueError as error:
            problems.append(f"{key}={text}: {error}")
    if problems:
        raise ValueError(f"config argument {arg!r}:\n  " + "\n  ".join(problems))
    return {"variant": variant, **values}


def meant(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def parse_value(text: str, choice: Any) -> Any:
    if isinstance(choice, str):
        return text  # as it is: the space that ends a prefix is part of it
    text = text.strip()
    if isinstance(choice, tuple):
        if text not in choice:
            raise ValueError(
                f"expected one of {', '.join(filter(None, choice))}{meant(text, choice)}"
            )
        return text
    if isinstance(choice, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("use true or false")
        return text.lower() == "true"
    return type(choice)(text)


def make_optimizer(
    name: str, learning_rate: float, schedule: str, *, grad_clip_norm: float = 1.0, **fields: Any
) -> ConfigDict:
    """The optimizer's group: its own fields and its schedule's, overridden by `fields` where they are read.

    schedule: a key of SCHEDULES, or 'plateau': constant after warm-up, times a factor that falls whenever the held-out
    loss has not.
    """
    plateau = schedule == "plateau"
    schedule = "constant" if plateau else schedule
    known_schedule = {k: fields.get(k, v) for k, v in SCHEDULES[schedule].items()}
    group = ConfigDict(
        dict(
            name=name,
            learning_rate=learning_rate,
            **{k: fields.get(k, v) for k, v in OPTIMIZERS[name].items()},
            grad_clip_norm=grad_clip_norm,
            schedule=dict(name=schedule, **known_schedule),
        )
    )
    if plateau:
        group.plateau = ConfigDict(dict(factor=0.5, patience=3, rtol=1e-3, min_scale=0.01))
    return group


def set_intervals(config: ConfigDict, every: int) -> None:
    """Intervals and evaluation of a run of days on many devices, which is evaluated `every` so many steps."""
    config.log_every_steps = 50
    config.eval_every_steps = config.checkpoint_every_steps = every
    config.eval.update(batch_size=64, num_batches=100)
    config.checkpoint.keep_every = 10 * every
    config.data.validation_fraction = 0.001


def choose_optimizer(recipe: dict[str, Any], optimizer: str, schedule: str) -> ConfigDict:
    """The optimizer's group of a recipe (arguments of `make_optimizer`), with another optimizer or schedule if named.

    Another optimizer has its own defaults, and a learning rate scaled by RELATIVE_RATES.
    """
    recipe = dict(recipe)
    if optimizer and optimizer != recipe["name"]:
        own = OPTIMIZERS[recipe["name"]]
        ratio = RELATIVE_RATES[optimizer] / RELATIVE_RATES[recipe["name"]]
        recipe = {key: value for key, value in recipe.items() if key not in own}
        recipe.update(name=optimizer, learning_rate=recipe["learning_rate"] * ratio)
    return make_optimizer(**recipe | ({"schedule": schedule} if schedule else {}))


def seq2seq_objective(name: str, decoder_start: str, **fields: Any) -> ConfigDict:
    """The objective's group of an encoder-decoder. decoder_start: what the decoder reads first: bos, pad or eos."""
    common = dict(decoder_start=decoder_start, z_loss=0.0, label_smoothing=0.0, chunk_tokens=0)
    return ConfigDict(dict(name=name, **SEQ2SEQ[name], **common | fields))


def guards() -> ConfigDict:
    """What a run does about itself going wrong (`jaxlm/training/guards.py`)."""
    return ConfigDict(
        dict(
            # the run ends after this many steps in a row without a finite loss and gradient
            max_bad_steps=20,
            # a step whose gradient norm is over so many times the median of the last spike_window is skipped; 0: none is
            spike_factor=0.0,
            spike_window=128,
            # instead of ending, go back to the checkpoint before and leave so many batches out; at most so often
            skip_batches=0,
            max_rewinds=3,
            # every so many steps one step is computed twice, and must be bitwise equal; 0: none is
            self_check_every_steps=0,
            # no step for so many seconds: all stacks are written, and the run ends; 0: it waits for ever
            watchdog_seconds=1800,
        )
    )


def base() -> ConfigDict:
    """Every field that all pretraining configs share, with the values of a small run on one machine."""
    return ConfigDict(
        dict(
            family="gpt",
            seed=0,
            # the amount of training
            batch_size=16,
            seq_len=256,
            num_train_steps=1000,
            accumulation_steps=1,
            # how often
            log_every_steps=10,
            eval_every_steps=200,
            checkpoint_every_steps=200,
            # where from: another run's workdir[@step], or hf:DIR_OR_HUB_ID[@revision]; init: 'params', 'ema' or 'state'
            init_from="",
            init="params",
            # 'auto': bfloat16 on TPU and GPU, float32 on CPU
            dtype="auto",
            param_dtype="float32",
            model=dict(),
            objective=dict(name="causal"),
            tokenizer=dict(kind="byte_bpe", vocab_size=2048, num_sentinels=0, path=""),
            data=dict(
                # names, files, globs, or prepared stores; 'name=path' names a source
                sources=("stdlib",),
                # () = by size; ('0:0.7,0.3', '1000:0.2,0.8') = from step 0 and from step 1000
                weights=(),
                split="hash",
                validation_fraction=0.05,
                text_field="text",
                num_workers=0,
                prefetch=2,
                # copies of what lies on a bucket, one per host; '' = ~/.cache/jaxlm
                cache_dir="",
            ),
            optimizer=dict(),
            ema_decay=0.0,
            # num_batches 0 = the whole held-out set
            eval=dict(batch_size=16, num_batches=0, prompts=(), sample_tokens=64),
            # best_metric '' keeps none for being the best; best_mode '' = 'min' of losses and the like, else 'max'
            checkpoint=dict(keep_last=2, keep_every=0, best_metric="", best_mode=""),
            guards=guards(),
            # execution: changes speed and memory, never the result
            mesh=dict(data=-1, stage=1, fsdp=1, expert=1, context=1, tensor=1),
            # parts of a batch that pass through the mesh's stages one after the other; 0 = up to 4 a stage
            pipeline_micro_batches=0,
            remat="none",
            # the optimizer's state waits in the host's memory between steps
            offload_optimizer=False,
            unroll=1,
            # 'auto': splash on TPU, cudnn on GPU, xla on CPU and for what those cannot do
            attention_kernel="auto",
            # 'auto': what is known to help on the mesh's devices (jaxlm/parallel/compiler_options.py), or 'none'
            compiler_flags="auto",
            log=dict(progress=True, tensorboard=True, wandb=False),
        )
    )


def make_model(**fields: Any) -> ConfigDict:
    """The model's group: GPT-2's options unless `fields` says otherwise. Heads default to 64 wide, the MLP to 4 D."""
    emb_dim, num_heads = fields["emb_dim"], fields["num_heads"]
    model = dict(
        vocab_size=50257,
        emb_dim=emb_dim,
        num_layers=12,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=emb_dim // num_heads,
        mlp_dim=4 * emb_dim,
        max_len=1024,
        norm="layer_norm",
        norm_eps=1e-5,
        norm_bias=True,
        norm_position="pre",
        norm_scale_offset=0.0,
        first_norm=True,
        position="learned",
        position_offset=0,
        relative_buckets=32,
        relative_max_distance=128,
        rope_theta=10000.0,
        rope_scaling=(),
        rope_local_theta=0.0,
        activation="gelu_tanh",
        attention_windows=(),
        query_scale=0.0,
        qk_norm=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        scale_embeddings=False,
        embed_norm=False,
        embed_init_std=0.0,
        logit_scale=0.0,
        embed_factor_dim=0,
        share_layers=False,
        num_decoder_layers=0,
        num_experts=0,
        experts_per_token=2,
        normalise_router=True,
        expert_capacity_factor=0.0,
        router_aux_weight=0.0,
        router_z_weight=0.0,
        num_token_types=0,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        attention_softcap=0.0,
        final_softcap=0.0,
        zero_init_out=False,
        init_std=0.02,
        lora_rank=0,
        lora_alpha=16.0,
        lora_targets=("query", "value"),
    )
    unknown = sorted(set(fields) - set(model))
    if unknown:
        raise ValueError(f"unknown model fields {unknown}; known: {', '.join(model)}")
    return ConfigDict(model | fields)


NO_BIAS = dict(norm_bias=False, qkv_bias=False, out_bias=False, mlp_bias=False)
