"""Token stores: tokenized text as flat memory-mapped shards, with document and sentence offsets.

    STORE/manifest.json                 counts, sha256 of each file, tokenizer sha256, fingerprint
    STORE/tokenizer/                    the tokenizer that made the ids
    STORE/train-00000.tokens.npy        uint16 | uint32, flat
    STORE/train-00000.documents.npy     uint64 (n + 1,), offsets of documents inside the shard
    STORE/train-00000.sentences.npy     uint64, sorted offsets of sentences inside the shard

A document is stored as `[bos] ids [eos]`, bos first and eos last also where both are one id. So every
text token is the label of the token before it exactly once, and so is every document's end:

    position    0     1    2    3     4     5    6     7
    token     [bos]  the  cat  sat  [eos] [bos]  a   [eos] …
    document    0     0    0    0     0     1    1     1   …
    sentence          ^                          ^

No document crosses a shard, so a shard is longer than asked for where a document is.
"""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.files import as_path, cache_folder, fetch, is_remote, upload

SCHEMA_VERSION = 1
PARTS = ("tokens", "documents", "sentences")
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class TokenStore:
    """One split of a token store, read through memory maps: what is not asked for is not read.

    Positions are global over the split's shards, from 0 to `num_tokens`; documents are counted from 0.
    Sent to another process it is a path and a name, and is opened again there.

    cache_dir: where the shards of a store on a bucket are copied, each at its first use, once per host and checked
      against the manifest's sha256; '' is `files.cache_folder`'s.

    Raises:
      FileNotFoundError: without a complete store at `path` (a store appears under its name when whole).
      ValueError: for an unknown split, schema or dtype, or shards shorter than the manifest says.
    """

    def __init__(self, path: str | os.PathLike, split: str = "train", *, cache_dir: str = ""):
        self.path, self.split = as_path(path), split
        self.cache = cache_folder(cache_dir) / "shards"
        self.manifest: dict[str, Any] = read_manifest(self.path)
        if split not in self.manifest["splits"]:
            known = ", ".join(sorted(self.manifest["splits"]))
            raise ValueError(f"{path} has no split {split!r}; it has: {known}")
        entry = self.manifest["splits"][split]
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self.num_bytes: int = entry["num_bytes"]  # UTF-8 bytes of the split's text
        self.fingerprint: str = self.manifest["fingerprint"]
        self._shards = entry["shards"]
        self._token_starts = _running_sum(shard["num_tokens"] for shard in self._shards)
        self._document_starts = _running_sum(shard["num_documents"] for shard in self._shards)
        self._open: dict[tuple[int, str], np.ndarray] = {}
        self._all_starts: np.ndarray | None = None
        _raise_problems(self.path, self._size_problems())

    def __reduce__(self):
        opened = functools.partial(TokenStore, cache_dir=str(self.cache.parent))
        return opened, (os.fspath(self.path), self.split)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids at [start, stop), int32 (stop - start,), across shards.

        Raises IndexError unless 0 <= start <= stop <= num_tokens.
        """
        self._check_range(start, stop)
        out = np.empty(stop - start, np.int32)
        for shard, first, low, high in self._shards_in(start, stop):
            out[first + low - start : first + high - start] = self._part(shard, "tokens")[low:high]
        return out

    def document_starts(self) -> np.ndarray:
        """The first position of every document, uint64 (num_documents,): 8 bytes a document, made at
        the first call and kept. `documents_in` and `document_of` read only the pages that they need."""
        if self._all_starts is None:
            starts = [
                self._part(shard, "documents")[:-1] + np.uint64(first)
                for shard, first in enumerate(self._token_starts[:-1])
            ]
            self._all_starts = np.concatenate([np.empty(0, np.uint64), *starts])
        return self._all_starts

    def documents_in(self, start: int, stop: int) -> np.ndarray:
        """The first positions of the documents that begin in [start, stop), int64, ascending."""
        return self._offsets_in("documents", start, stop)

    def sentence_starts(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) at which a sentence begins, int64, ascending."""
        return self._offsets_in("sentences", start, stop)

    def document_of(self, position: int) -> int:
        """The number of the document that holds `position`."""
        self._check_range(position, position + 1)
        shard = int(np.searchsorted(self._token_starts, position, side="right")) - 1
        local = np.uint64(position - self._token_starts[shard])
        index = np.searchsorted(self._part(shard, "documents"), local, side="right") - 1
        return int(self._document_starts[shard] + index)

    def document_span(self, index: int) -> tuple[int, int]:
        """(start, stop): the positions of document `index`, its bos and eos included."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.path}")
        shard = int(np.searchsorted(self._document_starts, index, side="right")) - 1
        local = index - int(self._document_starts[shard])
        start, stop = self._part(shard, "documents")[local : local + 2]
        first = int(self._token_starts[shard])
        return first + int(start), first + int(stop)

    def verify(self) -> None:
        """Reads every file of the split: raises ValueError with the list of those whose sha256 differs."""
        problems = self._size_problems()
        for index, shard in enumerate(self._shards):
            for part in PARTS:
                name = shard_name(self.split, index, part)
                path = self._file(index, part)
                if path.is_file() and sha256_of(path) != shard["sha256"][part]:
                    problems.append(f"{name}: its sha256 is not the manifest's")
        _raise_problems(self.path, problems)

    def _file(self, shard: int, part: str) -> Path:
        """The local file: the store's own, or the copy of a bucket's, made if it is not there yet."""
        path = self.path / shard_name(self.split, shard, part)
        if is_remote(path):
            return fetch(path, self.cache, self._shards[shard]["sha256"][part])
        return path

    def _part(self, shard: int, part: str) -> np.ndarray:
        """A memory map of one file, opened at first use and checked against the manifest."""
        if (shard, part) not in self._open:
            path, entry = self._file(shard, part), self._shards[shard]
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            shape = (_part_length(entry, part),)
            dtype = self.manifest["dtype"] if part == "tokens" else "uint64"
            if array.shape != shape or array.dtype != dtype:
                found = f"{array.dtype} {array.shape}"
                raise ValueError(f"{path}: found {found}, the manifest says {dtype} {shape}")
            self._open[shard, part] = array
        return self._open[shard, part]

    def _shards_in(self, start: int, stop: int) -> Iterable[tuple[int, int, int, int]]:
        """(shard, its first position, low, high) for each shard that [start, stop) touches."""
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        while shard < len(self._shards) and self._token_starts[shard] < stop:
            first, end = int(self._token_starts[shard]), int(self._token_starts[shard + 1])
            yield shard, first, max(start - first, 0), min(stop, end) - first
            shard += 1

    def _offsets_in(self, part: str, start: int, stop: int) -> np.ndarray:
        self._check_range(start, stop)
        found = [np.empty(0, np.int64)]
        for shard, first, low, high in self._shards_in(start, stop):
            offsets = self._part(
                shard, part
            )  # ends with the shard's length where part is documents
            bounds = np.searchsorted(offsets, np.array([low, high], np.uint64))
            found.append(offsets[slice(*bounds)].astype(np.int64) + first)
        return np.concatenate(found)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) of {self.num_tokens} tokens in {self.path}")

    def _size_problems(self) -> list[str]:
        problems = []
        if is_remote(
            self.path
        ):  # one listing; the copies' sha256 is checked, and so is their length
            names = {path.name for path in self.path.iterdir()}
            wanted = [shard_name(self.split, i, p) for i in range(len(self._shards)) for p in PARTS]
            return [f"{name}: missing" for name in wanted if name not in names]
        for index, shard in enumerate(self._shards):
            for part in PARTS:
                path = self._file(index, part)
                width = np.dtype(self.manifest["dtype"] if part == "tokens" else "uint64").itemsize
                least = _part_length(shard, part) * width
                if not path.is_file():
                    problems.append(f"{path.name}: missing")
                elif path.stat().st_size < least:
                    size = path.stat().st_size
                    problems.append(f"{path.name}: {size} bytes, expected at least {least}")
        return problems


class ShardWriter:
    """Writes documents as the shards of one split; holds one shard in memory.

    tokenizer: gives bos_id, eos_id, vocab_size (which picks the dtype) and `sentence_starts(ids)`.
    """

    def __init__(self, path: Path, split: str, tokenizer: Any, shard_tokens: int):
        if not _SPLIT_NAME.fullmatch(split):
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
        digests = {}
        for part, array in arrays.items():
            file = self.path / shard_name(self.split, len(self.shards), part)
            np.save(file, array, allow_pickle=False)
            digests[part] = sha256_of(file)
        self.shards.append(
            dict(
                num_tokens=self._length,
                num_documents=len(self._offsets) - 1,
                num_sentences=len(arrays["sentences"]),
                num_bytes=self._num_bytes,
                sha256=digests,
            )
        )
        self._clear()

    def close(self) -> dict[str, Any]:
        """Writes the last shard and returns the split's entry of the manifest."""
        self.flush()
        counts = ("num_tokens", "num_documents", "num_sentences", "num_bytes")
        totals = {name: sum(shard[name] for shard in self.shards) for name in counts}
        return totals | {"shards": self.shards}

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
    """Saves the tokenizer and writes the manifest, last of all: a folder without one is no store."""
    tokenizer.save(folder / "tokenizer")
    digests = [
        [split, index, shard["sha256"]]
        for split, entry in sorted(entries.items())
        for index, shard in enumerate(entry["shards"])
    ]
    identity = json.dumps([SCHEMA_VERSION, tokenizer.sha256, digests], sort_keys=True)
    manifest = dict(
        schema_version=SCHEMA_VERSION,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=str(token_dtype(tokenizer.vocab_size)),
        splits=dict(entries),
        **extra,
    )
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return manifest


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the store at `path`, checked as far as names and types go.

    File names are never read from it: they follow from a split's name and a shard's number.
    """
    file = as_path(path) / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is no token store (it has no manifest.json): make one with "
            "tools/prepare_data.py --sources=… --tokenizer=… --output=…"
        )
    manifest = json.loads(file.read_text(encoding="utf-8"))
    problems = []
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version")
        problems.append(f"schema_version {found}, expected {SCHEMA_VERSION}: prepare it again")
    if manifest.get("dtype") not in ("uint16", "uint32"):
        problems.append(f"dtype {manifest.get('dtype')!r}, expected 'uint16' or 'uint32'")
    problems += [
        f"a split is named {split!r}, expected lower-case letters, digits and '_'"
        for split in manifest.get("splits", {})
        if not _SPLIT_NAME.fullmatch(split)
    ]
    _raise_problems(as_path(path), problems)
    return manifest


def shard_name(split: str, index: int, part: str) -> str:
    return f"{split}-{index:05d}.{part}.npy"


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _part_length(shard: Mapping[str, Any], part: str) -> int:
    return shard[f"num_{part}"] + (part == "documents")  # n documents have n + 1 offsets


def _running_sum(counts: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(list(counts), dtype=np.int64)]).astype(np.int64)


def _raise_problems(path: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([f"the token store {path} cannot be used:", *problems]))
