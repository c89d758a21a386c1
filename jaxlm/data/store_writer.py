"""Writes token stores: documents as ids become the files of `store_format`."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.blocks import block_sums
from jaxlm.data.store_format import (
    BLOCKS,
    COUNTS,
    SCHEMA_VERSION,
    SPLIT_NAME,
    fingerprint,
    sha256_of,
    shard_name,
    token_dtype,
)
from jaxlm.files import as_path, cache_folder, is_remote, upload
from jaxlm.sealed import seal


class ShardWriter:
    """Writes documents as the shards of one split; holds one shard in memory.

    tokenizer: gives bos_id, eos_id, vocab_size (which picks the dtype) and `sentence_starts(ids)`.
    """

    def __init__(self, path: Path, split: str, tokenizer: Any, shard_tokens: int):
        if not SPLIT_NAME.fullmatch(split):
            raise ValueError(f"split {split!r}: expected lower-case letters, digits and '_'")
        self.path, self.split, self.tokenizer = path, split, tokenizer
        self.shard_tokens, self.dtype = shard_tokens, token_dtype(tokenizer.vocab_size)
        self.shards: list[dict[str, Any]] = []
        self._clear()

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """One document: its ids (n,) without bos and eos, and the UTF-8 bytes of its text."""
        length = len(ids) + 2
        if self._length and self._length + length > self.shard_tokens:
            self.flush()
        stored = np.empty(length, self.dtype)
        stored[0], stored[-1] = self.tokenizer.bos_id, self.tokenizer.eos_id
        stored[1:-1] = ids
        self._tokens.append(stored)
        self._sentences.append(self.tokenizer.sentence_starts(ids) + (self._length + 1))
        self._length += length
        self._offsets.append(self._length)
        self._num_bytes += num_bytes

    def flush(self) -> None:
        """Writes what is held as the next shard."""
        if not self._tokens:
            return
        arrays = {
            "tokens": np.concatenate(self._tokens),
            "documents": np.array(self._offsets, np.uint64),
            "sentences": np.concatenate(self._sentences).astype(np.uint64),
        }
        files = {part: self._save(part, array) for part, array in arrays.items()}
        sums = [block_sums(file) for file in files.values()]
        files[BLOCKS] = self._save(BLOCKS, np.concatenate(sums))
        self.shards.append(
            dict(
                num_tokens=self._length,
                num_documents=len(self._offsets) - 1,
                num_sentences=len(arrays["sentences"]),
                num_bytes=self._num_bytes,
                sha256={part: sha256_of(file) for part, file in files.items()},
            )
        )
        self._clear()

    def close(self) -> dict[str, Any]:
        """Writes the last shard and returns the split's entry of the manifest."""
        self.flush()
        totals = {name: sum(shard[name] for shard in self.shards) for name in COUNTS}
        return totals | {"shards": self.shards}

    def _save(self, part: str, array: np.ndarray) -> Path:
        file = self.path / shard_name(self.split, len(self.shards), part)
        np.save(file, array, allow_pickle=False)
        return file

    def _clear(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._sentences: list[np.ndarray] = [np.empty(0, np.int64)]
        self._offsets, self._length, self._num_bytes = [0], 0, 0


def write_store(
    path: str | os.PathLike,
    splits: Mapping[str, Iterable[np.ndarray]],
    tokenizer: Any,
    *,
    shard_tokens: int = 1 << 24,
) -> dict[str, Any]:
    """Writes a store in this process from documents given as ids, and returns its manifest.

    splits: split name -> documents, each int (n,) as `tokenizer.encode` gives them, without bos and eos.
      Their order is kept (`prepare` shuffles). Their bytes are counted by `tokenizer.num_bytes`.
    shard_tokens: a shard ends before it would hold more (but holds at least one document).

    Raises:
      FileExistsError: if something is at `path`.
      ValueError: if an id is not in the vocabulary.
    """
    path = as_path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another path, or delete it")
    partial = working_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    entries = {}
    for split, documents in splits.items():
        writer = ShardWriter(partial, split, tokenizer, shard_tokens)
        for number, document in enumerate(documents):
            ids = np.asarray(document, np.int64)
            if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                raise ValueError(
                    f"{split} document {number} has ids from {ids.min()} to {ids.max()}; "
                    f"the tokenizer's are below {tokenizer.vocab_size}"
                )
            writer.add(ids, int(tokenizer.num_bytes[ids].sum()))
        entries[split] = writer.close()
    manifest = finish_store(partial, entries, tokenizer)
    publish(partial, path)
    return manifest


def working_folder(path: Path, cache_dir: str = "") -> Path:
    """Where a store is made that is to be at `path`: beside it; for a bucket, in this host's cache."""
    if not is_remote(path):
        return path.with_name(f"{path.name}.partial")
    name = hashlib.sha256(os.fspath(path).encode()).hexdigest()[:32]
    return cache_folder(cache_dir) / "prepare" / f"{name}.partial"


def publish(folder: Path, path: Path) -> None:
    """Makes a whole local folder the store `path`: by one rename; on a bucket file by file, the manifest last."""
    if is_remote(path):
        upload(folder, path, last="manifest.json")
        shutil.rmtree(folder)
    else:
        os.rename(folder, path)


def finish_store(
    folder: Path, entries: Mapping[str, Any], tokenizer: Any, **extra: Any
) -> dict[str, Any]:
    """Saves the tokenizer and writes the manifest, last of all: a folder without one is no store.

    All else that is in the folder by then is in the manifest with its sha256, as `other_files`.
    """
    tokenizer.save(folder / "tokenizer")
    shards = {
        shard_name(split, index, part)
        for split, entry in entries.items()
        for index, shard in enumerate(entry["shards"])
        for part in shard["sha256"]
    }
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    manifest = seal(
        dict(
            schema_version=SCHEMA_VERSION,
            fingerprint=fingerprint(tokenizer.sha256, entries),
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            dtype=str(token_dtype(tokenizer.vocab_size)),
            splits=dict(entries),
            other_files={
                name: sha256_of(file) for name, file in sorted(files.items()) if name not in shards
            },
            **extra,
        )
    )
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return manifest
