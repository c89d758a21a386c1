"""A fine-tuned model in use: predictions and scores of files and of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm import program as programs
from jaxlm.data.columns import Columns, check_inputs
from jaxlm.data.examples import EvalExamples, Shapes, plan_eval_shapes
from jaxlm.data.records import Record
from jaxlm.files import as_path
from jaxlm.parallel import mesh as meshes
from jaxlm.tasks import TASKS
from jaxlm.tasks.base import make_layout
from jaxlm.training.metrics import MetricSums, one_behind, with_perplexity
from jaxlm.tuning.source import Source, find_best_step
from jaxlm.tuning.splits import Split, make_split, read_whole
from jaxlm.tuning.writing import make_writer, write_texts

PyTree = Any


TASK_FILE = "task.json"


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
        return programs.in_mesh(self.mesh, jitted)

    def predict(
        self,
        params: PyTree,
        split: Split,
        batches: EvalExamples | None = None,
        most: int | None = None,
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(mean loss and other means, a prediction for each record). most: of texts that are written, see `write`."""
        means, said = self.outputs(params, split, batches)
        if writes(self.task):
            return with_perplexity(means), self.write(params, split.records, most)
        features = split.examples.features
        return means, [
            self.task.decode(record, [features[i] for i in span], [said[i] for i in span])
            for record, span in zip(split.records, split.spans, strict=True)
        ]

    def outputs(
        self, params: PyTree, split: Split, batches: EvalExamples | None = None
    ) -> tuple[dict[str, float], dict[int, dict[str, np.ndarray]]]:
        """(mean loss and other means, what the model says about each feature, by its number)."""
        if batches is None:
            (batches,) = eval_batches({"": split}, self.config, self.mesh).values()
        sums, said = MetricSums(), {}
        laid_out = map(batches.laid_out, range(len(batches)))
        for places, results in one_behind(
            (places, self.step(params, meshes.put_batch(self.mesh, batch)))
            for batch, places in laid_out
        ):
            metrics, outputs = jax.device_get(results)
            sums.add(metrics)
            said |= batches.taken_apart(places, outputs)
        return sums.means(), said

    def write(
        self, params: PyTree, records: Sequence[Record], most: int | None = None
    ) -> list[dict[str, Any]]:
        """What the model of a task that writes answers to the first `most` records (None: all), and {} to others."""
        options = self.config.eval
        chosen = records if most is None else records[:most]
        written = write_texts(self.model, self.mesh, params, self.task, chosen, options)
        return written + [{} for _ in records[len(chosen) :]]

    def scored(
        self,
        params: PyTree,
        split: Split,
        batches: EvalExamples | None = None,
        most: int | None = None,
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(loss and scores, predictions) of a labelled split; most: see `predict`."""
        means, predictions = self.predict(params, split, batches, most)
        return means | self.task.scores(split.records, predictions), predictions


def writes(task: Any) -> bool:
    """Whether its predictions are texts, which are written token by token."""
    return getattr(task, "writes", False)


def eval_batches(
    splits: Mapping[str, Split], config: ConfigDict, mesh: jax.sharding.Mesh
) -> dict[str, EvalExamples]:
    """The batches of each split, all of one shape if they are packed."""
    size = config.eval.batch_size
    shapes = plan_eval_shapes(
        [split.examples for split in splits.values()],
        size,
        packed=config.packed,
        row_multiple=meshes.batch_devices(mesh),
        **row_lengths(config),
    )
    rows = local_rows(mesh, shapes)
    return {name: EvalExamples(s.examples, shapes, size, rows) for name, s in splits.items()}


def row_lengths(config: ConfigDict) -> dict[str, int]:
    """The longest that a row's streams may be: of an encoder-decoder that writes, seq_len is the encoder's."""
    if config.family == "encoder_decoder" and "target_len" in config.task:
        return {"seq_len": config.task.target_len, "encoder_len": config.seq_len}
    return {"seq_len": config.seq_len}


def local_rows(mesh: jax.sharding.Mesh, shapes: Shapes) -> dict[int, np.ndarray]:
    """For each number of rows that a batch may have, those of this process.

    Raises:
      ValueError: if devices cannot share a row's length.
    """
    lengths = [
        ("a row's length (up to seq_len)", "length", length)
        for length in (*shapes.lengths, *shapes.encoder_lengths)
    ]
    if problems := meshes.misfits(mesh, lengths):
        raise ValueError("the mesh does not fit the rows:\n  " + "\n  ".join(problems))
    return {rows: meshes.local_rows(mesh, rows) for rows in shapes.rows}


def make_task(config: ConfigDict, source: Source, fitted: Mapping[str, Any]) -> Any:
    """The config's task. fitted: what `infer` learned from the training rows."""
    options = config.task.to_dict()
    kind = programs.pick(TASKS, options.pop("name"), "task")
    if writes(kind):
        options.pop("decoder_start", None)
        return kind(source.tokenizer, make_writer(config, source.family, fitted), fitted, **options)
    layout = make_layout(
        source.tokenizer,
        config.seq_len,
        causal=source.family == "gpt",
        num_token_types=source.model["num_token_types"],
        cls_last=source.family == "xlnet",
    )
    return kind(source.tokenizer, layout, fitted, **options)


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, ready to use: `load_finetuned(F).predict(["a text", …])`."""

    predictor: Predictor
    params: PyTree
    step: int
    columns: Columns  # of the file that it was trained on

    def read(self, path: str) -> Split:
        """The split of a file, which may have labels or not.

        Raises:
          ValueError: if the task compares with the model that training began from, which is not here.
        """
        config, task = self.predictor.config, self.predictor.task
        if getattr(task, "needs_reference", False):
            raise ValueError(
                f"{config.task.name} is scored beside the model that training began from, which this run does not hold: "
                "report.json has its scores; name further files as data.test before training"
            )
        return make_split(as_path(path).stem, task, read_whole(path, config, self.columns))

    def predict(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """A prediction for each row: a text, or the fields of a record by role (text, text_pair, words, context, …; for a
        model of dialogues messages, or an instruction and an input; for one of pairs a source and a control).

        Raises:
          ValueError: naming the first row that lacks what the task reads.
        """
        fields = [{"text": row} if isinstance(row, str) else dict(row) for row in rows]
        records = [Record("row", number, row) for number, row in enumerate(fields, 1)]
        if writes(self.predictor.task):
            return self.predictor.write(self.params, records)
        for record in records:
            check_inputs(record, self.predictor.config.task.name)
        split = make_split("rows", self.predictor.task, records)
        return self.predictor.predict(self.params, split)[1]


def is_finetuned(path: str | Path) -> bool:
    """Whether a workdir, or one of its checkpoints, is of a fine-tuning run."""
    path = as_path(path)
    return any((folder / TASK_FILE).is_file() for folder in (path, *path.parents[:2]))


def load_finetuned(path: str | Path, step: int | None = None) -> Finetuned:
    """The model of a fine-tuning run's workdir (or of one of its checkpoints): the best step unless another is named.

    Raises:
      ValueError, FileNotFoundError: if there is none.
    """
    if not is_finetuned(path):
        raise ValueError(f"{path} is no fine-tuned run: it has no {TASK_FILE}")
    loaded = build.load_checkpoint(find_best_step(path, step))
    config, workdir = loaded.config, loaded.workdir
    fitted = json.loads((workdir / TASK_FILE).read_text(encoding="utf-8"))
    source = Source(config.family, config.model.to_dict(), loaded.tokenizer)
    predictor = Predictor(config, loaded.mesh, loaded.model, make_task(config, source, fitted))
    columns = {
        role: tuple(c) if isinstance(c, list) else c for role, c in fitted["columns"].items()
    }
    return Finetuned(predictor, loaded.params, loaded.step, columns)
