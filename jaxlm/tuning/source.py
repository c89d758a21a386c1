"""The pretrained model that fine-tuning starts from: its shape, its tokenizer, and what becomes of its parameters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxlm import build, config_files
from jaxlm.files import as_path
from jaxlm.interop import convert, hub, tokenizer_files
from jaxlm.interop.source import read_config
from jaxlm.models import BODIES, TransformerConfig, lora
from jaxlm.models.config import EXECUTION
from jaxlm.training.checkpoints import evaluated_item, find_step, load_tree, split_step
from jaxlm.training.stored import read_manifest

PyTree = Any


@dataclass(frozen=True)
class Source:
    """A pretrained model before its arrays are read.

    family: a key of MODELS. model: the fields of TransformerConfig, without execution.
    hf_family: its name at Hugging Face, or ''. folder, commit: of a Hugging Face model; commit '' if it is no id of the hub.
    step_dir, config: of a checkpoint of ours.
    vocab_size: how many rows of the vocabulary it has itself; `model` may have more, for reserved ids of our tokenizer.
    param_dtype: of the stored parameters. seq_len: of the rows that it was trained on, or the most that config.json allows.
    task: what its head is for, where it has one in the place of a language model's, else ''.
    hf_files: the folder with Hugging Face's tokenizer files of a model that nothing here has trained, else None.
    made_up: groups of rows (`interop.mapping.Row`) that a conversion initialised because its source had none.
    """

    family: str
    model: dict[str, Any]
    tokenizer: Any
    hf_family: str = ""
    folder: Path | None = None
    commit: str = ""
    step_dir: Path | None = None
    config: ConfigDict | None = None
    vocab_size: int = 0
    param_dtype: str = "float32"
    seq_len: int = 0
    task: str = ""
    hf_files: Path | None = None
    made_up: frozenset[str] = frozenset()


def open_source(init_from: str) -> Source:
    """What 'W[@step]' (the newest step; of a fine-tuned run the best) or 'hf:DIR_OR_HUB_ID[@revision]' holds.

    Raises:
      ValueError, FileNotFoundError: if there is no model, or its tokenizer is another one than it was trained with.
    """
    if not init_from:
        raise ValueError(
            "init_from is empty: set --config.init_from to a pretrained run's workdir or to hf:FOLDER_OR_HUB_ID"
        )
    if init_from.startswith(build.HUGGING_FACE):
        spec = init_from.removeprefix(build.HUGGING_FACE)
        folder, commit = hub.fetch(spec)  # once: a revision may be another commit a moment later
        tokenizer = tokenizer_files.fetch_tokenizer(str(folder))
        incoming = convert.read_source(str(folder), least_vocab_size=tokenizer.vocab_size)
        options = incoming.options | {"vocab_size": incoming.vocab_size}
        model = model_fields(TransformerConfig(**options))
        return Source(
            incoming.family.model,
            model,
            tokenizer,
            incoming.family.model_type,
            folder,
            commit,
            vocab_size=incoming.options["vocab_size"],
            param_dtype=convert.stored_dtype(incoming).name,
            seq_len=model["max_len"],
            task=incoming.source.task,
            hf_files=folder,
        )
    step_dir = find_best_step(*split_step(init_from))
    workdir = step_dir.parent.parent
    config = config_files.saved_config(workdir / "config.json")
    tokenizer, manifest = build.trained_tokenizer(step_dir), read_manifest(step_dir)
    plain = lora.without_adapters(TransformerConfig(**config.model.to_dict()))
    family = BODIES.get(config.family, config.family)
    hf_family = convert.usual_family(family, plain, first=config.family)
    model = model_fields(plain)
    came_from = manifest.get("huggingface", {})
    task = config.task.name if "head" in config else ""
    return Source(
        family,
        model,
        tokenizer,
        hf_family,
        step_dir=step_dir,
        config=config,
        vocab_size=came_from.get("vocab_size", model["vocab_size"]),
        param_dtype=config.param_dtype,
        seq_len=model["max_len"] if came_from else config.seq_len,
        task=came_from["architecture"] if came_from.get("head") else task,
        hf_files=workdir / "tokenizer" / tokenizer_files.KEPT if came_from else None,
        made_up=frozenset(came_from.get("initialised", ())),
    )


def find_best_step(path: str | Path, step: int | None = None) -> Path:
    """The folder of the step that is named; else of that which a finished fine-tuning run reports; else of the newest one."""
    report = as_path(path) / "report.json"
    if step is None and report.is_file():
        step = json.loads(report.read_text(encoding="utf-8"))["step"]
    return find_step(path, step)


def find_prefix(source: Source) -> tuple[int, ...]:
    """The ids that stand before every text: bos of our decoders; what transformers puts there of its models."""
    files = source.hf_files
    if files is None:
        return () if source.family == "encoder_decoder" else (source.tokenizer.bos_id,)
    return (source.tokenizer.bos_id,) if tokenizer_files.puts_bos(files, source.tokenizer) else ()


def find_decoder_start(source: Source, given: str = "") -> int:
    """The id that an encoder-decoder's decoder begins with: the role `given`, else that of the source's own training, else
    bos.

    Raises:
      ValueError: if there is no such role.
    """
    trained = source.config or ConfigDict()
    groups = [trained.get(group, {}) for group in ("objective", "task")]
    said = next((group["decoder_start"] for group in groups if group.get("decoder_start")), "")
    if not (given or said) and source.family == "encoder_decoder" and source.folder is not None:
        said = convert.find_decoder_start(read_config(source.folder)[0], source.tokenizer)
    role, roles = given or said or "bos", source.tokenizer.roles
    if role not in roles:
        raise ValueError(f"decoder_start={role!r}: use one of {', '.join(roles)}")
    return roles[role]


def model_fields(config: TransformerConfig) -> dict[str, Any]:
    """The config's fields that say what the model computes, not how."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in EXECUTION}


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
    if source.folder is not None:
        base = {path: leaf for path, leaf in flat.items() if not lora.is_adapter(path)}
        config = TransformerConfig(**source.model)
        weights = convert.load_params(str(source.folder), config, unflatten_dict(base, sep="/"))
        arrays = flatten_dict(weights.params, sep="/")
        new = sorted({*weights.new, *(flat.keys() - base.keys())})
        repair = Repair(weights.restored, new, weights.mismatched, weights.dropped)
        found = {path: arrays[path] for path in weights.restored}
        origin = {"commit": source.commit}
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
    """Raises ValueError if the checkpoint is of a model of another shape."""
    where = source.folder or source.step_dir
    below = [path for path in repair.mismatched if not path.startswith("head/")]
    if below:
        raise ValueError(f"{where} has another shape of {_abbreviated(below)}:\n  {repair}")
    if all(path.startswith("embed/") for path in repair.restored):
        raise ValueError(
            f"{where} would give this model nothing but embeddings; init_from must be a model of the same shape:\n"
            f"  {repair}"
        )
