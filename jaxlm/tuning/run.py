"""A fine-tuning run: from a user's config, a source and files to all the parts of a `build.Run`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxlm import build, config_checks
from jaxlm import program as programs
from jaxlm.data.augment import Augmentation, AugmentedFeatures
from jaxlm.data.examples import Examples, TrainExamples, lay_out, plan_shapes
from jaxlm.data.records import Problem, check_problems
from jaxlm.files import download, new_folder, write_text
from jaxlm.interop import convert, tokenizer_files
from jaxlm.models import HEADS, TransformerConfig
from jaxlm.models.flops import train_step_flops
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import processes
from jaxlm.tasks import TASKS
from jaxlm.tokenizers import META, is_saved, load_tokenizer
from jaxlm.training import optimizers, partition
from jaxlm.training.metrics import usual_mode
from jaxlm.training.state import TrainState
from jaxlm.tuning.prediction import (
    TASK_FILE,
    Predictor,
    eval_batches,
    local_rows,
    make_task,
    row_lengths,
    writes,
)
from jaxlm.tuning.source import Source, open_source, read_weights
from jaxlm.tuning.splits import Split, has_label, hold_out, make_split, read_file, read_whole
from jaxlm.tuning.writing import find_writing

PyTree = Any
log = logging.getLogger("jaxlm")


@dataclass
class Prepared:
    """All but the device's side of a run: `config` has every field of the user's and what follows from source and data."""

    config: ConfigDict
    source: Source
    task: Any
    fitted: dict[str, Any]
    splits: dict[str, Split]


def prepare(config: ConfigDict, workdir: Path) -> Prepared:
    """Reads the source's shape and the data, makes the features, and completes the config.

    Raises:
      ValueError: with what to change, if files, options and the model do not fit one another.
    """
    source = open_source(config.init_from)
    kind = programs.pick(TASKS, config.task.name, "task")
    data, options = config.data, config.task.to_dict()
    options.pop("name")
    if not data.train:
        raise ValueError("data.train is empty: name the file to train on, e.g. …:train=my.csv")
    records, problems, columns = read_file(data.train, config)
    labelled = [record for record in records if has_label(record)]
    fitted = {**kind.infer(labelled, **options), "columns": columns}
    if writes(kind):
        fitted |= find_writing(config, source)
    task = make_task(config, source, fitted)
    train, num_rows = [], len(records) + len(problems)
    for record in records:
        if why := task.problem(record, True):
            problems.append(Problem(record.source, record.line, why))
        else:
            train.append(record)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "problems.jsonl"
    if says := check_problems(problems, num_rows, path, write=processes.is_main()):
        log.warning("%s", says)
    if data.dev:
        dev = read_whole(data.dev, config, columns)
    else:
        train, dev = hold_out(train, config)
    splits = {"train": make_split("train", task, train), "dev": make_split("dev", task, dev)}
    if not splits["dev"].is_labelled:
        raise ValueError(
            f"{data.dev or data.train} has development rows without labels to measure by"
        )
    if data.test:
        splits["test"] = make_split("test", task, read_whole(data.test, config, columns))
    if source.family == "gpt" and kind.kind in ("token_classification", "question_answering"):
        log.warning(
            "%s was pretrained as a decoder, whose words see only what stands before them: for %s an encoder is better",
            config.init_from,
            config.task.name,
        )
    completed = complete(config, source, task, len(splits["train"].examples))
    return Prepared(completed, source, task, fitted, splits)


def complete(config: ConfigDict, source: Source, task: Any, num_examples: int) -> ConfigDict:
    """The user's config with what the source and the data decide: family, model, head, steps and intervals."""
    problems = config_checks.range_problems(config)
    problems += config_checks.guard_problems(config.guards)
    model, tuning = source.model, config.tuning
    longest = {"seq_len": config.seq_len}
    if writes(task):
        longest["task.target_len"] = task.target_len
    for name, length in longest.items():
        if model["position"] == "learned" and length > model["max_len"]:
            problems.append(
                f"{name} {length}: the model has {model['max_len']} positions; set --config.{name} to that or less"
            )
    if config.accumulation_steps > 1 and not getattr(task, "splits_batch", True):
        problems.append(
            f"accumulation_steps {config.accumulation_steps}: the loss of {config.task.name} compares the examples of "
            "a whole batch; set it to 1"
        )
    if tuning.train == "lora" and tuning.lora_rank < 1:
        problems.append(
            f"tuning.lora_rank={tuning.lora_rank}: set it to 1 or more, or train to 'head'"
        )
    if tuning.train == "head" and task.head is None:
        problems.append(
            f"tuning.train='head': {config.task.name} has none; set it to 'all' or 'lora'"
        )
    if source.family == "encoder_decoder" and (tuning.layer_decay != 1 or tuning.frozen_layers):
        problems.append(
            "tuning.layer_decay and tuning.frozen_layers count the layers of one stack, and an encoder-decoder has two; "
            "set them to 1 and 0"
        )
    if config.data.augment_dropout or config.data.augment_swap:
        if not getattr(task, "text_fields", ()):
            problems.append(
                f"data.augment_*: what {config.task.name} marks in its text would be lost; set them to 0"
            )
    if config.evals_per_epoch <= 0:
        problems.append(f"evals_per_epoch {config.evals_per_epoch}: set it above 0")
    best_metric = config.checkpoint.best_metric or task.best_metric
    if writes(task) and not config.eval.dev_texts and best_metric.startswith(task.metrics):
        problems.append(
            f"checkpoint.best_metric {best_metric!r} is a score of texts that are written, and no evaluation writes any: "
            "set --config.eval.dev_texts=100"
        )
    if problems:
        raise config_checks.cannot_run(problems)
    steps_per_epoch = num_examples / config.batch_size
    every = max(1, round(steps_per_epoch / config.evals_per_epoch))
    num_steps = max(1, math.ceil(config.num_epochs * steps_per_epoch))
    completed = config.copy_and_resolve_references()
    with completed.unlocked():
        completed.family = source.family
        completed.model = ConfigDict(model | adapters(tuning))
        completed.model.update(
            dropout_rate=config.dropout_rate, attention_dropout_rate=config.dropout_rate
        )
        if writes(task) and task.writer.has_encoder:
            roles, start_id = source.tokenizer.roles, task.writer.start_id
            completed.task.decoder_start = next(r for r, i in roles.items() if i == start_id)
        if task.head is not None:
            completed.head = ConfigDict(
                head_fields(source, task) | {"dropout_rate": config.dropout_rate}
            )
        completed.num_train_steps = num_steps
        completed.eval_every_steps = completed.checkpoint_every_steps = every
        completed.optimizer.schedule.warmup_steps = round(config.warmup_ratio * num_steps)
        completed.checkpoint.best_metric = best_metric
        completed.checkpoint.best_mode = config.checkpoint.best_mode or usual_mode(best_metric)
    return completed


def adapters(tuning: ConfigDict) -> dict[str, Any]:
    """The model's fields of LoRA: as the tuning group says, or none."""
    if tuning.train != "lora":
        return {}
    return {name: tuning[name] for name in ("lora_rank", "lora_alpha", "lora_targets")}


def head_fields(source: Source, task: Any) -> dict[str, Any]:
    """The head as the source's family has it for this kind of task, and as the task itself says."""
    usual = dict(HEADS[task.kind].keywords) if hasattr(HEADS.get(task.kind), "keywords") else {}
    if source.family == "gpt" and usual.get("pooling"):
        usual = {"pooling": "last", "use_bias": False}
    if source.hf_family:
        usual |= convert.usual_head(source.hf_family, task.kind)
    return usual | task.head


@dataclass(kw_only=True)
class TaskRun(build.Run):
    """A training run over labelled examples: a `build.Run` whose evaluation also gives the task's scores."""

    splits: Mapping[str, Split] = dataclasses.field(default_factory=dict)

    @cached_property
    def predictor(self) -> Predictor:
        """What evaluates and predicts with the run's program."""
        return Predictor(self.config, self.mesh, self.model, self.objective)

    def documents(self, k: int) -> list[dict[str, Any]]:
        """For each example of batch k its row, its number, and the line of the file that it was made from."""
        split = self.splits["train"]
        records = [r for r, span in zip(split.records, split.spans, strict=True) for _ in span]
        found = [(place, records[place["example"]]) for place in super().documents(k)]
        return [{**place, "file": r.source, "line": r.line} for place, r in found]

    def scored(
        self, params: PyTree, name: str, most: int | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(scores, predictions) of a split's records, of the first `most` if given."""
        return self.predictor.scored(params, self.splits[name], self.eval_batches[name], most)

    def evaluate(
        self, params: PyTree, did_batch: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Scores of the development split; of a task that writes with as many texts as `eval.dev_texts` says.

        did_batch: called once, when all is done: these scores decide which checkpoint is the best.
        """
        scores, _ = self.scored(params, "dev", self.config.eval.get("dev_texts"))
        did_batch()
        return scores


def make_run(
    prepared: Prepared, workdir: Path, *, mesh: jax.sharding.Mesh | None = None
) -> TaskRun:
    """Builds the run that was prepared, and writes its tokenizer and task.json."""
    config, task, source = prepared.config, prepared.task, prepared.source
    mesh = mesh or meshes.make_mesh(**config.mesh)
    if not is_saved(workdir / "tokenizer"):
        with new_folder(workdir / "tokenizer", last=META) as folder:
            save_tokenizer(source, folder)
    elif load_tokenizer(workdir / "tokenizer").sha256 != source.tokenizer.sha256:
        raise ValueError(
            f"{workdir / 'tokenizer'} is another tokenizer than that of init_from={config.init_from}: a run keeps the one "
            "that it began with; take another --workdir"
        )
    write_task(workdir, config.task.name, prepared.fitted)
    model = programs.make_model(config, mesh)
    train = prepared.splits["train"].examples
    ways = meshes.batch_devices(mesh)
    shapes = plan_shapes(
        train,
        config.batch_size,
        config.seed,
        packed=config.packed,
        row_multiple=ways * config.accumulation_steps,
        **row_lengths(config),
    )
    train_batches = TrainExamples(
        train,
        shapes,
        config.batch_size,
        config.seed,
        local_rows(mesh, shapes),
        augmented(config, task, prepared.splits["train"]),
    )
    dummy = dummy_batch(train)
    boxed = programs.abstract_params(model, dummy)
    is_trained = partition.trainable(
        config.tuning.train,
        frozen_layers=config.tuning.frozen_layers,
        num_layers=config.model.num_layers,
    )
    trained, _ = partition.split(boxed, is_trained)
    optimizer, plateau = programs.make_optimizer(config, trained)
    optimizer = optimizers.scale_layers(
        optimizer,
        meshes.logical_axes(trained),
        num_layers=config.model.num_layers,
        layer_decay=config.tuning.layer_decay,
        frozen_layers=config.tuning.frozen_layers,
    )
    held_out = {name: split for name, split in prepared.splits.items() if name != "train"}
    return TaskRun(
        config=config,
        workdir=workdir,
        mesh=mesh,
        tokenizer=source.tokenizer,
        model=model,
        objective=task,
        train_batches=train_batches,
        eval_batches=eval_batches(held_out, config, mesh),
        optimizer=optimizer,
        plateau=plateau,
        dummy=dummy,
        boxed=boxed,
        data_fingerprint={name: s.examples.fingerprint for name, s in prepared.splits.items()},
        step_tokens=config.batch_size * float((train.lengths + train.encoder_lengths).mean()),
        step_flops=step_flops(config, model.config, task, train),
        is_trained=is_trained,
        splits=prepared.splits,
    )


def step_flops(
    config: ConfigDict, options: TransformerConfig, task: Any, examples: Examples
) -> float:
    """Model FLOPs of a step over examples of mean length."""
    length, encoder_length = (
        round(float(n.mean())) for n in (examples.lengths, examples.encoder_lengths)
    )
    return train_step_flops(
        options,
        config.batch_size,
        encoder_length or length,
        num_predictions=length if writes(task) else 0,
        causal=config.family == "gpt" or writes(task),
        target_len=length if encoder_length else 0,
    )


def add_reference(run: TaskRun, source: Source) -> None:
    """Gives every example what the model that training starts from says of it, if the task compares with that."""
    if not getattr(run.objective, "needs_reference", False):
        return
    params, _ = run.evaluated_params(initial_state(run, source))
    for split in run.splits.values():
        _, said = run.predictor.outputs(params, split)
        run.objective.take_reference(split.examples.features, said)


def augmented(config: ConfigDict, task: Any, split: Split) -> AugmentedFeatures | None:
    """What draws a training example anew each time, or None where nothing is to be changed."""
    change = Augmentation(config.data.augment_dropout, config.data.augment_swap)
    if not change:
        return None
    features = split.examples.features
    return AugmentedFeatures(split.records, features, task.features, change, task.text_fields)


def dummy_batch(examples: Examples) -> dict[str, jax.Array]:
    """One row with the first example: what parameters are initialised with."""
    longest, encoder_longest = int(examples.lengths.max()), int(examples.encoder_lengths.max())
    shapes = plan_shapes(examples, 1, 0, packed=False, seq_len=longest, encoder_len=encoder_longest)
    batch, _ = lay_out(examples, [0], shapes)
    return {key: jnp.asarray(value) for key, value in batch.items()}


def save_tokenizer(source: Source, target: Path) -> None:
    """The source's tokenizer, with the Hugging Face files that it came in, which an export gives back."""
    source.tokenizer.save(target)
    if source.folder is not None:
        tokenizer_files.keep_files(source.folder, target)
    elif source.step_dir is not None:
        kept = source.step_dir.parent.parent / "tokenizer" / tokenizer_files.KEPT
        if kept.is_dir():
            download(kept, target / tokenizer_files.KEPT)


def write_task(workdir: Path, name: str, fitted: Mapping[str, Any]) -> None:
    """task.json: what the task learned from its training rows, above all the order of its labels.

    Raises:
      ValueError: if the workdir holds another: resuming would exchange labels.
    """
    path, content = workdir / TASK_FILE, {"name": name, **fitted}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(content))
        # Keys that an older run's file lacks say nothing against it.
        if differing := [key for key, value in before.items() if now.get(key) != value]:
            raise ValueError(
                f"{path} holds other {', '.join(differing)} than the training file gives now: take another --workdir, or "
                "the file that the run began with"
            )
        return
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def initial_state(run: TaskRun, source: Source) -> TrainState:
    """The state that a new run starts from: the source's parameters, new ones where it has none; or, with init='random',
    new ones only."""
    if run.config.init == "random":
        return run.init_state()
    if run.config.init != "params":
        raise ValueError(f"init {run.config.init!r}: fine-tuning starts from 'params' or 'random'")
    found, repair, origin = read_weights(source, run.param_shapes)
    log.info("%s", repair)
    build.write_origin(run, **origin, **dataclasses.asdict(repair))

    def make(seed):
        variables = run.model.init(jax.random.key(seed), run.dummy)
        flat = flatten_dict(nn.meta.unbox(variables["params"]), sep="/")
        return {path: flat[path] for path in repair.new}  # of the others nothing is computed

    new = run.in_mesh(jax.jit(make))(run.config.seed)
    return run.init_state(unflatten_dict({**found, **new}, sep="/"))
