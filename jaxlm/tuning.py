"""From a ConfigDict and a pretrained model to the parts of a fine-tuning run.

    init_from ──open_source──▶ model config, tokenizer ─┐
    data files ──records──▶ task.infer ──▶ task ────────┴─ prepare ──▶ Prepared ──make_run──▶ TaskRun (a build.Run)

What a user's config leaves open (the model's shape, the number of steps) is filled in by `prepare`; the run's config.json
holds the result, so a fine-tuned workdir stands alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxlm import build, tokenizers
from jaxlm.data import demos
from jaxlm.data.column_names import ROLES
from jaxlm.data.columns import Columns, as_role_records, choose_columns
from jaxlm.data.examples import (
    EvalExamples,
    Examples,
    TrainExamples,
    lay_out,
    plan_eval_shapes,
    plan_shapes,
)
from jaxlm.data.records import (
    Problem,
    Record,
    check_problems,
    format_problems,
    read_records,
)
from jaxlm.data.splits import split_train_dev
from jaxlm.interop import convert, hub, tokenizer_files
from jaxlm.models import HEADS, TransformerConfig, lora
from jaxlm.models.flops import train_step_flops
from jaxlm.parallel import mesh as meshes
from jaxlm.tasks import TASKS
from jaxlm.tasks.base import make_layout
from jaxlm.training import optimizers, partition
from jaxlm.training.checkpoints import (
    evaluated_item,
    find_step,
    load_item,
    load_tree,
    read_manifest,
)
from jaxlm.training.metrics import MetricSums
from jaxlm.training.state import TrainState

PyTree = Any
log = logging.getLogger("jaxlm")

TASK_FILE = "task.json"
DEMO = "demo:"  # what a data source begins with that is made of the standard library


# --- where a run starts from ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A pretrained model before its arrays are read.

    family: a key of MODELS. model: the fields of TransformerConfig, without execution.
    hf_family: its name at Hugging Face, or ''. spec: of a Hugging Face folder, or ''. step_dir: of a checkpoint of ours.
    """

    family: str
    model: dict[str, Any]
    tokenizer: Any
    hf_family: str = ""
    spec: str = ""
    step_dir: Path | None = None
    config: ConfigDict | None = None


def open_source(init_from: str) -> Source:
    """What 'W[@step]' or 'hf:DIR_OR_HUB_ID[@revision]' holds.

    Raises:
      ValueError, FileNotFoundError: if there is no model, or its tokenizer is another one than it was trained with.
    """
    if not init_from:
        raise ValueError(
            "init_from is empty: set --config.init_from to a pretrained run's workdir or to hf:FOLDER_OR_HUB_ID"
        )
    if init_from.startswith(build.HUGGING_FACE):
        spec = init_from.removeprefix(build.HUGGING_FACE)
        folder, _ = hub.fetch(spec)
        tokenizer = tokenizer_files.fetch_tokenizer(spec)
        incoming = convert.read_source(str(folder), least_vocab_size=tokenizer.vocab_size)
        options = incoming.options | {"vocab_size": incoming.vocab_size}
        model = model_fields(TransformerConfig(**options))
        name = incoming.family.model_type
        return Source(incoming.family.model, model, tokenizer, name, spec=spec)
    path, _, step = init_from.partition("@")
    step_dir = find_step(path, int(step) if step else None)
    workdir = step_dir.parent.parent
    config = build.saved_config(workdir / "config.json")
    tokenizer = tokenizers.load_tokenizer(workdir / "tokenizer")
    trained_with = read_manifest(step_dir).get("tokenizer_sha256")
    if trained_with and trained_with != tokenizer.sha256:
        raise ValueError(
            f"{step_dir} was trained with another tokenizer than {workdir / 'tokenizer'}"
        )
    plain = lora.without_adapters(TransformerConfig(**config.model.to_dict()))
    hf_family = convert.usual_family(config.family, plain)
    model = model_fields(plain)
    return Source(config.family, model, tokenizer, hf_family, step_dir=step_dir, config=config)


def model_fields(config: TransformerConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in convert.EXECUTION}


@dataclass(frozen=True)
class Repair:
    """What became of each parameter and of each array of the source: names, ours but in `dropped`.

    mismatched: those of `new` that the source has in another shape.
    """

    restored: list[str]
    new: list[str]
    mismatched: list[str]
    dropped: list[str]

    def __str__(self):
        lines = [f"restored {len(self.restored)} parameters"]
        for title in ("new", "mismatched", "dropped"):
            if names := getattr(self, title):
                lines.append(f"{title}: {_abbreviated(names)}")
        return "\n  ".join(lines)


def _abbreviated(names: Sequence[str], shown: int = 8) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


# BERT's pooler, which pretraining has beside its head for pairs, is the dense layer of a classifier on [CLS].
POOLER = {"pooler/kernel": "head/dense", "pooler/bias": "head/bias"}


def read_weights(source: Source, wanted: PyTree) -> tuple[dict[str, Any], Repair, dict[str, str]]:
    """(arrays by path, what became of each, what origin.json says): the parameters of `source` that fit `wanted`.

    wanted: ShapeDtypeStructs with shardings, of all parameters of the new model.

    Raises:
      ValueError: if nothing but embeddings would be restored, or a parameter below the head has another shape.
    """
    flat = flatten_dict(wanted, sep="/")
    if source.spec:
        base = {path: leaf for path, leaf in flat.items() if not lora.is_adapter(path)}
        config = TransformerConfig(**source.model)
        weights = convert.load_params(source.spec, config, unflatten_dict(base, sep="/"))
        arrays = flatten_dict(weights.params, sep="/")
        new = sorted({*weights.new, *(flat.keys() - base.keys())})
        repair = Repair(weights.restored, new, weights.mismatched, weights.dropped)
        found = {path: arrays[path] for path in weights.restored}
        origin = {"commit": weights.commit}
    else:
        assert source.step_dir is not None and source.config is not None
        stored = load_tree(source.step_dir, evaluated_item(source.step_dir), wanted)
        config = TransformerConfig(**source.config.model.to_dict())
        arrays = flatten_dict(lora.merge(stored, config), sep="/")
        if "head/dense" in flat and "head/dense" not in arrays:
            arrays = {POOLER.get(path, path): array for path, array in arrays.items()}
        fits = {p for p in arrays.keys() & flat.keys() if arrays[p].shape == flat[p].shape}
        new, mismatched = flat.keys() - fits, (arrays.keys() & flat.keys()) - fits
        repair = Repair(*map(sorted, (fits, new, mismatched, arrays.keys() - flat.keys())))
        found = {path: arrays[path] for path in fits}
        origin = {"checkpoint": str(source.step_dir)}
    refuse_strangers(source, repair)
    return found, repair, origin


def refuse_strangers(source: Source, repair: Repair) -> None:
    where = source.spec or source.step_dir
    below = [path for path in repair.mismatched if not path.startswith("head/")]
    if below:
        raise ValueError(f"{where} has another shape of {_abbreviated(below)}:\n  {repair}")
    if all(path.startswith("embed/") for path in repair.restored):
        raise ValueError(
            f"{where} would give this model nothing but embeddings; init_from must be a model of the same shape:\n"
            f"  {repair}"
        )


# What a label is, by the task's `problem` or name; elsewhere it is one class.
LABEL_KINDS = {
    "multi_label": "multilabel",
    "regression": "number",
    "multiple_choice": "choice",
    "embedding": "number",
}


# --- records ----------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """The records of one file, in their order, and their features.

    spans: for each record the numbers of its features. truncated: records that were cut.
    """

    name: str
    records: list[Record]
    spans: list[range]
    examples: Examples
    truncated: int

    @property
    def is_labelled(self) -> bool:
        return bool(self.records) and all(has_label(record) for record in self.records)


def has_label(record: Record) -> bool:
    return any(record.fields.get(key) is not None for key in ("label", "labels", "answers"))


def read_file(
    path: str,
    config: ConfigDict,
    columns: Columns | None = None,
) -> tuple[list[Record], list[Problem], Columns]:
    """The records of a labelled file, or of 'demo:NAME:SPLIT', with fields named by their roles in the task.

    columns: those of the training file, of which later ones may lack the labels; None: this is the training file.
    Returns (records, rows that cannot be read, columns).
    """
    data, task = config.data, config.task.name
    if path.startswith(DEMO):
        name, _, split = path.removeprefix(DEMO).partition(":")
        return demos.demo_records(name, split or "train"), [], {}
    records, problems = read_records(
        path, data.format, header=data.header, delimiter=data.delimiter
    )
    if not records:
        raise ValueError(f"{path} has no row that can be read:\n{format_problems(problems)}")
    roles = build.pick(ROLES, task, "task")
    given = columns or {
        key.removesuffix("_column"): value
        for key, value in data.items()
        if key.endswith("_column") and value
    }
    chosen = choose_columns(records, roles, given, labelled=columns is None)
    kind = LABEL_KINDS.get(config.task.get("problem") or task, "class")
    named, more = as_role_records(records, chosen, kind, data.label_separator)
    return named, [*problems, *more], chosen


def read_whole(path: str, config: ConfigDict, columns: Columns) -> list[Record]:
    """A file to evaluate on, every row of it: one that cannot be read is an error."""
    records, problems, _ = read_file(path, config, columns)
    if problems:
        raise ValueError(
            f"{path} has {len(problems)} rows that cannot be read, and evaluation leaves none out:\n"
            f"{format_problems(problems)}"
        )
    return records


def hold_out(records: Sequence[Record], config: ConfigDict) -> tuple[list[Record], list[Record]]:
    """(training, development) records where there is no development file; says so in the log."""
    labels = [record.fields.get("label") for record in records]
    is_class = all(isinstance(label, str) for label in labels)
    fraction = config.data.dev_fraction
    return split_train_dev(records, fraction, config.seed, labels if is_class else None)


def make_split(name: str, task: Any, records: Sequence[Record]) -> Split:
    features: list[Any] = []
    spans, truncated = [], 0
    for record in records:
        made, was_cut = task.features(record)
        spans.append(range(len(features), len(features) + len(made)))
        features += made
        truncated += was_cut
    if truncated:
        log.info(
            "%s: %d of %d records (%.1f%%) truncated",
            name,
            truncated,
            len(records),
            100 * truncated / len(records),
        )
    return Split(name, list(records), spans, Examples(features), truncated)


# --- what a run is made of --------------------------------------------------------------------------------------------


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
    kind = build.pick(TASKS, config.task.name, "task")
    data, options = config.data, config.task.to_dict()
    options.pop("name")
    if not data.train:
        raise ValueError("data.train is empty: name the file to train on, e.g. …:train=my.csv")
    records, problems, columns = read_file(data.train, config)
    labelled = [record for record in records if has_label(record)]
    fitted = {**kind.infer(labelled, **options), "columns": columns}
    task = make_task(config, source, fitted)
    train, num_rows = [], len(records) + len(problems)
    for record in records:
        if why := task.problem(record, True):
            problems.append(Problem(record.source, record.line, why))
        else:
            train.append(record)
    workdir.mkdir(parents=True, exist_ok=True)
    if says := check_problems(problems, num_rows, workdir / "problems.jsonl"):
        log.warning("%s", says)
    if data.dev:
        dev = read_whole(data.dev, config, columns)
    else:
        train, dev = hold_out(train, config)
    splits = {"train": make_split("train", task, train), "dev": make_split("dev", task, dev)}
    if data.test:
        splits["test"] = make_split("test", task, read_whole(data.test, config, columns))
    completed = complete(config, source, task, len(splits["train"].examples))
    return Prepared(completed, source, task, fitted, splits)


def make_task(config: ConfigDict, source: Source, fitted: Mapping[str, Any]) -> Any:
    options = config.task.to_dict()
    kind = build.pick(TASKS, options.pop("name"), "task")
    layout = make_layout(
        source.tokenizer,
        config.seq_len,
        causal=source.family == "gpt",
        num_token_types=source.model["num_token_types"],
    )
    return kind(source.tokenizer, layout, fitted, **options)


def complete(config: ConfigDict, source: Source, task: Any, num_examples: int) -> ConfigDict:
    """The user's config with what the source and the data decide: family, model, head, steps and intervals."""
    problems = []
    model, tuning = source.model, config.tuning
    if model["position"] == "learned" and config.seq_len > model["max_len"]:
        problems.append(f"seq_len {config.seq_len}: the model has {model['max_len']} positions")
    if config.accumulation_steps > 1 and not getattr(task, "splits_batch", True):
        problems.append(
            f"accumulation_steps {config.accumulation_steps}: the loss of {config.task.name} compares the examples of "
            "a whole batch; set it to 1"
        )
    if tuning.layer_decay != 1.0 and model["share_layers"]:
        problems.append("tuning.layer_decay: the layers share their parameters; set it to 1.0")
    if problems:
        raise ValueError("this config cannot run:\n" + "\n".join(f"  - {p}" for p in problems))
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
        completed.head = ConfigDict(
            head_fields(source, task) | {"dropout_rate": config.dropout_rate}
        )
        completed.num_train_steps = num_steps
        completed.eval_every_steps = completed.checkpoint_every_steps = every
        completed.optimizer.schedule.warmup_steps = round(config.warmup_ratio * num_steps)
        completed.checkpoint.best_metric = config.checkpoint.best_metric or task.best_metric
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


@dataclass(frozen=True)
class Predictor:
    """A model with a task's head, and what its outputs mean."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    model: nn.Module
    task: Any

    @cached_property
    def step(self) -> Any:
        """Jitted (params, batch) -> (metrics, slot_* and token_* arrays), replicated."""

        def predict(params, batch):
            outputs = self.model.apply({"params": params}, batch, deterministic=True)
            _, metrics = self.task.loss(outputs, batch)
            return metrics, self.task.predict(outputs, batch)

        jitted = jax.jit(predict, out_shardings=meshes.replicated(self.mesh))
        return build.in_mesh(self.mesh, jitted)

    def predict(
        self, params: PyTree, split: Split, batches: EvalExamples | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(mean loss and other means, a prediction for each record)."""
        if batches is None:
            (batches,) = eval_batches({"": split}, self.config, self.mesh).values()
        sums, said, pending = MetricSums(), {}, None
        for index in [*range(len(batches)), None]:
            launched = None
            if index is not None:
                launched = index, self.step(params, put_rows(self.mesh, batches[index]))
            if pending is not None:  # one batch late: the device has the next one already
                before, results = pending
                metrics, outputs = jax.device_get(results)
                sums.add(metrics)
                said |= batches.taken_apart(before, outputs)
            pending = launched
        features = split.examples.features
        predictions = [
            self.task.decode(record, [features[i] for i in span], [said[i] for i in span])
            for record, span in zip(split.records, split.spans, strict=True)
        ]
        return sums.means(), predictions

    def scored(
        self, params: PyTree, split: Split, batches: EvalExamples | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(loss and scores, predictions) of a labelled split."""
        means, predictions = self.predict(params, split, batches)
        return means | self.task.scores(split.records, predictions), predictions


def put_rows(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the devices, of which every process has as many rows."""
    return meshes.put_batch(mesh, batch, len(batch["tokens"]) * jax.process_count())


@dataclass
class TaskRun(build.Run):
    """A training run over labelled examples: a `build.Run` whose evaluation also gives the task's scores."""

    splits: Mapping[str, Split] = dataclasses.field(default_factory=dict)

    def put_batch(
        self, batch: Mapping[str, np.ndarray], batch_size: int = 0
    ) -> dict[str, jax.Array]:
        return put_rows(self.mesh, batch)

    @cached_property
    def predictor(self) -> Predictor:
        return Predictor(self.config, self.mesh, self.model, self.objective)

    def scored(self, params: PyTree, name: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
        return self.predictor.scored(params, self.splits[name], self.eval_batches[name])

    def evaluate(self, params: PyTree) -> dict[str, float]:
        return self.scored(params, "dev")[0]


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, ready to use: `load_finetuned(F).predict(["a text", …])`."""

    predictor: Predictor
    params: PyTree
    step: int
    columns: Columns  # of the file that it was trained on

    def read(self, path: str) -> Split:
        """The split of a file, which may have labels or not."""
        config, task = self.predictor.config, self.predictor.task
        return make_split(Path(path).stem, task, read_whole(path, config, self.columns))

    def predict(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """A prediction for each row: a text, or the fields of a record by role (text, text_pair, words, context, …)."""
        fields = [{"text": row} if isinstance(row, str) else dict(row) for row in rows]
        records = [Record("", number + 1, row) for number, row in enumerate(fields)]
        split = make_split("rows", self.predictor.task, records)
        return self.predictor.predict(self.params, split)[1]


def is_finetuned(path: str | Path) -> bool:
    """Whether a workdir, or one of its checkpoints, is of a fine-tuning run."""
    return any((folder / TASK_FILE).is_file() for folder in (Path(path), *Path(path).parents[:2]))


def load_finetuned(path: str | Path, step: int | None = None) -> Finetuned:
    """The model of a fine-tuning run's workdir (or of one of its checkpoints): the best step unless another is named.

    Raises:
      ValueError, FileNotFoundError: if there is none.
    """
    workdir = Path(path)
    if step is None and (workdir / "report.json").is_file():
        step = json.loads((workdir / "report.json").read_text(encoding="utf-8"))["step"]
    step_dir = find_step(path, step)
    workdir = step_dir.parent.parent
    if not (workdir / TASK_FILE).is_file():
        raise ValueError(f"{workdir} is no fine-tuned run: it has no {TASK_FILE}")
    config = build.saved_config(workdir / "config.json")
    fitted = json.loads((workdir / TASK_FILE).read_text(encoding="utf-8"))
    tokenizer = tokenizers.load_tokenizer(workdir / "tokenizer")
    model_options = config.model.to_dict()
    task = make_task(config, Source(config.family, model_options, tokenizer), fitted)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    model = build.make_model(config, mesh)
    row = {"tokens": jax.ShapeDtypeStruct((1, 1), jnp.int32)}
    shapes = build.sharded_shapes(mesh, build.abstract_params(model, row))
    params = load_item(step_dir, shapes, evaluated_item(step_dir))
    columns = {
        role: tuple(c) if isinstance(c, list) else c for role, c in fitted["columns"].items()
    }
    return Finetuned(Predictor(config, mesh, model, task), params, int(step_dir.name), columns)


def make_run(
    prepared: Prepared, workdir: Path, *, mesh: jax.sharding.Mesh | None = None
) -> TaskRun:
    """Builds the run that was prepared, and writes its tokenizer and task.json."""
    config, task, source = prepared.config, prepared.task, prepared.source
    mesh = mesh or meshes.make_mesh(**config.mesh)
    if not (workdir / "tokenizer").is_dir():
        save_tokenizer(source, workdir / "tokenizer")
    write_task(workdir, config.task.name, prepared.fitted)
    model = build.make_model(config, mesh)
    train = prepared.splits["train"].examples
    ways = meshes.axis_size(mesh, ("data", "fsdp"))
    local = lambda rows: meshes.local_rows(mesh, rows)
    shapes = plan_shapes(
        train,
        config.batch_size,
        config.seed,
        packed=config.packed,
        seq_len=config.seq_len,
        row_multiple=ways * config.accumulation_steps,
    )
    train_batches = TrainExamples(
        train, shapes, config.batch_size, config.seed, config.num_train_steps, local
    )
    dummy = dummy_batch(train)
    boxed = build.abstract_params(model, dummy)
    is_trained = partition.trainable(
        config.tuning.train,
        frozen_layers=config.tuning.frozen_layers,
        num_layers=config.model.num_layers,
    )
    trained, _ = partition.split(boxed, is_trained)
    optimizer, plateau = build.make_optimizer(config, trained)
    optimizer = optimizers.scale_layers(
        optimizer,
        meshes.logical_axes(trained),
        num_layers=config.model.num_layers,
        layer_decay=config.tuning.layer_decay,
        frozen_layers=config.tuning.frozen_layers,
    )
    mean_length = float(train.lengths.mean())
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
        step_tokens=config.batch_size * mean_length,
        step_flops=train_step_flops(
            model.config, config.batch_size, round(mean_length), 0, causal=config.family == "gpt"
        ),
        is_trained=is_trained,
        splits=prepared.splits,
    )


def eval_batches(
    splits: Mapping[str, Split], config: ConfigDict, mesh: jax.sharding.Mesh
) -> dict[str, EvalExamples]:
    """The batches of each split, all of one shape if they are packed."""
    size = config.eval.batch_size
    shapes = plan_eval_shapes(
        [split.examples for split in splits.values()],
        size,
        packed=config.packed,
        seq_len=config.seq_len,
        row_multiple=meshes.axis_size(mesh, ("data", "fsdp")),
    )
    local = lambda rows: meshes.local_rows(mesh, rows)
    return {name: EvalExamples(s.examples, shapes, size, local) for name, s in splits.items()}


def dummy_batch(examples: Examples) -> dict[str, jax.Array]:
    """One row with the first example: what parameters are initialised with."""
    shapes = plan_shapes(examples, 1, 0, packed=False, seq_len=int(examples.lengths.max()))
    batch, _ = lay_out(examples, [0], shapes)
    return {key: jnp.asarray(value) for key, value in batch.items()}


def save_tokenizer(source: Source, target: Path) -> None:
    """The source's tokenizer, with the Hugging Face files that it came in, which an export gives back."""
    source.tokenizer.save(target)
    if source.spec:
        tokenizer_files.keep_files(hub.fetch(source.spec)[0], target)
    elif source.step_dir is not None:
        kept = source.step_dir.parent.parent / "tokenizer" / tokenizer_files.KEPT
        if kept.is_dir():
            shutil.copytree(kept, target / tokenizer_files.KEPT)


def write_task(workdir: Path, name: str, fitted: Mapping[str, Any]) -> None:
    """task.json: what the task learned from its training rows, above all the order of its labels.

    Raises:
      ValueError: if the workdir holds another: resuming would exchange labels.
    """
    path, content = workdir / TASK_FILE, {"name": name, **fitted}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != json.loads(json.dumps(content)):
            raise ValueError(
                f"{path} holds other labels than the training file gives now ({len(before['labels'])} and "
                f"{len(fitted['labels'])}): take another --workdir, or the file that the run began with"
            )
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
