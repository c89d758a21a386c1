"""A fine-tuned run's folder, as training leaves it, around a tiny model of `tiny_families` with adapters that matter."""

import dataclasses
import json

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxlm import build, config_files
from jaxlm.interop import convert, export
from jaxlm.models import MODELS, Head
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.partition import split, trainable
from jaxlm.training.state import TrainState
from tests.models.tiny import init_params
from tests.oracles import tiny_families

LABELS = ["up", "down", "ünclear"]


class FineTuned:
    """twin: the model without adapters. model, params: with them; the run has trained what `train` says."""

    def __init__(
        self, name, *, train="lora", labels=LABELS, task="sequence_classification", **head
    ):
        self.twin = tiny_families.Twin(name)
        targets = ("query", "value", "out", "down")
        self.model_config = dataclasses.replace(
            self.twin.config, lora_rank=2, lora_alpha=5.0, lora_targets=targets
        )
        self.head = (self.twin.head or {}) | head | {"dropout_rate": 0.1}
        module = Head(self.model_config, **self.head)
        self.model = MODELS[self.twin.family.model](self.model_config, head=module)
        self.params = init_params(self.model, self.twin.batch)
        self.train, self.labels, self.task = train, labels, task

    @property
    def config(self) -> ConfigDict:
        fields = dataclasses.asdict(self.model_config)
        return ConfigDict(
            dict(
                family=self.twin.family.model,
                param_dtype="float32",
                model={k: v for k, v in fields.items() if k not in convert.EXECUTION},
                head=self.head,
                task=dict(name=self.task, problem="multi_label"),
            )
        )

    def write(self, folder):
        """The workdir; returns it."""
        trained, frozen = split(self.params, trainable(self.train))
        state = TrainState(jnp.int32(0), trained, {}, frozen=frozen or None, skipped=jnp.int32(0))
        checkpoints = Checkpoints(folder)
        checkpoints.save(0, state, {"config": json.loads(self.config.to_json())}, None)
        checkpoints.wait()
        checkpoints.close()
        build.write_config(self.config, folder / "config.json")
        about = {"name": self.task, "labels": self.labels}
        (folder / "task.json").write_text(json.dumps(about))
        return folder

    def export(self, tmp_path, against="round_trip", **options):
        """(its certificate, the folder) of the written run."""
        workdir = self.write(tmp_path / "run")
        config = config_files.saved_config(workdir / "config.json")
        step_dir = workdir / "checkpoints" / "0"
        target = tmp_path / "out"
        return export.to_hf(step_dir, target, config, against=against, **options), target
