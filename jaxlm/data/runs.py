"""Runs: tokenized documents on disk, sorted by a random key; read back in the order of all the keys.

An external sort: a worker writes what it holds as a run, sorted; then the range of keys is cut into buckets
that fit in memory, and each is collected from all runs and sorted. Every file appears under its name whole.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Every bucket opens every run again, which takes 0.3 ms: of much text both are large.
RUN_TOKENS = 1 << 24  # a worker writes what it holds when it holds so many
BUCKET_TOKENS = 1 << 24  # what is sorted in memory at once …
MAX_BUCKET_TOKENS = 1 << 26  # … and of a store of 4G tokens and more


class Runs:
    """Collects the documents of one split of one piece, and writes them sorted by key.

    run-PPPPP-RRR.SPLIT.tokens.npy (n,) and .documents.npy uint64 (4, m): key, start, length, bytes.
    """

    def __init__(self, work: Path, piece: int, split: str, dtype: np.dtype):
        self.work, self.piece, self.split, self.dtype = work, piece, split, dtype
        self.num_runs = self.num_documents = self.num_tokens = 0
        self._documents: list[tuple[int, np.ndarray, int]] = []
        self._held = 0

    def add(self, key: int, ids: np.ndarray, num_bytes: int) -> None:
        """Takes a document: its place in the shuffled order, ids (n,), and the UTF-8 bytes of its text."""
        self._documents.append((key, ids.astype(self.dtype), num_bytes))
        self._held += len(ids)
        if self._held >= RUN_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes the documents that are held, sorted by their keys, as the next run."""
        if not self._documents:
            return
        keys, ids, num_bytes = zip(*self._documents, strict=True)
        keys, lengths = np.array(keys, np.uint64), np.array([len(i) for i in ids], np.uint64)
        order = np.argsort(keys, kind="stable")
        lengths = lengths[order]
        starts = np.cumsum(lengths, dtype=np.uint64) - lengths
        table = np.stack([keys[order], starts, lengths, np.array(num_bytes, np.uint64)[order]])
        tokens = np.concatenate([ids[i] for i in order])
        _save(run_path(self.work, self.piece, self.num_runs, self.split, "tokens"), tokens)
        _save(run_path(self.work, self.piece, self.num_runs, self.split, "documents"), table)
        self.num_runs += 1
        self.num_documents += len(ids)
        self.num_tokens += len(tokens)
        self._documents, self._held = [], 0


def in_order_of_keys(
    work: Path, summaries: list[dict[str, Any]], split: str
) -> Iterator[tuple[np.ndarray, int]]:
    """(ids, bytes) of every document of a split, bucket after bucket."""
    paths = [
        [run_path(work, summary["number"], run, split, part) for part in ("documents", "tokens")]
        for summary in summaries
        for run in range(summary["splits"][split]["num_runs"])
    ]
    num_tokens = sum(summary["splits"][split]["num_tokens"] for summary in summaries)
    buckets = num_tokens // min(max(num_tokens >> 6, BUCKET_TOKENS), MAX_BUCKET_TOKENS) + 1
    for bucket in range(buckets):
        low, high = (2**64 * b // buckets for b in (bucket, bucket + 1))
        tables, parts = [], []
        for documents_path, tokens_path in paths:
            table = np.load(documents_path, mmap_mode="r", allow_pickle=False)
            first = np.searchsorted(table[0], np.uint64(low))
            stop = np.searchsorted(table[0], np.uint64(high - 1), side="right")
            if first < stop:
                table = np.array(table[:, first:stop])
                tables.append(table)
                parts.append((tokens_path, int(table[1, 0]), int(table[1, -1] + table[2, -1])))
        if not tables:
            continue
        keys, _, lengths, num_bytes = np.concatenate(tables, axis=1)
        del tables
        ids = _joined(parts)
        starts = np.cumsum(lengths) - lengths
        for i in np.argsort(keys, kind="stable"):
            yield ids[int(starts[i]) : int(starts[i] + lengths[i])], int(num_bytes[i])


def _joined(parts: Sequence[tuple[Path, int, int]]) -> np.ndarray:
    """The entries [start, end) of every file, one after the other; they are in memory once."""
    joined, filled = np.empty(0), 0
    for path, start, end in parts:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not filled:
            joined = np.empty(sum(end - start for _, start, end in parts), array.dtype)
        joined[filled : filled + end - start] = array[start:end]
        filled += end - start
    return joined


def run_path(work: Path, piece: int, run: int, split: str, part: str) -> Path:
    """The file of a part of a run: 'tokens' or 'table'."""
    return work / f"run-{piece:05d}-{run:03d}.{split}.{part}.npy"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A text file that appears under its name when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        yield file
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole, or not at all."""
    with replacing(path) as file:
        file.write(text)


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)
