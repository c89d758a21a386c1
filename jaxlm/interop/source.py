"""A Hugging Face folder as tensors by name, whatever its files are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import flax.serialization
import numpy as np

from jaxlm.interop import find_family
from jaxlm.interop.mapping import BadModel, Family, Shape, canonical_names
from jaxlm.interop.safetensors_io import DTYPES, BadFile, inside, read_folder, read_json
from jaxlm.interop.task_heads import task_of, with_head

log = logging.getLogger("jaxlm")
CONFIG, MSGPACK, PICKLE = "config.json", "flax_model.msgpack", "pytorch_model.bin"
PICKLE_RISK = (
    "a pickle can run any code when it is loaded; torch's weights_only mode was broken out of twice "
    "(CVE-2025-32434, CVE-2026-24747)"
)
MAX_CONFIG = 1 << 20  # bytes


class Stored(Protocol):
    """A tensor that is read when it is wanted: `safetensors_io.Tensor`, or one that is held already."""

    @property
    def shape(self) -> Shape:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its type, one that a parameter can have."""

    def read(self) -> np.ndarray:
        """All of it."""

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows [start, stop) of its first axis."""


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor of a file format that gives all its tensors at once."""

    array: np.ndarray

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Its type. Raises BadFile for one that no parameter has."""
        if self.array.dtype not in DTYPES.values():
            raise BadFile(f"a parameter of dtype {self.array.dtype}: save it again as float32")
        return self.array.dtype

    def read(self) -> np.ndarray:
        """All of it."""
        return self.array

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows [start, stop) of its first axis."""
        return self.array[start:stop]


@dataclasses.dataclass(frozen=True)
class Source:
    """config: the whole config.json. family: its table, with the head of the task if there is one. tensors: by the
    names of the table's rows. format: of the files. task: the class with a task's head, or ''."""

    folder: Path
    config: dict[str, Any]
    family: Family
    tensors: Mapping[str, Stored]
    format: str
    task: str = ""

    def shapes(self) -> dict[str, Shape]:
        """{name: shape} of all tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def open_source(
    folder: str | Path, *, allow_pickle: bool = False, task: str | None = None
) -> Source:
    """Reads config.json and the headers of the tensors; safetensors first, then msgpack, then a pickle if allowed.

    task: read it through the table of this class with a task's head, '' through that without; None: as config.json says.

    Raises:
      FileNotFoundError: if the folder, its config.json or its tensors are not there.
      BadFile, BadModel: for what is in them.
    """
    folder = Path(folder)
    config, family = read_config(folder)
    task = task_of(family, config) if task is None else task
    family = with_head(family, task) if task else family
    tensors, format = read_tensors(folder, allow_pickle)
    named = {new: tensors[old] for new, old in canonical_names(family, tensors).items()}
    if len(named) != len(tensors):
        raise BadModel(f"{folder}: two tensors have one name once old spellings are put right")
    return Source(folder, config, family, named, format, task)


def read_config(folder: Path) -> tuple[dict[str, Any], Family]:
    """config.json, and the family that it names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    config = read_json(inside(folder, CONFIG), MAX_CONFIG)
    return config, find_family(config.get("model_type", ""))


def read_tensors(folder: Path, allow_pickle: bool) -> tuple[dict[str, Any], str]:
    """(tensors by the names in the files, format) of any folder, whatever its architecture."""
    try:
        return read_folder(folder), "safetensors"
    except FileNotFoundError:
        if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists():
            raise
    if (folder / MSGPACK).exists():
        return read_msgpack(inside(folder, MSGPACK)), "msgpack"
    if not (folder / PICKLE).exists():
        raise FileNotFoundError(
            f"{folder}: found no tensors; expected model.safetensors, its index, or {MSGPACK}"
        )
    if not allow_pickle:
        raise BadFile(
            f"{folder}: has {PICKLE} only, and {PICKLE_RISK}. Take a safetensors version of the model, or pass "
            "--allow_pickle if you trust who made it"
        )
    return read_pickle(inside(folder, PICKLE)), "pickle"


def read_msgpack(path: Path) -> dict[str, Held]:
    """The tensors of a flax_model.msgpack under torch's names and in torch's layout."""
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
        return {name: Held(array) for name, array in _torch_layout(tree)}
    # What msgpack and numpy raise for bytes that are none of theirs has no common type.
    except Exception as error:
        raise BadFile(f"{path}: not a flax checkpoint: {str(error)[:200]}") from error


def _torch_layout(tree: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """transformers' Flax models transposed every kernel of torch's, Conv1D's too, and renamed the leaves."""
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix or 'the file'} is no dict of arrays")
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _torch_layout(value, f"{prefix}{key}.")
            continue
        array = np.asarray(value)
        leaf = "weight" if key in ("kernel", "embedding", "scale") else key
        yield prefix + leaf, np.ascontiguousarray(array.T) if key == "kernel" else array


def read_pickle(path: Path) -> dict[str, Held]:
    """The tensors of a pytorch_model.bin, by torch's restricted unpickler. Only if the user asked for it."""
    log.warning("reading %s: %s", path, PICKLE_RISK)
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path.name} needs torch: pip install torch, or take safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or a hostile one makes of torch
        raise BadFile(f"{path}: torch makes no tensors of it: {str(error)[:300]}") from error
    tensors = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:
            array = tensor.contiguous().view(torch.uint16).numpy().view(DTYPES["BF16"])
        else:
            array = tensor.contiguous().numpy()
        tensors[name] = Held(array)
    return tensors
