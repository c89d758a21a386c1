"""Field groups that every fine-tuning config is made of.

What the pretrained model and the data decide (the model's shape, the number of steps, warm-up in steps) is not here:
fine-tuning fills it in, and the run's config.json holds it.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from configs.common import guards, make_optimizer, parse_arg


def base(
    task: dict[str, Any],
    arg: str,
    *,
    learning_rate: float = 5e-5,
    columns: Iterable[str] = ("text", "text_pair", "label"),
    **choices: Any,
) -> ConfigDict:
    """The config of a task, changed by an argument 'train=my.csv,dev=…,learning_rate=3e-4,…'.

    task: the task's group; its fields can be set by the argument, too.
    columns: the roles of the task's columns (jaxlm/data/column_names.py).
    choices: further fields at the top level, with their defaults.
    """
    config = ConfigDict(
        dict(
            seed=0,
            # a pretraining run's workdir[@step], or hf:DIR_OR_HUB_ID[@revision]; init 'random': only its shape is taken
            init_from="",
            init="params",
            task=task,
            data=dict(
                # labelled files, or demo:NAME[:SPLIT] of the standard library; dev '': a share of train is held out
                train="",
                dev="",
                test="",
                dev_fraction=0.1,
                # '' = by the file's ending, and by the names that columns usually have
                format="",
                header="auto",
                delimiter="",
                **{f"{role}_column": "" for role in columns},
                # between the labels of a cell, where a text has several
                label_separator="|",
                # chance of each word of a training text to be left out, and to change places with the next
                augment_dropout=0.0,
                augment_swap=0.0,
                num_workers=0,
                prefetch=2,
                # copies of what lies on a bucket, one per host; '' = ~/.cache/jaxlm
                cache_dir="",
            ),
            # the amount of training; a batch is that many examples, however they are laid into rows of seq_len tokens
            num_epochs=3.0,
            batch_size=32,
            seq_len=128,
            packed=True,
            accumulation_steps=1,
            # how often; patience 0 never stops early, else after that many evaluations without a better best_metric
            evals_per_epoch=1.0,
            log_every_steps=10,
            patience=0,
            # of everything below and in the head
            dropout_rate=0.1,
            dtype="auto",
            param_dtype="float32",
            # train: 'all', 'head' or 'lora'; layer_decay: the learning rate of each layer by that of the one above it
            tuning=dict(
                train="all",
                frozen_layers=0,
                layer_decay=1.0,
                lora_rank=8,
                lora_alpha=16.0,
                lora_targets=("query", "value"),
            ),
            optimizer=make_optimizer("adamw", learning_rate, "linear", b2=0.999, weight_decay=0.01),
            # share of all steps
            warmup_ratio=0.1,
            ema_decay=0.0,
            eval=dict(batch_size=64),
            # best_metric '' = the task's own; best_mode '' = 'min' of losses and the like, else 'max'
            checkpoint=dict(keep_last=1, keep_every=0, best_metric="", best_mode=""),
            guards=guards(),
            # execution: changes speed and memory, never the result
            mesh=dict(data=-1, stage=1, fsdp=1, expert=1, context=1, tensor=1),
            # parts of a batch that pass through the mesh's stages one after the other; 0 = up to 4 a stage
            pipeline_micro_batches=0,
            remat="none",
            # the optimizer's state waits in the host's memory between steps
            offload_optimizer=False,
            unroll=0,  # a loop over the layers costs a small model a fifth of its speed (docs/speed_log.md)
            # 'auto': splash on TPU, cudnn on GPU, xla on CPU and for what those cannot do
            attention_kernel="auto",
            # 'auto': what is known to help on the mesh's devices (jaxlm/parallel/compiler_options.py), or 'none'
            compiler_flags="auto",
            log=dict(progress=True, tensorboard=True, wandb=False),
        )
    )
    del config.optimizer.schedule.warmup_steps  # follows from warmup_ratio
    config.update(choices)
    return apply(config, arg)


# Fields at the top level that the argument can set, besides those of the groups task and data.
TOP = ("num_epochs", "batch_size", "seq_len", "packed", "seed", "dropout_rate", "patience")


def apply(config: ConfigDict, arg: str) -> ConfigDict:
    """The config with an argument's 'key=value,…' put where they belong."""
    options = {key: value for key, value in config.task.items() if key != "name"}
    files = config.data.to_dict()
    top = {key: config[key] for key in TOP} | {"learning_rate": config.optimizer.learning_rate}
    chosen = parse_arg(arg, ("",), **options, **files, **top)
    for group, keys in ((config.task, options), (config.data, files), (config, TOP)):
        for key in keys:
            group[key] = chosen[key]
    config.optimizer.learning_rate = chosen["learning_rate"]
    return config
