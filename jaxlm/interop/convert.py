"""from_hf: a Hugging Face folder becomes a workdir; load_params: its parameters for a model that is there already.

The way back is `export.to_hf`. Both write beside the target and rename at the end, so that nothing half-written stays; both end with a certificate
(`parity`), and a conversion that fails it leaves nothing behind. Tensors pass through one at a time.

The vocabulary. Reserved ids that a tokenizer lacks are appended after its last id (jaxlm/tokenizers), and a model needs
rows for them: where theirs has fewer rows than our tokenizer has ids, ours gets rows that are the mean of theirs, which
makes such a token neutral. On the way back these rows are cut off again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from jaxlm.files import is_remote
from jaxlm.interop import FAMILIES, find_family, hub, parity, tokenizer_files
from jaxlm.interop.arrays import create_item, row_blocks
from jaxlm.interop.mapping import (
    FREE,
    SAME,
    BadModel,
    Family,
    Piece,
    Shape,
    bind,
    config_from_hf,
    config_to_hf,
    match,
    meaning,
    present_groups,
    repeated_names,
)
from jaxlm.interop.safetensors_io import DTYPES, repair_list
from jaxlm.interop.source import Source, Stored, open_source, read_config
from jaxlm.interop.task_heads import TASKS, class_names, head_fields, task_of
from jaxlm.models import MODELS, Head, TransformerConfig
from jaxlm.models.config import EXECUTION
from jaxlm.parallel.mesh import path_names

PyTree = Any
log = logging.getLogger("jaxlm")
HEAD_PATHS = ("head/", "pooler/", "pair_head/", "mlm_head/", "unembed")
# Groups of rows that stand on the pooled first token: a model with one of them has a pair head.
LABELS = ("id2label", "label2id", "problem_type")
PAIR_GROUPS = {"pooler", "nsp", "sop"}


@dataclasses.dataclass(frozen=True)
class Incoming:
    """A source, and what it is in our terms. absent: the pieces of heads that it lacks."""

    source: Source
    options: dict[str, Any]
    num_pair_classes: int
    head: dict[str, Any]  # fields of models.Head, or {}
    vocab_size: int  # ours
    shapes: dict[str, Shape]  # of our parameters, by path
    pieces: list[Piece]
    absent: list[Piece]

    @property
    def family(self) -> Family:
        """The table that converts it."""
        return self.source.family

    @property
    def present(self) -> list[Piece]:
        """The pieces that the folder has tensors for."""
        names = {p.name for p in self.absent}
        return [p for p in self.pieces if p.name not in names]


def make_model(
    family: Family,
    config: TransformerConfig,
    num_pair_classes: int = 0,
    head: Mapping[str, Any] | None = None,
) -> nn.Module:
    """head: the fields of a task's Head; with one there is no other."""
    if head:
        return MODELS[family.model](config, head=Head(config, **head))
    pairs = {"num_pair_classes": num_pair_classes} if num_pair_classes else {}
    return MODELS[family.model](config, **pairs)


def parameter_shapes(model: nn.Module) -> dict[str, Shape]:
    """The shapes of a model's parameters by path; nothing is allocated."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    batch = {"tokens": token, "encoder_tokens": token}  # the second for encoder-decoders
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    return {path: tuple(x.shape) for path, x in flatten(nn.meta.unbox(boxed)).items()}


def flatten(tree: PyTree) -> dict[str, Any]:
    """A tree's leaves by their paths, 'layers/attention/query'."""
    return {"/".join(path_names(p)): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


# --- in ---------------------------------------------------------------------------------------------------------------


def read_source(source: str, *, allow_pickle: bool = False, least_vocab_size: int = 0) -> Incoming:
    """Opens a folder or an id of the hub, and fits its tensors to our parameters by their headers alone.

    Raises:
      BadModel, BadFile, FileNotFoundError, ImportError: with everything that is in the way.
    """
    folder, _ = hub.fetch(source)
    opened = open_source(folder, allow_pickle=allow_pickle)
    family, tensors = opened.family, opened.tensors
    options = config_from_hf(family, opened.config)
    groups = present_groups(family, tensors)
    num_pair_classes = 2 if groups & PAIR_GROUPS else 0
    head: dict[str, Any] = {}
    if opened.task:
        head = head_fields(find_family(family.model_type), opened.task, opened.config)
    theirs = options["vocab_size"]
    ours = max(theirs, least_vocab_size)
    config = TransformerConfig(**options | {"vocab_size": ours})
    shapes = parameter_shapes(make_model(family, config, num_pair_classes, head))
    pieces = bind(family, shapes, theirs)
    absent, problems = match(family, pieces, opened.shapes(), tied=config.tie_embeddings)
    if not problems:
        problems = find_untrue_repeats(opened, config.tie_embeddings) + find_untrue_zeros(opened)
    if problems:
        raise BadModel(
            repair_list(f"{folder} is not the model that its config.json says", problems)
        )
    return Incoming(opened, options, num_pair_classes, head, ours, shapes, pieces, absent)


def find_untrue_repeats(source: Source, tied: bool) -> list[str]:
    """A line for each tensor that should repeat another one and does not."""
    problems = []
    for name, original in repeated_names(source.family, tied).items():
        if name not in source.tensors or original not in source.tensors:
            continue
        a, b = source.tensors[name], source.tensors[original]
        same = a.shape == b.shape and all(
            np.array_equal(a.read_rows(s.start, s.stop), b.read_rows(s.start, s.stop))
            for s in row_blocks(a.shape, a.dtype)
        )
        if not same:
            hint = (
                "; config.json lacks tie_word_embeddings=false"
                if name in source.family.ties
                else ""
            )
            problems.append(f"{name}: should repeat {original} and does not{hint}")
    return problems


def find_untrue_zeros(source: Source) -> list[str]:
    """A line for each buffer that should hold nothing but zeros and does not."""
    return [
        f"{name}: holds other values than 0, for which this model has no place"
        for name in source.family.zeros
        if name in source.tensors and np.any(source.tensors[name].read())
    ]


def stored_dtype(incoming: Incoming) -> np.dtype:
    """The narrowest dtype that holds every parameter of the source exactly."""
    dtypes = {incoming.source.tensors[p.name].dtype for p in incoming.present}
    return dtypes.pop() if len(dtypes) == 1 else DTYPES["F32"]


def initial(path: str, shape: Shape, std: float) -> np.ndarray:
    """A head that the source lacks: ones, zeros or normal(std) by the parameter's name, always the same."""
    name = path.rsplit("/", 1)[-1]
    if "scale" in name or "norm" in name:
        return np.ones(shape, np.float32)
    if "bias" in name:
        return np.zeros(shape, np.float32)
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    return (rng.standard_normal(shape) * std).astype(np.float32)


def convert_into(incoming: Incoming, arrays: Mapping[str, Any], dtype: np.dtype) -> None:
    """Writes every parameter, tensor by tensor. arrays: by path, each with `write(index, array)`."""
    std = incoming.options.get("init_std", 0.02)
    absent = {piece.name for piece in incoming.absent}
    written: dict[str, set[int | None]] = {}
    for piece in incoming.pieces:
        if piece.name in absent:
            parts = [initial(p, s, std) for p, s in zip(piece.paths, piece.shapes, strict=True)]
            _write_parts(piece, parts, arrays, incoming.shapes, dtype)
        else:
            _write_piece(piece, incoming.source.tensors[piece.name], arrays, incoming.shapes, dtype)
        for path in piece.paths:
            written.setdefault(path, set()).add(piece.layer)
    for path, layers in written.items():  # slices that theirs has not and nothing reads
        if None not in layers:
            for layer in set(range(incoming.shapes[path][0])) - layers:
                arrays[path].write(
                    layer, initial(path, incoming.shapes[path][1:], std).astype(dtype)
                )


def _write_piece(
    piece: Piece,
    tensor: Stored,
    arrays: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
) -> None:
    if piece.transform is not SAME or piece.layer is not None or not piece.shape:
        _write_parts(piece, piece.to_ours(tensor.read()), arrays, shapes, dtype)
        return
    (path,), total = piece.paths, np.zeros(piece.shape[1:], np.float64)
    for rows in row_blocks(piece.shape, dtype):
        block = tensor.read_rows(rows.start, rows.stop)
        arrays[path].write(rows, block.astype(dtype, copy=False))
        total += block.sum(axis=0, dtype=np.float64)
    if (size := shapes[path][0]) > piece.shape[0]:
        mean = (total / max(1, piece.shape[0])).astype(np.float32).astype(dtype)
        rest = np.broadcast_to(mean, (size - piece.shape[0], *mean.shape))
        arrays[path].write(slice(piece.shape[0], size), np.ascontiguousarray(rest))


def _write_parts(
    piece: Piece,
    parts: Sequence[np.ndarray],
    arrays: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
) -> None:
    for path, part in zip(piece.paths, parts, strict=True):
        if piece.layer is None and part.shape[0] < shapes[path][0]:  # a vocabulary with fewer rows
            rest = np.repeat(part.mean(axis=0, keepdims=True), shapes[path][0] - len(part), axis=0)
            part = np.concatenate([part, rest.astype(part.dtype)])
        arrays[path].write(piece.index, np.ascontiguousarray(part.astype(dtype, copy=False)))


class InMemory:
    """A parameter in host memory with the `write` of `arrays.Array`."""

    def __init__(self, shape: Shape, dtype: np.dtype):
        self.array = np.empty(shape, dtype)

    def write(self, index: Any, array: np.ndarray) -> None:
        """Writes the slice at `index`."""
        self.array[index] = array


class Weights(NamedTuple):
    """Parameters from elsewhere for a model that exists already, and what became of each name.

    params: host arrays like the model's. commit: of the hub, '' for a folder. restored: our paths that were read.
    new: our paths that the source lacks, initialised. mismatched: of these, heads that it has in another shape.
    dropped: the source's tensors that the model has no use for.
    """

    params: PyTree
    commit: str
    restored: list[str]
    new: list[str]
    mismatched: list[str]
    dropped: list[str]


def load_params(spec: str, config: TransformerConfig, wanted: PyTree) -> Weights:
    """The parameters of 'DIR_OR_HUB_ID[@revision]' for a model that exists already, as host arrays like `wanted`.

    Heads that the source lacks, or has for another number of classes, are initialised; heads that the model lacks are
    left.

    Raises:
      BadModel: a repair list, if the run's model is another one than the source.
    """
    folder, commit = hub.fetch(spec)
    leaves = flatten(wanted)
    shapes = {path: tuple(x.shape) for path, x in leaves.items()}
    source = open_source(folder, task=fitting_task(folder, shapes))
    family = source.family
    options = config_from_hf(find_family(family.model_type), source.config)
    problems = find_differences(options, config)
    covered = {path for row in family.rows for path in row.paths}
    problems += [
        f"parameter {path}: {family.model_type} has none"
        for path in sorted(shapes.keys() - covered)
        if not path.startswith(HEAD_PATHS)
    ]
    problems += find_untrue_zeros(source)
    own = {path: shape for path, shape in shapes.items() if path in covered}
    mismatched = other_heads(source, bind(family, own, options["vocab_size"]))
    own = {path: shape for path, shape in own.items() if path not in mismatched}
    pieces = bind(family, own, options["vocab_size"])
    heads = head_names(family.model_type)
    absent, unfit = match(family, pieces, source.shapes(), tied=config.tie_embeddings, left=heads)
    if problems or unfit:
        raise BadModel(repair_list(f"{spec} does not fit this run's model", problems + unfit))
    incoming = Incoming(source, options, 0, {}, config.vocab_size, own, pieces, absent)
    held = {path: InMemory(shape, leaves[path].dtype) for path, shape in own.items()}
    convert_into(incoming, held, np.dtype(np.float32))
    arrays = {path: array.array for path, array in held.items()}
    for path in shapes.keys() - own.keys():
        arrays[path] = initial(path, shapes[path], config.init_std).astype(leaves[path].dtype)
    new = {path for piece in absent for path in piece.paths} | (shapes.keys() - own.keys())
    return Weights(
        unflatten_dict(arrays, sep="/"),
        commit,
        restored=sorted(shapes.keys() - new),
        new=sorted(new),
        mismatched=sorted(mismatched),
        dropped=sorted(source.tensors.keys() - {piece.name for piece in incoming.present}),
    )


def other_heads(source: Source, pieces: Sequence[Piece]) -> set[str]:
    """Paths of a task's head that the source has in another shape: for another number of classes."""
    stored = source.shapes()
    return {
        path
        for piece in pieces
        for path in piece.paths
        if path.startswith("head/") and stored.get(piece.name, piece.shape) != piece.shape
    }


def usual_family(model: str, config: TransformerConfig, first: str = "") -> str:
    """The model_type of the first family that can express this model, '' if none can. `first` is asked before the others."""
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != first):
        if family.model == model and expresses(family, config):
            return family.model_type
    return ""


def expresses(family: Family, config: TransformerConfig) -> bool:
    """Whether a family's config.json can say what this model is."""
    try:
        config_to_hf(family, config)
    except BadModel:
        return False
    return True


def usual_head(model_type: str, kind: str) -> dict[str, Any]:
    """The fields of `Head` that a family has for a kind of task (a key of HEADS), {} if it has no class for it."""
    for task in TASKS.get(model_type, {}).values():
        if task.kind == kind:
            _, fields = task.variants[0]
            return dict(fields)
    return {}


def fitting_task(folder: Path, paths: Iterable[str]) -> str:
    """The class of transformers through whose table a model with these parameters reads the folder; '' = the plain one.

    The class that config.json names, if its head has these parameters; else the one with the smallest head that has.
    (A class may have biases that a model without biases has not.)
    """
    head = {path for path in paths if path.startswith("head/")}
    config, family = read_config(folder)
    tasks = TASKS.get(family.model_type, {}) if head else {}
    paths_of = {name: {p for row in t.rows for p in row.paths} for name, t in tasks.items()}
    fitting = sorted((len(has), name) for name, has in paths_of.items() if head <= has)
    named = task_of(family, config)
    if named in paths_of and head <= paths_of[named]:
        return named
    return fitting[0][1] if fitting else ""


def head_names(model_type: str) -> set[str]:
    """The tensors of a family that belong to heads."""
    rows = [row for row in find_family(model_type).rows if row.group]
    rows += [row for task in TASKS.get(model_type, {}).values() for row in task.rows]
    return {row.theirs for row in rows}


def find_differences(options: Mapping[str, Any], config: TransformerConfig) -> list[str]:
    """A line for each option by which the run's model would compute something else from the same parameters."""
    reference = TransformerConfig(**options)
    free = set(FREE) | ({"max_len"} if config.position != "learned" else set())
    lines = [
        f"model.{field.name}={getattr(config, field.name)!r}: the source has "
        f"{getattr(reference, field.name)!r}"
        for field in dataclasses.fields(TransformerConfig)
        if field.name not in free | {"vocab_size"}
        and meaning(config, field.name) != meaning(reference, field.name)
    ]
    if config.vocab_size < reference.vocab_size:
        lines.append(
            f"model.vocab_size={config.vocab_size}: the source has {reference.vocab_size}; more are made, fewer are not"
        )
    return lines


def from_hf(
    source: str,
    target: str | Path,
    templates: Mapping[str, ConfigDict],
    *,
    allow_pickle: bool = False,
    dtype: str = "",
    against: str = "auto",
) -> dict[str, Any]:
    """Writes the workdir `target` of a folder or hub id; returns its certificate.

    templates: by model_type, else by key of MODELS, a config for all that a Hugging Face folder does not say (optimizer, data, …).
    dtype: of the stored parameters; '' keeps the source's.
    against: what the certificate compares with, see `parity.certify`.

    Raises:
      BadModel, BadFile, FileNotFoundError, ImportError: see `read_source`.
      FileExistsError: if the target exists.
      parity.Failed: if the certificate does not hold; the target is then not there.
    """
    target = local_path(target)
    with written_beside(target) as folder:
        fetched, commit = hub.fetch(source)
        tokenizer = tokenizer_files.read_tokenizer(fetched)
        incoming = read_source(
            str(fetched),
            allow_pickle=allow_pickle,
            least_vocab_size=tokenizer.vocab_size if tokenizer else 0,
        )
        kept = np.dtype(jnp.dtype(dtype)) if dtype else stored_dtype(incoming)
        config = make_config(incoming, templates, tokenizer, target, kept)
        step_dir = folder / "checkpoints" / "0"
        step_dir.mkdir(parents=True)
        arrays = create_item(step_dir / "params", incoming.shapes, kept)
        convert_into(incoming, arrays, kept)
        if tokenizer:
            tokenizer.save(folder / "tokenizer")
            tokenizer_files.keep_files(fetched, folder / "tokenizer")
        text = config.to_json(indent=2, sort_keys=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        about = {
            "source": source,
            "commit": commit,
            "model_type": incoming.family.model_type,
            "architecture": next(iter(class_names(incoming.source.config)), ""),
            "vocab_size": incoming.options["vocab_size"],
            "token_ids": {
                k: v for k, v in incoming.source.config.items() if k.endswith("_token_id")
            },
            "initialised": sorted({p.group for p in incoming.absent}),
            "head": incoming.head,
            "labels": {k: v for k, v in incoming.source.config.items() if k in LABELS},
        }
        write_manifest(step_dir, config, tokenizer, about)
        certificate = parity.certify(
            incoming.source,
            arrays,
            incoming.present,
            model=make_model(
                incoming.family, model_config(config), incoming.num_pair_classes, incoming.head
            ),
            tokenizer=tokenizer,
            against=against if incoming.source.format == "safetensors" else "round_trip",
        )
        certificate |= {"converted": about}
        parity.write(certificate, folder / "parity.json")
    return certificate


def make_config(
    incoming: Incoming,
    templates: Mapping[str, ConfigDict],
    tokenizer: Any,
    target: Path,
    dtype: np.dtype,
) -> ConfigDict:
    """A config that every entrypoint takes, and that `pretrain --config=W/config.json` goes on from."""
    family = incoming.family
    template = templates.get(family.model_type, templates[family.model])
    config = ConfigDict(template.to_dict())
    with config.unlocked():
        options = TransformerConfig(**incoming.options | {"vocab_size": incoming.vocab_size})
        own = {k: v for k, v in dataclasses.asdict(options).items() if k not in EXECUTION}
        config.model = ConfigDict(own)
        if incoming.num_pair_classes:
            is_order = any(p.group == "sop" for p in incoming.pieces)
            config.objective.name = "mlm_sop" if is_order else "mlm_nsp"
        if "decoder_start" in config.objective:
            config.objective.decoder_start = find_decoder_start(incoming.source.config, tokenizer)
        if tokenizer:
            config.tokenizer.update(
                kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, path=str(target / "tokenizer")
            )
        config.param_dtype = dtype.name
        config.seq_len = min(config.seq_len, config.model.max_len)
        config.init_from = str(target)
    return config


def find_decoder_start(hf: Mapping[str, Any], tokenizer: Any) -> str:
    """The role of the token that an encoder-decoder's decoder begins with, by its config.json.

    Raises:
      BadModel: if config.json names none, or another one than a tokenizer can name.
    """
    start, roles = hf.get("decoder_start_token_id"), ("pad", "eos", "bos")
    if tokenizer is None:
        ids = {hf.get(f"{role}_token_id"): role for role in reversed(roles)}
    else:
        ids = {tokenizer.roles[role]: role for role in reversed(roles)}
    if start is None or start not in ids:
        raise BadModel(
            f"decoder_start_token_id={start!r}: expected the id of {', '.join(roles)} ({ids})"
        )
    return ids[start]


def model_config(config: ConfigDict) -> TransformerConfig:
    """The model of a workdir's config, computing in float32."""
    return TransformerConfig(**config.model.to_dict(), param_dtype=config.param_dtype)


def write_manifest(step_dir: Path, config: ConfigDict, tokenizer: Any, about: dict) -> None:
    """What a checkpoint says about itself, where Orbax's JsonSave would put it."""
    manifest = {
        "step": 0,
        "tokens_seen": 0,
        "config": json.loads(config.to_json()),
        "tokenizer_sha256": tokenizer.sha256 if tokenizer else "",
        "data": {},
        "huggingface": about,
    }
    (step_dir / "manifest").mkdir()
    text = json.dumps(manifest, indent=1)
    (step_dir / "manifest" / "metadata").write_text(text, encoding="utf-8")


def local_path(path: str | Path) -> Path:
    """The absolute path of a folder on this machine. Raises BadModel for a bucket's: tensors are read and written as files here."""
    if is_remote(path):
        raise BadModel(f"{path} is on a bucket: name a local folder, and copy it from or to there")
    return Path(path).absolute()


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` if the block succeeds, and is gone if it does not.

    Raises:
      FileExistsError: if `target` is there already.
    """
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists: name another target, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{os.getpid()}.partial"
    folder.mkdir()
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
