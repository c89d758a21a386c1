"""What a fine-tuned run has beside a pretrained one, as an export needs it: parameters that did not train, adapters, and
a head whose classes have names.

    checkpoints/<step>/params   (trained)  ─┐
    checkpoints/<step>/frozen   (not)      ─┴─ open_parameters ──▶ the whole model by path, adapters merged
    config.json head, task.json            ─── find_head ──▶ fields of Head, class, id2label
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxlm.interop import electra
from jaxlm.interop.arrays import Array, open_item
from jaxlm.interop.mapping import BadModel, Shape
from jaxlm.interop.safetensors_io import repair_list
from jaxlm.interop.task_heads import TASKS
from jaxlm.models import HEADS, lora

# What config.task.problem is called in config.json of transformers.
PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


# --- parameters -------------------------------------------------------------------------------------------------------


class Merged:
    """A stored matrix and its adapter, with the attributes of `Array`; a layer is summed when it is read."""

    def __init__(self, kernel: Array, a: Array, b: Array, scale: float):
        self.shape: Shape = kernel.shape
        self.dtype: np.dtype = kernel.dtype
        self._parts, self._scale = (kernel, a, b), scale

    def read(self, index: Any = ...) -> np.ndarray:
        """The whole, (L, ...), or the layer `index`."""
        if index is ...:
            return np.stack([self.read(layer) for layer in range(self.shape[0])])
        kernel, a, b = (jnp.asarray(part.read(index)) for part in self._parts)
        return np.asarray(lora.merge_kernel(kernel, a, b, self._scale))


def open_parameters(step_dir: Path, item: str) -> dict[str, Any]:
    """The model's parameters by path: those of `item`, those that did not train, and no adapters, which are merged.

    Of an ELECTRA run it is the discriminator (`electra.discriminator`).

    Raises:
      BadModel: if there are adapters, and the manifest's config does not say their rank and alpha.
    """
    arrays = open_item(step_dir / item)
    if (step_dir / "frozen").is_dir():
        arrays |= open_item(step_dir / "frozen")
    arrays = electra.discriminator(arrays)
    merged: dict[str, Any] = {p: array for p, array in arrays.items() if not lora.is_adapter(p)}
    if len(merged) < len(arrays):
        scale = _read_scale(step_dir)
        for path in merged:
            if path + lora.A in arrays:
                parts = arrays[path], arrays[path + lora.A], arrays[path + lora.B]
                merged[path] = Merged(*parts, scale)
    return merged


def _read_scale(step_dir: Path) -> float:
    manifest = json.loads((step_dir / "manifest" / "metadata").read_text(encoding="utf-8"))
    model = manifest.get("config", {}).get("model", {})
    rank, alpha = model.get("lora_rank", 0), model.get("lora_alpha", 0.0)
    if not rank or not alpha:
        raise BadModel(
            f"{step_dir} has adapters, and its manifest says lora_rank={rank}, lora_alpha={alpha}: they cannot be merged"
        )
    return alpha / rank


# --- head -------------------------------------------------------------------------------------------------------------


class FoundHead(NamedTuple):
    """fields: of models.Head, {} = no head. kind: a key of models.HEADS, '' = not known. about: keys of config.json."""

    fields: dict[str, Any]
    kind: str
    about: dict[str, Any]


def find_head(workdir: Path, config: ConfigDict, came_from: Mapping[str, Any]) -> FoundHead:
    """The head of a run: a fine-tuned run's own, else the one that it came with from a Hugging Face folder.

    came_from: the manifest's 'huggingface'.

    Raises:
      BadModel: if task.json does not name as many classes as the head has.
    """
    if config.family == "electra":
        return FoundHead(dict(electra.HEAD), electra.HEAD_KIND, {})
    if "head" not in config:
        tasks, was = TASKS.get(came_from.get("model_type", ""), {}), came_from.get("architecture")
        kind = tasks[was].kind if was in tasks else ""
        return FoundHead(came_from.get("head", {}), kind, came_from.get("labels", {}))
    head = config.head.to_dict()
    if not head["num_classes"] and not head.get("transform"):
        return FoundHead({}, "", {})  # the vectors themselves: nothing but the body has parameters
    kind = config.task.name if config.task.name in HEADS else ""
    about = labels_to_hf(read_task(workdir), head["num_classes"])
    if problem := PROBLEM_TYPES.get(config.task.get("problem", "")):
        about["problem_type"] = problem
    return FoundHead(head, kind, about)


def read_task(workdir: Path) -> dict[str, Any]:
    """What task.json of a fine-tuned run says; {} of another run."""
    path = workdir / "task.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def labels_to_hf(task: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """id2label and label2id, if task.json names labels; else nothing.

    Raises:
      BadModel: if they are not one distinct word for each class.
    """
    labels = task.get("labels")
    if not labels:
        return {}
    problems = []
    if len(labels) != num_classes:
        problems.append(f"found {len(labels)} labels, expected {num_classes} as the head has")
    if wrong := [label for label in labels if not isinstance(label, str)]:
        problems.append(f"{wrong[:5]}: expected words")
    elif len(set(labels)) != len(labels):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        problems.append(f"{', '.join(twice[:5])}: more than one class is called that")
    if problems:
        raise BadModel(repair_list("the labels of task.json", problems))
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
