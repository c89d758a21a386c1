"""The arrays of one Orbax item ('params'), written and read a slice at a time.

Orbax saves a pytree that is in memory. A model that is larger than the memory is written here instead: Orbax makes the
item with arrays of one element, and TensorStore puts the real ones in their places, a layer (and expert) in each chunk. What
comes out
is an ordinary item, which `StandardCheckpointer` restores; `convert` checks it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from jaxlm.interop.mapping import EXPERT_AXES, EXPERT_PATHS, VOCAB_PATHS, Piece, Shape, is_stacked

BLOCK = 64 << 20  # bytes of the rows that are moved at once


class Array:
    """One stored array. Slices are read and written directly; nothing is cached."""

    def __init__(self, store: ts.TensorStore):
        self._store = store
        self.shape: Shape = tuple(store.shape)
        self.dtype: np.dtype = store.dtype.numpy_dtype

    def read(self, index: Any = ...) -> np.ndarray:
        """The slice at `index`, whole without one."""
        return self._store[index].read().result()

    def write(self, index: Any, array: np.ndarray) -> None:
        """Writes the slice at `index`."""
        self._store[index].write(array).result()

    def blocks(self) -> list[slice]:
        """Slices of the first axis of about 64 MB each, that together are the whole."""
        return row_blocks(self.shape, self.dtype)


def row_blocks(shape: Shape, dtype: np.dtype) -> list[slice]:
    """Slices of rows that take about BLOCK bytes each and cover an array of this shape."""
    rows = max(1, BLOCK // max(1, math.prod(shape[1:]) * np.dtype(dtype).itemsize))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def create_item(directory: Path, shapes: Mapping[str, Shape], dtype: np.dtype) -> dict[str, Array]:
    """An Orbax item of arrays of these shapes, by path ('layers/mlp/up'), whose contents are to be written."""
    elements = {path: np.zeros((1,) * len(shape), dtype) for path, shape in shapes.items()}
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(directory.resolve(), unflatten_dict(elements, sep="/"))
    return {path: _replace(directory, path, shape) for path, shape in shapes.items()}


def _replace(directory: Path, path: str, shape: Shape) -> Array:
    folder = directory.resolve() / path.replace("/", ".")
    metadata = json.loads((folder / ".zarray").read_text())
    if path in EXPERT_PATHS and len(shape) == EXPERT_AXES:
        chunks = (1, 1, *shape[2:])
    elif is_stacked(path):
        chunks = (1, *shape[1:])
    else:
        first = row_blocks(shape, np.dtype(metadata["dtype"]))[0]
        chunks = (first.stop, *shape[1:])
    # Uncompressed: floats hardly get smaller, and a slice costs no copy.
    metadata |= {"shape": shape, "chunks": chunks, "compressor": None}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": metadata,
    }
    return Array(ts.open(spec, create=True, delete_existing=True, context=_context()).result())


def _context() -> ts.Context:
    return ts.Context(
        {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 2}}
    )


def open_item(directory: Path) -> dict[str, Array]:
    """The arrays of an item by path, whether Orbax or `create_item` wrote it."""
    directory = directory.resolve()
    about = json.loads((directory / "_METADATA").read_text(encoding="utf-8"))
    driver = "zarr3" if about.get("use_zarr3") else "zarr"
    arrays = {}
    for entry in about["tree_metadata"].values():
        keys = [str(key["key"]) for key in entry["key_metadata"]]
        name = ".".join(keys)
        if about.get("use_ocdbt", True):
            kvstore = {"driver": "ocdbt", "base": f"file://{directory}/", "path": f"{name}/"}
        else:
            kvstore = {"driver": "file", "path": f"{directory / name}/"}
        spec = {"driver": driver, "kvstore": kvstore}
        arrays["/".join(keys)] = Array(ts.open(spec, open=True, context=_context()).result())
    return arrays


def read_theirs(piece: Piece, arrays: Mapping[str, Array]) -> np.ndarray:
    """Their tensor, made of our stored arrays, of which no more than it needs is read."""
    parts = []
    for path, shape in zip(piece.paths, piece.shapes, strict=True):
        if piece.layer is not None:
            parts.append(arrays[path].read(piece.index))
        else:
            parts.append(arrays[path].read(slice(0, shape[0]) if path in VOCAB_PATHS else ...))
    return piece.to_theirs(parts)
