"""Safetensors files and folders of them: read lazily after every claim of a header is checked, written shard by shard.

A file is 8 bytes of header length (little endian), a JSON header, and the bytes of the tensors without gaps:
{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {str: str}}.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}
# Read past (a buffer that a family ignores may be of any kind), but refused where a parameter is wanted.
OTHER_SIZES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
}
OTHER_SIZES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
MAX_HEADER = 100 << 20  # bytes; the limit of the reference implementation
MAX_DIMENSIONS = 16
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class BadFile(ValueError):
    """A file that is not what it claims to be."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file. `read` gives it as float32, bfloat16 or float16, in `shape`."""

    path: Path
    offset: int  # from the beginning of the file
    nbytes: int
    shape: tuple[int, ...]
    kind: str  # as the header says it: F32, BF16, F16, I64, …

    @property
    def dtype(self) -> np.dtype:
        """The type as numpy has it. Raises BadFile for one that no parameter has."""
        if self.kind not in DTYPES:
            raise BadFile(
                f"{self.path.name}: a parameter of dtype {self.kind}; known are {', '.join(DTYPES)}: "
                "save it again in one of them"
            )
        return DTYPES[self.kind]

    def read(self) -> np.ndarray:
        """The tensor whole."""
        return self.read_rows(0, self.shape[0]) if self.shape else self._read(0, self.nbytes, ())

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of the first axis, and nothing else of the file."""
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return self._read(start * row, (stop - start) * row, (stop - start, *self.shape[1:]))

    def _read(self, begin: int, size: int, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, self.dtype)
        # Not memory-mapped: pages of a map stay in the process until the system wants them back.
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + begin)
            rest = memoryview(array.reshape(-1).view(np.uint8))
            while rest.nbytes:
                got = file.readinto(rest)
                if not got:
                    raise BadFile(
                        f"{self.path}: ended {rest.nbytes} bytes early, at a tensor of {size}"
                    )
                rest = rest[got:]
        return array


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name. Nothing in it is believed before it is checked.

    Raises:
      BadFile: all that is wrong with the header.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BadFile(f"{path}: {size} bytes; expected 8 bytes of header length first")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MAX_HEADER):
            raise BadFile(
                f"{path}: claims a header of {length} bytes in a file of {size} (at most {MAX_HEADER}): "
                "truncated, or not a safetensors file"
            )
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    problems: list[str] = []
    tensors = {}
    for name, about in header.items():
        tensor, problem = _read_entry(path, about, 8 + length, size)
        if tensor is None:
            problems.append(f"{name[:200]!r}: {problem}")
        else:
            tensors[name] = tensor
    problems += [] if problems else _find_gaps(tensors, 8 + length, size)
    if problems:
        raise BadFile(repair_list(f"{path} is not a sound safetensors file", problems))
    return tensors


def _read_entry(path: Path, about: Any, start: int, size: int) -> tuple[Tensor | None, str]:
    """(the tensor, '') or (None, what is wrong with its entry)."""
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        return None, "expected dtype, shape and data_offsets, and nothing else"
    kind, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(kind, str) or (kind not in DTYPES and kind not in OTHER_SIZES):
        return None, f"unknown dtype {str(kind)[:40]!r}"
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        return None, f"shape {str(shape)[:80]}: expected at most {MAX_DIMENSIONS} integers >= 0"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return None, f"data_offsets {str(offsets)[:80]}: expected two integers >= 0"
    begin, end = offsets
    if not begin <= end <= size - start:
        return None, f"data_offsets {begin}, {end} lie outside the {size - start} bytes of data"
    itemsize = DTYPES[kind].itemsize if kind in DTYPES else OTHER_SIZES[kind]
    # An empty tensor may have other sizes that no array can have.
    if math.prod(size or 1 for size in shape) * itemsize >= 1 << 62:
        return None, f"shape {str(shape)[:80]} is larger than any array"
    if math.prod(shape) * itemsize != end - begin:
        return None, f"{kind}{shape} does not fill the {end - begin} bytes that it claims"
    return Tensor(path, start + begin, end - begin, tuple(shape), kind), ""


def _are_sizes(values: Any) -> bool:
    # bool is an int in Python, and no size. 2**63 keeps products small enough to be computed at once.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _find_gaps(tensors: Mapping[str, Tensor], start: int, size: int) -> list[str]:
    problems, expected = [], start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != expected:
            problems.append(
                f"{name[:200]!r}: begins at byte {tensor.offset}, but what is before it ends at {expected}"
            )
        expected = max(expected, tensor.offset + tensor.nbytes)
    if not problems and expected != size:
        problems.append(f"{size - expected} bytes after the last tensor belong to none")
    return problems


def parse_json(blob: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys; anything else is a BadFile that names `path`."""

    def unique(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        value = json.loads(blob.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: expected a JSON object: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise BadFile(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path, limit: int = MAX_HEADER) -> dict[str, Any]:
    """A file's JSON object. Raises BadFile above `limit` bytes."""
    size = path.stat().st_size
    if size > limit:
        raise BadFile(f"{path}: {size} bytes; expected at most {limit}")
    return parse_json(path.read_bytes(), path)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder with model.safetensors, or with an index and its shards.

    Raises:
      FileNotFoundError: if neither is there.
      BadFile: for an index whose names leave the folder, or that does not tell what its shards hold.
    """
    if (folder / INDEX).is_file():
        return _read_sharded(folder)
    if not (folder / SINGLE).exists():
        raise FileNotFoundError(f"{folder}: found neither {SINGLE} nor {INDEX}")
    return read_header(inside(folder, SINGLE))


def _read_sharded(folder: Path) -> dict[str, Tensor]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise BadFile(f"{folder / INDEX}: expected 'weight_map' from tensor names to file names")
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        try:
            header = read_header(inside(folder, name))
        except (BadFile, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        problems += [
            f"{name}: has no {t!r}, which the index says it has" for t in listed - set(header)
        ]
        problems += [
            f"{name}: has {t!r}, which the index does not list" for t in set(header) - listed
        ]
        tensors |= header
    if problems:
        raise BadFile(repair_list(f"{folder / INDEX} and its files do not agree", sorted(problems)))
    return tensors


def inside(folder: Path, name: str) -> Path:
    """The path of a file that an untrusted `name` names: a plain name, and no link that leaves the folder.

    The Hugging Face cache keeps its files as links to ../../blobs/, so links may stay within that cache.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}", name):
        raise BadFile(f"{folder}: {name[:200]!r} is not the plain name of a file in this folder")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: has no file {name}")
    home = folder.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    if not path.resolve().is_relative_to(home):
        raise BadFile(f"{path} is a link that leaves {home}: put the file itself there")
    return path


def repair_list(title: str, problems: Sequence[str], limit: int = 200) -> str:
    """A title and a line for each problem, at most `limit`."""
    more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return title + ":\n" + "\n".join(f"  - {p}" for p in [*problems[:limit], *more])


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to write: its shape and dtype are known before `read` makes it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(folder: Path, planned: Iterable[Planned], max_shard_bytes: int = 5 << 30) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_bytes` with an index; one tensor in memory at a time.

    Names follow huggingface_hub: model-00001-of-00003.safetensors, model.safetensors.index.json with total_size.
    """
    tensors = list(planned)
    shards = list(_split(tensors, max_shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    if len(shards) > 1:
        weight_map = {
            t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
        }
        metadata = {"total_size": sum(t.nbytes for t in tensors)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: list[Planned], limit: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    for tensor in tensors:
        if shard and sum(t.nbytes for t in shard) + tensor.nbytes > limit:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def write_file(path: Path, tensors: list[Planned]) -> None:
    """One file, streamed: the header from the planned shapes, then each tensor as it is made."""
    # Wide dtypes first and then by name, as the reference writes them: every tensor is then aligned.
    tensors = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        end = offset + t.nbytes
        about = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        header[t.name], offset = about, end
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    with open(path, "wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        for t in tensors:
            array = np.asarray(t.read(), order="C")
            if (array.shape, array.dtype) != (t.shape, t.dtype):
                raise ValueError(
                    f"{t.name}: planned {t.dtype}{t.shape}, made {array.dtype}{array.shape}"
                )
            file.write(array.reshape(-1).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())
