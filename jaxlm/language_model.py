"""A trained model with all that it takes to use it, from a run's folder or from Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm import build, tuning
from jaxlm import program as programs
from jaxlm.interop.finetuned import read_task
from jaxlm.interop.safetensors_io import inside, read_json
from jaxlm.interop.source import read_config
from jaxlm.models import MODELS, TransformerConfig
from jaxlm.parallel import mesh as meshes
from jaxlm.training.checkpoints import split_step
from jaxlm.training.stored import read_manifest
from jaxlm.tuning import Repair, Source
from jaxlm.tuning.source import find_decoder_start, find_prefix

PyTree = Any
LM_HEAD = ("mlm_head/", "unembed")  # the parameters beyond the body that a language model has
LM_GROUPS = {"mlm", "lm"}  # what interop's tables call them


class BadInput(ValueError):
    """What was given cannot be used; the message says what was found, what was expected and what to change."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """What `load` gives.

    checkpoint: as it was named. family: 'gpt' (a decoder), 'bert' (an encoder) or 'encoder_decoder'. params: on the devices
    of `mesh`.
    num_ids: the rows of the vocabulary over which its probabilities are: those that its source has.
    max_len: the most tokens that it takes at a time: as long as the rows that it was trained on, or as config.json says.
    prefix: the ids that stand before a text that is to be continued or answered: bos of our decoders; what transformers
      puts there of its models. end_id: the id that ends what it writes: eos, or what its chat template ends answers with.
    writing: options of `decode.make_decoder`.
    task: what the head is for that it was fine-tuned with, else ''. pooling: of a fine-tuned embedding, else ''.
    no_lm: why it cannot predict tokens, '' if it can.
    """

    checkpoint: str
    family: str
    model: nn.Module
    params: PyTree
    tokenizer: Any
    num_ids: int
    max_len: int
    mesh: jax.sharding.Mesh
    prefix: tuple[int, ...]
    end_id: int
    writing: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""
    pooling: str = ""
    no_lm: str = ""

    @property
    def num_tokens(self) -> int:
        """How many ids are tokens of its own: neither padding of its vocabulary nor added by our tokenizer."""
        return min(self.num_ids, self.tokenizer.vocab_size)

    def in_mesh(self, function: Callable) -> Callable:
        """`function`, traced and run with the mesh in force."""
        return programs.in_mesh(self.mesh, function)


def load(
    checkpoint: str | Path, step: int | None = None, *, mesh: jax.sharding.Mesh | None = None
) -> LanguageModel:
    """The model of a run, of a fine-tuned run, or of Hugging Face's.

    >>> lm = load(workdir)
    >>> lm.family, lm.max_len
    ('gpt', 32)

    checkpoint: a workdir 'W' or 'W@step' (the newest step; of a fine-tuned run the best), one of its checkpoints, or
      'hf:FOLDER_OR_HUB_ID[@REVISION]'. Adapters are merged, averaged parameters taken where there are some.
    mesh: where it runs, default: the first device. Heads are spread over its axis 'tensor'; batches are small, so its other
      axes should be 1.

    Raises:
      ValueError, FileNotFoundError, ImportError: if there is no model, or parameters that are not finite.
    """
    source = tuning.open_source(with_step(str(checkpoint), step))
    mesh = mesh or meshes.make_mesh(devices=jax.devices()[:1])
    dtype = programs.resolve_dtype("auto" if source.config is None else source.config.dtype, mesh)
    config = TransformerConfig(
        **source.model,
        dtype=dtype,
        param_dtype=source.param_dtype,
        merge_rows=programs.on_cpu(mesh),
    )
    model = MODELS[source.family](config)
    wanted = programs.sharded_shapes(mesh, programs.abstract_params(model, programs.ONE_TOKEN))
    params, repair = read_params(source, wanted)
    check_finite(str(checkpoint), params)
    tuned = source.config if source.task and source.config is not None else {}
    prefix, end_id, writing = find_writing(source)
    return LanguageModel(
        checkpoint=str(checkpoint),
        family=source.family,
        model=model,
        params=params,
        tokenizer=source.tokenizer,
        num_ids=source.vocab_size,
        max_len=source.seq_len,
        mesh=mesh,
        prefix=prefix,
        end_id=end_id,
        writing=writing,
        task=source.task,
        pooling=tuned.get("task", {}).get("pooling", "") if source.task == "embedding" else "",
        no_lm=find_lm_problem(source, repair),
    )


def with_step(checkpoint: str, step: int | None) -> str:
    """'W' and the step 7 are 'W@7'; without a step the checkpoint as it was named."""
    if step is None:
        return checkpoint
    if checkpoint.startswith(build.HUGGING_FACE):
        raise BadInput(f"found {checkpoint} and step={step}: such a model has no steps")
    if split_step(checkpoint)[1] is not None:
        raise BadInput(f"found {checkpoint} and step={step}: name the step once")
    return f"{checkpoint}@{step}"


def read_params(source: Source, wanted: PyTree) -> tuple[PyTree, Repair]:
    """(the parameters of a language model that the source has, what became of each), on the devices.

    Raises:
      ValueError: if it lacks parameters of the body.
    """
    arrays, repair, _ = tuning.read_weights(source, wanted)
    if lacking := [path for path in repair.new if not path.startswith(LM_HEAD)]:
        where = source.folder or source.step_dir
        raise BadInput(f"{where} lacks the parameters {', '.join(lacking[:8])}: it is incomplete")
    shardings = {path: x.sharding for path, x in flatten_dict(wanted, sep="/").items()}
    placed = {path: jax.device_put(x, shardings[path]) for path, x in arrays.items()}
    return unflatten_dict(placed, sep="/"), repair


def check_finite(checkpoint: str, params: PyTree, shown: int = 3) -> None:
    """Raises BadInput that names the first arrays with a NaN or an infinity in them."""
    check = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))
    flat = flatten_dict(jax.device_get(check(params)), sep="/")
    if bad := [path for path, is_finite in flat.items() if not is_finite]:
        rest = f" and {len(bad) - shown} more" if len(bad) > shown else ""
        raise BadInput(
            f"{checkpoint}: NaN or infinity in {', '.join(bad[:shown])}{rest} ({len(bad)} of {len(flat)} arrays): take "
            "an earlier step"
        )


def find_writing(source: Source) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    """(the ids before a text, the id that ends one, options of `decode.make_decoder`): as a fine-tuned run's task.json says,
    else as trained."""
    task = read_task(source.step_dir.parent.parent) if source.step_dir else {}
    prefix = tuple(task["prefix"]) if "prefix" in task else find_prefix(source)
    end_id = task.get("end_id", source.tokenizer.eos_id)
    if source.family != "encoder_decoder":
        objective = (source.config or {}).get("objective", {}).get("name")
        return prefix, end_id, {"is_prefix_lm": True} if objective == "prefix_lm" else {}
    if "start_id" in task:
        return prefix, end_id, {"start_id": task["start_id"]}
    return prefix, end_id, {"start_id": find_decoder_start(source), **find_forced(source)}


def find_forced(source: Source) -> dict[str, Any]:
    """What transformers' `generate` makes a model write whatever it thinks: a first token (BART's bos), and eos at the end."""
    if source.folder is not None:
        said = read_config(source.folder)[0]
    else:
        assert source.step_dir is not None
        said = read_manifest(source.step_dir).get("huggingface", {}).get("token_ids", {})
    generation = source.hf_files and source.hf_files / "generation_config.json"
    if generation and generation.is_file():
        said = {**said, **read_json(inside(source.hf_files, generation.name))}
    first, last = (said.get(f"forced_{name}_token_id") for name in ("bos", "eos"))
    problems = [
        f"forced_{name}_token_id={found!r}: expected an id from 0 to {source.vocab_size - 1}, or null"
        for name, found in (("bos", first), ("eos", last))
        if found is not None and (type(found) is not int or not 0 <= found < source.vocab_size)
    ]
    if problems:
        raise BadInput("; ".join(problems))
    return {"first_id": -1 if first is None else first, "must_end": last is not None}


def find_lm_problem(source: Source, repair: Repair) -> str:
    """Why the source cannot predict tokens, '' if it can."""
    if source.task:
        return f"has no language model's head: it was fine-tuned for {source.task}"
    if repair.new or source.made_up & LM_GROUPS:
        return "has no language model's head, only the body of one"
    return ""
