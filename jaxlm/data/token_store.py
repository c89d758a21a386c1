"""Token stores: tokenized text as flat memory-mapped shards, with document and sentence offsets.

A document is stored as `[bos] ids [eos]`, bos first and eos last also where both are one id. So every
text token is the label of the token before it exactly once, and so is every document's end:

    position    0     1    2    3     4     5    6     7
    token     [bos]  the  cat  sat  [eos] [bos]  a   [eos] …
    document    0     0    0    0     0     1    1     1   …
    sentence          ^                          ^

No document crosses a shard, so a shard is longer than asked for where a document is. The files are those of
`store_format`; `store_writer` makes them, `store_check` reads them whole.
"""

import functools
import hashlib
import io
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.blocks import MEND, CheckedArray, file_bytes, num_blocks
from jaxlm.data.store_format import (
    BLOCKS,
    PARTS,
    layout,
    raise_problems,
    read_manifest,
    shard_name,
    size_problems,
)
from jaxlm.exits import Damaged
from jaxlm.files import as_path, cache_folder, fetch, is_remote

log = logging.getLogger("jaxlm")


class TokenStore:
    """One split of a token store, read through memory maps: what is not asked for is not read.

    Positions are global over the split's shards, from 0 to `num_tokens`; documents are counted from 0.
    Sent to another process it is a path and a name, and is opened again there.

    cache_dir: where the shards of a store on a bucket are copied, each at its first use, once per host and checked
      against the manifest's sha256; '' is `files.cache_folder`'s.

    Raises:
      FileNotFoundError: without a complete store at `path` (a store appears under its name when whole).
      ValueError: for an unknown split or schema.
      Damaged: if files are missing or have another size than the manifest says; and every method that reads, if what it
        reads is not what was written.
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
        self._open: dict[tuple[int, str], CheckedArray] = {}
        self._sums: dict[int, dict[str, np.ndarray]] = {}
        self._all_starts: np.ndarray | None = None
        raise_problems(Damaged, self.path, size_problems(self.path, self.manifest, split))
        if self.manifest["schema_version"] == 1:
            _say_unchecked(self.path)

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
            held = self._part(shard, "tokens").read(low, high)
            out[first + low - start : first + high - start] = held
        return out

    def document_starts(self) -> np.ndarray:
        """The first position of every document, uint64 (num_documents,): 8 bytes a document, made at
        the first call and kept. `documents_in` and `document_of` read only the pages that they need."""
        if self._all_starts is None:
            starts = [
                self._part(shard, "documents").read(0, entry["num_documents"])
                + np.uint64(self._token_starts[shard])
                for shard, entry in enumerate(self._shards)
            ]
            self._all_starts = np.concatenate([np.empty(0, np.uint64), *starts])
        return self._all_starts

    def documents_in(self, start: int, stop: int) -> np.ndarray:
        """The first positions of the documents that begin in [start, stop), int64 (n,), ascending."""
        return self._offsets_in("documents", start, stop)

    def sentence_starts(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) at which a sentence begins, int64 (n,), ascending."""
        return self._offsets_in("sentences", start, stop)

    def document_of(self, position: int) -> int:
        """The number of the document that holds `position`."""
        self._check_range(position, position + 1)
        shard = int(np.searchsorted(self._token_starts, position, side="right")) - 1
        local = position - int(self._token_starts[shard])
        begun, _ = self._part(shard, "documents").between(local + 1, local + 1)
        return int(self._document_starts[shard]) + begun - 1

    def document_span(self, index: int) -> tuple[int, int]:
        """(start, stop): the positions of document `index`, its bos and eos included."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.path}")
        shard = int(np.searchsorted(self._document_starts, index, side="right")) - 1
        local = index - int(self._document_starts[shard])
        start, stop = self._part(shard, "documents").read(local, local + 2)
        first = int(self._token_starts[shard])
        return first + int(start), first + int(stop)

    def _file(self, shard: int, part: str) -> Path:
        """The local file: the store's own, or the copy of a bucket's, made if it is not there yet."""
        path = self.path / shard_name(self.split, shard, part)
        if is_remote(path):
            return fetch(path, self.cache, self._shards[shard]["sha256"][part])
        return path

    def _part(self, shard: int, part: str) -> CheckedArray:
        """One file, mapped at its first use."""
        if (shard, part) not in self._open:
            dtype, length = layout(self.manifest, self._shards[shard])[part]
            sums = self._block_sums(shard).get(part)
            self._open[shard, part] = CheckedArray(self._file(shard, part), dtype, length, sums)
        return self._open[shard, part]

    def _block_sums(self, shard: int) -> dict[str, np.ndarray]:
        """The sums of the blocks of each part of a shard, read at its first use; {} in schema 1."""
        if self.manifest["schema_version"] == 1:
            return {}
        if shard not in self._sums:
            path, files = self._file(shard, BLOCKS), layout(self.manifest, self._shards[shard])
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != self._shards[shard]["sha256"][BLOCKS]:
                raise Damaged(f"{path}: its sha256 is not the manifest's. {MEND}")
            held = np.load(io.BytesIO(data), allow_pickle=False)
            ends = np.cumsum([num_blocks(file_bytes(*files[part])) for part in PARTS])
            self._sums[shard] = dict(zip(PARTS, np.split(held, ends[:-1]), strict=True))
        return self._sums[shard]

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
            # Those of documents end with the shard's length.
            _, offsets = self._part(shard, part).between(low, high)
            found.append(offsets.astype(np.int64) + first)
        return np.concatenate(found)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) of {self.num_tokens} tokens in {self.path}")


@functools.cache
def _say_unchecked(path: Path) -> None:
    log.warning(
        "%s is a token store of schema 1, which cannot be checked as it is read: prepare it again to have that, or run "
        "`jaxlm-tool fsck` on it now and then",
        path,
    )


def _running_sum(counts: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(list(counts), dtype=np.int64)]).astype(np.int64)
