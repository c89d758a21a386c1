"""What a pretraining config must hold to run on a mesh, and how its fields must fit one another; all that does not, at once."""

from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jaxlm.parallel import mesh as meshes

DTYPES = ("float32", "bfloat16", "float16")
# The least that a field may be; an interval of 0 means only after the last step.
LEAST = {
    "batch_size": 1,
    "seq_len": 1,
    "num_train_steps": 1,
    "accumulation_steps": 1,
    "log_every_steps": 0,
    "eval_every_steps": 0,
    "checkpoint_every_steps": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "eval.batch_size": 1,
    "optimizer.grad_clip_norm": 0,
    "pipeline_micro_batches": 0,
    "guards.self_check_every_steps": 0,
    "guards.watchdog_seconds": 0,
}

# The fields whose sizes devices share, and the logical axes that they are the sizes of.
MODEL_AXES = {
    "vocab_size": "vocab",
    "emb_dim": "embed",
    "embed_factor_dim": "embed",
    "num_heads": "heads",
    "num_kv_heads": "kv",
    "mlp_dim": "mlp",
    "num_experts": "expert",
    "num_layers": "layers",
    "num_decoder_layers": "layers",
}


def shared_sizes(config: ConfigDict) -> list[tuple[str, str, int]]:
    """(field, logical axis, size) of all that devices of a mesh share, for `meshes.misfits`."""
    model = [
        (f"model.{field}", axis, config.model[field])
        for field, axis in MODEL_AXES.items()
        if field in config.model
    ]
    micro_batch = config.batch_size // config.accumulation_steps
    return [
        *model,
        ("seq_len", "length", config.seq_len),
        ("batch_size / accumulation_steps", "batch", micro_batch),
        ("eval.batch_size", "batch", config.eval.batch_size),
    ]


def check_config(
    config: ConfigDict, mesh: jax.sharding.Mesh, tokenizer: Any, target_len: int
) -> None:
    """Raises one ValueError with every field that does not fit another, or the mesh.

    target_len: places of a row of the decoder beside an encoder's `seq_len`; 0 where there is one stream of tokens.
    """
    if wrong := range_problems(config):
        raise cannot_run(wrong)  # sizes are divided by some of these
    decoder_row = ("the decoder's row", "length", target_len)
    problems = meshes.misfits(mesh, [*shared_sizes(config), decoder_row])
    if config.model.vocab_size < tokenizer.vocab_size:
        problems.append(
            f"model.vocab_size {config.model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids: set --config.model.vocab_size={tokenizer.vocab_size} or more"
        )
    longest = max(config.seq_len, target_len)
    if config.model.position == "learned" and longest > config.model.max_len:
        in_decoder = target_len > config.seq_len
        row = f" makes a decoder's row of {target_len}, which" if in_decoder else ""
        problems.append(
            f"seq_len {config.seq_len}{row} is longer than model.max_len {config.model.max_len}, the number of learned "
            f"positions: set --config.seq_len to less, or --config.model.max_len={longest} or more"
        )
    if config.batch_size % config.accumulation_steps:
        problems.append(
            f"batch_size {config.batch_size} is not divisible by accumulation_steps "
            f"{config.accumulation_steps}: make it a multiple of that"
        )
    problems += stage_problems(config) + guard_problems(config.guards)
    if problems:
        raise cannot_run(problems)


def stage_problems(config: ConfigDict) -> list[str]:
    """A line for each thing that keeps a config from passing through the stages of its mesh."""
    if config.mesh.stage == 1:
        return []
    problems, parts = [], config.pipeline_micro_batches
    if config.family == "xlnet" or config.model.share_layers:
        what = "XLNet" if config.family == "xlnet" else "one layer for all (share_layers)"
        problems.append(
            f"mesh.stage {config.mesh.stage}: there is no pipeline for {what}: set it to 1, and fsdp or tensor instead"
        )
    for name, rows in (
        ("batch_size / accumulation_steps", config.batch_size // config.accumulation_steps),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if parts and rows % parts:
            problems.append(
                f"{name} is {rows}, not divisible by pipeline_micro_batches {parts}: make it a multiple of that, or set "
                "--config.pipeline_micro_batches=0"
            )
    return problems


def cannot_run(problems: Sequence[str]) -> ValueError:
    """All that is wrong with a config, as one error."""
    return ValueError("this config cannot run:\n" + "\n".join(f"  - {p}" for p in problems))


def range_problems(config: ConfigDict) -> list[str]:
    """A line for each field, of pretraining or of fine-tuning, that is out of its range whatever the others are."""
    fields = flatten_dict(config.to_dict(), sep=".")
    problems = [
        f"{name} {fields[name]}: set --config.{name} to {least} or more"
        for name, least in LEAST.items()
        if fields.get(name, least) < least
    ]
    for name, more in (("dtype", ("auto",)), ("param_dtype", ())):
        if fields[name] not in (known := (*more, *DTYPES)):
            problems.append(f"{name} {fields[name]!r}: set it to one of {', '.join(known)}")
    if fields["ema_decay"] and fields["param_dtype"] != "float32":
        problems.append(
            f"ema_decay {fields['ema_decay']}: a moving average in {fields['param_dtype']} stands still; set "
            "--config.param_dtype=float32, or --config.ema_decay=0 for none"
        )
    return problems


def need_kind(config: ConfigDict, entrypoint: str) -> None:
    """Raises ValueError if the config is of the other entrypoint: 'jaxlm.pretrain' or 'jaxlm.finetune'."""
    takes = "jaxlm.finetune" if "task" in config else "jaxlm.pretrain"
    if takes != entrypoint:
        raise ValueError(f"this config is for python -m {takes}, and this is {entrypoint}")


def guard_problems(guards: ConfigDict) -> list[str]:
    """A line for each field of the guards that cannot be meant."""
    problems = []
    if guards.max_bad_steps < 1:
        problems.append(f"guards.max_bad_steps {guards.max_bad_steps}: set it to 1 or more")
    if 0 < guards.skip_batches < guards.max_bad_steps:
        problems.append(
            f"guards.skip_batches {guards.skip_batches} is less than guards.max_bad_steps {guards.max_bad_steps}, so bad "
            f"batches would come again: set it to {guards.max_bad_steps} or more, or to 0 for no rewinds"
        )
    if guards.spike_factor and (guards.spike_factor <= 1 or guards.spike_window < 1):
        problems.append(
            f"guards.spike_factor {guards.spike_factor} of the median of {guards.spike_window} steps: set the factor above 1 "
            "(say, 10) and the window to 1 or more, or the factor to 0 for no such guard"
        )
    return problems
