"""Search by cosine: a query's nearest vectors in a corpus, found by comparing it with all of them, chunk by chunk.

vectors (N, D), ids (N,) ──▶ Index ──search(queries (Q, D), k)──▶ cosines (Q, k), places (Q, k)
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.files import as_path, write_whole

FILES = {"vectors.npy": "f4", "ids.npy": "u1"}  # of an index file, with their types


class Hits(NamedTuple):
    """The k nearest of each query, nearest first; equally near ones in the corpus's order.

    cosines: float32 (Q, k). places: int64 (Q, k), rows of the index.
    """

    cosines: np.ndarray
    places: np.ndarray


class Index:
    """A corpus to search.

    vectors: (N, D) of any length; kept as float32 of length 1 (zeros stay zeros, and are near to nothing).
    ids: (N,) strings, what a hit is called: texts, file names, keys.

    Raises:
      ValueError: with everything that does not fit.
    """

    def __init__(self, vectors: np.ndarray, ids: Sequence[str]):
        vectors, self.ids = np.asarray(vectors), list(ids)
        problems = _vector_problems(vectors, "vectors")
        if vectors.ndim == 2 and len(vectors) != len(self.ids):
            problems.append(
                f"found {len(vectors)} vectors and {len(self.ids)} ids: one id for each"
            )
        if strange := [i for i in self.ids if not isinstance(i, str)]:
            problems.append(f"found ids of another type than str, such as {strange[0]!r}")
        if problems:
            raise ValueError("index:\n  " + "\n  ".join(problems))
        self.vectors = normalized(vectors)

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: np.ndarray, k: int = 10, *, chunk: int = 16384) -> Hits:
        """The min(k, N) nearest vectors of each query (Q, D), compared with all.

        chunk: corpus vectors that are compared at once; Q x chunk cosines are in memory.
        """
        queries = np.asarray(queries)
        problems = _vector_problems(queries, "queries", self.vectors.shape[1])
        if k < 1:
            problems.append(f"found k={k}: ask for 1 or more")
        if problems:
            raise ValueError("search:\n  " + "\n  ".join(problems))
        k, chunk = min(k, len(self)), min(chunk, max(1, len(self)))
        queries_QD = jnp.asarray(normalized(queries))
        best = (
            jnp.full((len(queries), k), -jnp.inf, jnp.float32),
            jnp.full((len(queries), k), -1, jnp.int32),
        )
        for start in range(0, len(self), chunk):
            part = self.vectors[start : start + chunk]
            if len(part) < chunk:  # one shape, one program
                part = np.pad(part, ((0, chunk - len(part)), (0, 0)))
            best = merge_nearest(best, queries_QD, part, start, len(self))
        return Hits(np.asarray(best[0]), np.asarray(best[1], np.int64))

    def save(self, path: str | Path) -> None:
        """One .npz file, by way of a neighbour, so that there is a whole one or none."""
        ids = np.frombuffer(json.dumps(self.ids).encode(), np.uint8)
        write_whole(path, lambda file: np.savez(file, vectors=self.vectors, ids=ids))

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """What `save` wrote. The file is not trusted: nothing is unpickled, and sizes are checked before memory is taken.

        Raises:
          ValueError: if it is anything else.
        """
        with as_path(path).open("rb") as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    arrays = {name: _read_array(archive, name) for name in FILES}
                ids = json.loads(arrays["ids.npy"].tobytes())
                if not isinstance(ids, list):
                    raise ValueError(f"the ids are a {type(ids).__name__}, no list")
                return cls(arrays["vectors.npy"], ids)
            # RuntimeError is what zipfile cannot do, and too deep JSON; OSError: a place before the file's beginning.
            except (
                ValueError,
                KeyError,
                zipfile.BadZipFile,
                EOFError,
                RuntimeError,
                OSError,
            ) as error:
                raise ValueError(f"{path} is no index that `Index.save` wrote: {error}") from error


def normalized(vectors_ND: np.ndarray) -> np.ndarray:
    """(N, D) float32 of length 1; zeros stay zeros."""
    vectors = np.ascontiguousarray(vectors_ND, np.float32)
    largest = np.abs(vectors).max(1, initial=0, keepdims=True)
    vectors = vectors / np.where(
        largest > 0, largest, 1
    )  # whose squares neither overflow nor vanish
    lengths = np.sqrt(np.square(vectors).sum(1, keepdims=True))
    return vectors / np.where(lengths > 0, lengths, 1)


@jax.jit
def merge_nearest(
    best: tuple[jax.Array, jax.Array],
    queries_QD: jax.Array,
    part_CD: jax.Array,
    start: int,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """The best (cosines, places) (Q, k) so far, and those of rows start … start + C - 1 of `size`, as one."""
    cosines_QC = jnp.einsum("QD,CD->QC", queries_QD, part_CD, precision=jax.lax.Precision.HIGHEST)
    places_C = start + jnp.arange(len(part_CD), dtype=jnp.int32)
    cosines_QC = jnp.where(places_C[None] < size, cosines_QC, -jnp.inf)
    # top_k takes the first of equals, so the earlier ones have to stand in front
    k = best[0].shape[1]
    nearest_QK, where_QK = jax.lax.top_k(cosines_QC, min(k, len(part_CD)))
    cosines = jnp.concatenate([best[0], nearest_QK], axis=1)
    places = jnp.concatenate([best[1], places_C[where_QK]], axis=1)
    cosines, where_QK = jax.lax.top_k(cosines, k)
    return cosines, jnp.take_along_axis(places, where_QK, axis=1)


def _vector_problems(vectors: np.ndarray, what: str, width: int | None = None) -> list[str]:
    if (
        vectors.ndim != 2
        or vectors.dtype.kind not in "fiu"
        or width not in (None, vectors.shape[1])
    ):
        expected = f"(…, {'D' if width is None else width}) numbers"
        return [f"found {what} {vectors.shape} of {vectors.dtype}; expected {expected}"]
    if bad := int((~np.isfinite(vectors)).any(1).sum()):
        return [f"{bad} of {len(vectors)} {what} are not finite"]
    return []


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of the archive, after its header has been held against the size of its data."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:  # so that it can be no larger than the file
        raise ValueError(f"{name} is compressed")
    with archive.open(member) as file:
        shape, dtype = _read_header(file)
        if dtype != np.dtype(FILES[name]) or len(shape) != (2 if name == "vectors.npy" else 1):
            raise ValueError(f"{name} holds {dtype} {shape}")
        rest = member.file_size - file.tell()
        if math.prod(shape) * dtype.itemsize != rest:
            raise ValueError(f"{name} says {shape} and has {rest} bytes")
        return np.frombuffer(file.read(), dtype).reshape(shape)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of the .npy format, version 1.0, in C order."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} of the .npy format; expected (1, 0)")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran:
        raise ValueError("an array in Fortran's order")
    return shape, dtype
