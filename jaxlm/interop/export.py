"""to_hf: a checkpoint becomes a Hugging Face folder, as `convert.from_hf` makes a workdir of one.

Rows of the vocabulary that the way in appended are cut off again (see `convert`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxlm.interop import FAMILIES, find_family, parity, tokenizer_files
from jaxlm.interop.arrays import Array, read_theirs
from jaxlm.interop.convert import local_path, make_model, model_config, written_beside
from jaxlm.interop.finetuned import find_head, open_parameters, read_task
from jaxlm.interop.mapping import BadModel, Family, Piece, bind, config_to_hf
from jaxlm.interop.safetensors_io import Planned, read_json, write_folder
from jaxlm.interop.source import open_source
from jaxlm.interop.task_heads import head_to_hf, with_head
from jaxlm.models import BODIES, TransformerConfig, lora

MAX_SHARD_BYTES = 5 << 30
# What classes of transformers with an Auto class of that name end with.
AUTO_TASKS = ("ForCausalLM", "ForMaskedLM", "ForQuestionAnswering")
AUTO_TASKS += ("ForSequenceClassification", "ForTokenClassification")
WRITERS = ("gpt", "encoder_decoder")  # keys of MODELS whose models write text


def to_hf(
    step_dir: str | Path,
    target: str | Path,
    config: ConfigDict,
    *,
    item: str = "params",
    family: str = "",
    head: Mapping[str, Any] | None = None,
    kind: str = "",
    dtype: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    against: str = "auto",
) -> dict[str, Any]:
    """Writes the folder `target`, as huggingface_hub lays one out, of one checkpoint; returns its certificate.

    Of a fine-tuned run that is the whole model, adapters merged, with the names of its labels (see `finetuned`).

    config: the run's. family: a `model_type`; '' takes the one it came from, else the first that can express the model.
    head, kind: the fields of the model's Head and its key in models.HEADS; None is the run's own.

    Raises:
      BadModel: options that the family cannot express, by name, also beside this tokenizer; a tokenizer without a Hugging
        Face form.
      FileExistsError, parity.Failed: see `from_hf`.
    """
    step_dir, target = local_path(step_dir), local_path(target)
    with written_beside(target) as folder:
        about = json.loads((step_dir / "manifest" / "metadata").read_text(encoding="utf-8"))
        came_from = about.get("huggingface", {})
        options = lora.without_adapters(model_config(config))
        found = find_head(step_dir.parent.parent, config, came_from)
        head, kind = found.fields if head is None else head, kind or found.kind
        wanted = family or came_from.get("model_type", "")
        body = BODIES.get(config.family, config.family)
        chosen = choose_family(wanted, body, options, head, kind)
        about_head: dict[str, Any] = {}
        if head:
            form, about_head = head_to_hf(chosen, head, kind)
            about_head |= found.about
            chosen = with_head(chosen, form)
        arrays = open_parameters(step_dir, item)
        shapes = {path: array.shape for path, array in arrays.items()}
        saved = step_dir.parent.parent / "tokenizer"
        tokenizer = tokenizer_files.load_tokenizer(saved) if saved.is_dir() else None
        vocab_size = exported_vocab_size(config, tokenizer, came_from)
        initialised = set(came_from.get("initialised", ()))
        pieces = [p for p in bind(chosen, shapes, vocab_size) if p.group not in initialised]
        groups = {p.group for p in pieces} - {""}
        architecture = chosen.architecture(groups, came_from.get("architecture", ""))
        kept = np.dtype(jnp.dtype(dtype)) if dtype else arrays[pieces[0].paths[0]].dtype
        exported = dataclasses.replace(options, vocab_size=vocab_size)
        task = read_task(step_dir.parent.parent)
        end = find_end(task, vocab_size)
        ids = came_from.get("token_ids") or token_ids(config, task, tokenizer, vocab_size)
        hf_config = {
            "architectures": [architecture.name],
            **with_token_ids(config_to_hf(chosen, exported), ids | end),
            **about_head,
            "torch_dtype": kept.name,
        }
        _write_json(folder / "config.json", hf_config)
        drop = "" if architecture.prefixed else chosen.prefix
        planned = list(plan(chosen, pieces, arrays, kept, drop, tied=options.tie_embeddings))
        write_folder(folder, planned, max_shard_bytes)
        if tokenizer:
            ends = tokenizer_files.find_ends(chosen)
            tokenizer_files.write_tokenizer(
                tokenizer, saved, folder, ends=ends, max_len=options.max_len
            )
        if "template" in task:
            (folder / "chat_template.jinja").write_text(task["template"], encoding="utf-8")
        write_generation_config(folder, chosen, hf_config, end)
        certificate = parity.certify(
            open_source(folder),
            arrays,
            pieces,
            model=make_model(chosen, options, 2 if "pair_head/bias" in arrays else 0, head),
            tokenizer=tokenizer,
            against=against,
        )
        certificate |= {"converted": {"step": int(step_dir.name), "item": item, **hf_config}}
        parity.write(certificate, folder / "parity.json")
        card = model_card(target.name, architecture.name, planned, certificate)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return certificate


def write_generation_config(
    folder: Path, family: Family, hf_config: Mapping[str, Any], end: Mapping[str, int]
) -> None:
    """generation_config.json of a model that writes: the source's, with `end` in it, else the ids of config.json; of another none."""
    path = folder / "generation_config.json"
    if family.model not in WRITERS:
        path.unlink(missing_ok=True)
    elif not path.exists():
        _write_json(path, {k: v for k, v in hf_config.items() if k.endswith("_token_id")})
    elif end:
        _write_json(path, read_json(path) | end)


def choose_family(
    wanted: str,
    model: str,
    config: TransformerConfig,
    head: Mapping[str, Any] | None = None,
    kind: str = "",
) -> Family:
    """The family to export as: of the wanted one, or of all, the first that has this model and this head.

    Raises:
      BadModel: the options in the way, for the wanted family or for each that is possible.
    """
    families = (
        [find_family(wanted)] if wanted else [f for f in FAMILIES.values() if f.model == model]
    )
    problems = []
    for family in families:
        if family.model != model:
            raise BadModel(
                f"a model of the family {model!r} cannot be exported as {family.model_type}"
            )
        try:
            config_to_hf(family, config)
            if head:
                head_to_hf(family, head, kind)
            return family
        except BadModel as error:
            problems.append(str(error))
    raise BadModel("\n".join(problems))


def exported_vocab_size(config: ConfigDict, tokenizer: Any, came_from: Mapping[str, Any]) -> int:
    """Rows to export: without those appended for reserved ids that the tokenizer's own files do not have.

    Raises:
      BadModel: if training has used such a row, e.g. masked-token training, and the mask is one of the appended ids.
    """
    ours = config.model.vocab_size
    if came_from:
        return came_from["vocab_size"]
    if tokenizer is None or ours != tokenizer.vocab_size:
        return ours
    size = tokenizer_files.num_model_ids(tokenizer)
    if lacking := [role for role in trained_roles(config) if tokenizer.roles[role] >= size]:
        raise BadModel(
            f"tokens that training has used ({', '.join(lacking)}) are ids that were appended to the tokenizer's "
            "vocabulary, and its files have no place for them: train with a tokenizer that has them"
        )
    return size


# objective -> special tokens that its exported model is asked with; others need the mask.
TRAINED_ROLES: dict[str, tuple[str, ...]] = {
    "causal": (),
    "rtd": ("cls", "sep"),
    "permutation": ("cls", "sep"),
}


def trained_roles(config: ConfigDict) -> tuple[str, ...]:
    """The special tokens without which the exported model could not be asked what it was trained for."""
    if config.family == "encoder_decoder":
        start = config.get("objective", {}).get("decoder_start")
        return ("eos", start) if start else ("eos",)
    if "objective" in config:
        return TRAINED_ROLES.get(config.objective.name, ("mask",))
    return ("bos", "eos") if config.family == "gpt" else ("cls", "sep")


def token_ids(
    config: ConfigDict, task: Mapping[str, Any], tokenizer: Any, vocab_size: int
) -> dict[str, int]:
    """Keys of config.json: the special tokens that the exported vocabulary has. What an encoder-decoder's decoder begins with
    a fine-tuned run's task says, else the objective.

    Raises:
      BadModel: if an encoder-decoder begins with a token that it has not.
    """
    if tokenizer is None:
        return {}
    ids = {f"{role}_token_id": tokenizer.roles[role] for role in ("bos", "eos", "pad")}
    ids = {name: i for name, i in ids.items() if i < vocab_size}
    if config.family == "encoder_decoder":
        start = task["start_id"] if task else tokenizer.roles[config.objective.decoder_start]
        if start >= vocab_size:
            raise BadModel(
                f"the decoder begins with the id {start}, which was appended to the tokenizer's vocabulary of "
                f"{vocab_size}, and its files have no place for it: train with another decoder_start"
            )
        ids["decoder_start_token_id"] = start
    return ids


def with_token_ids(hf: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json with the tokenizer's ids.

    Raises:
      BadModel: if the model's options need another one there: RoBERTa counts its positions from pad_token_id + 1.
    """
    if differing := [name for name, i in ids.items() if hf.get(name, i) != i]:
        found = ", ".join(f"{name} {ids[name]}, not {hf[name]}" for name in differing)
        raise BadModel(
            f"{hf['model_type']} cannot express this model beside its tokenizer, which has {found} as the model's options "
            "need (RoBERTa's position_offset is pad_token_id + 1): train with options that fit the tokenizer, or another one"
        )
    return {**hf, **ids}


def find_end(task: Mapping[str, Any], vocab_size: int) -> dict[str, int]:
    """{'eos_token_id': what ends the answers of a fine-tuned run of dialogues}; of another {}.

    Raises:
      BadModel: if the exported vocabulary lacks it.
    """
    if (end_id := task.get("end_id", 0)) >= vocab_size:
        raise BadModel(
            f"answers end with the id {end_id}, which was appended to the tokenizer's vocabulary of {vocab_size}, and its "
            "files have no place for it: train with a template that ends them with a token of its own"
        )
    return {"eos_token_id": end_id} if "end_id" in task else {}


def plan(
    family: Family,
    pieces: Sequence[Piece],
    arrays: Mapping[str, Array],
    dtype: np.dtype,
    prefix: str,
    *,
    tied: bool,
) -> Iterator[Planned]:
    """The tensors to write, each of which is read from our arrays when its turn comes."""
    for piece in pieces:

        def read(piece=piece):
            return read_theirs(piece, arrays).astype(dtype, copy=False)

        names = [piece.name]
        if not tied:
            names += [n for n, original in family.repeats.items() if original == piece.name]
        for name in names:
            yield Planned(name.removeprefix(prefix), piece.shape, dtype, read)


def model_card(
    name: str, architecture: str, planned: Sequence[Planned], certificate: Mapping[str, Any]
) -> str:
    """The README.md of an exported folder, with what its certificate measured."""
    size = sum(int(np.prod(t.shape)) for t in planned)
    task = "For" + architecture.partition("For")[2]
    auto = "AutoModel" + (task if task in AUTO_TASKS else "")
    auto = "AutoModelForCausalLM" if "LMHead" in architecture else auto
    auto = "AutoModelForSeq2SeqLM" if "ConditionalGeneration" in architecture else auto
    return f"""---
library_name: transformers
tags: [jaxlm]
---

# {name}

{architecture} with {size:,} parameters, trained or converted with jaxlm.

```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto}.from_pretrained("{name}")
```

Certificate of the conversion (`parity.json`): {parity.summary(certificate)}
"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
