"""What is wrong with a token store, found by reading all of it: for `tools/fsck.py` and `tools/doctor.py`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.store_format import (
    PARTS,
    layout,
    read_manifest,
    sha256_of,
    shard_name,
    size_problems,
)
from jaxlm.exits import Damaged
from jaxlm.files import as_path, is_remote
from jaxlm.tokenizers import load_tokenizer

_AT_ONCE = 1 << 22  # numbers that are compared at a time


def problems(path: str | os.PathLike) -> list[str]:
    """A line for each file of the store at `path` (all splits) that is not what was written; [] for a whole store.

    It reads every byte once, in little memory. Of a local store it also says which numbers cannot be: offsets that do not
    ascend or lead out of their shard, ids beyond the vocabulary. No model and no JAX is needed.
    """
    path = as_path(path)
    try:
        manifest = read_manifest(path)
    except (Damaged, OSError, ValueError) as error:
        return [str(error)]
    found = list(_tokenizer_problems(path, manifest))
    for name, sha256 in manifest.get("other_files", {}).items():
        found += _file_problems(path, name, sha256)
    for split, entry in manifest["splits"].items():
        wrong = size_problems(path, manifest, split)
        for index, shard in enumerate(entry["shards"]):
            for part in layout(manifest, shard):
                name = shard_name(split, index, part)
                if not any(line.startswith(f"{name}:") for line in wrong):
                    wrong += _file_problems(path, name, shard["sha256"][part])
        found += wrong or _number_problems(path, split, manifest)
    return found


def _file_problems(path: Path, name: str, sha256: str) -> list[str]:
    file = path / name
    if not file.is_file():
        return [f"{name}: missing"]
    return [] if sha256_of(file) == sha256 else [f"{name}: its sha256 is not the manifest's"]


def _tokenizer_problems(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    try:
        if load_tokenizer(path / "tokenizer").sha256 != manifest["tokenizer_sha256"]:
            yield "tokenizer: it is not the one that made the ids"
    except (Damaged, OSError, ValueError) as error:
        yield f"tokenizer: {error}"


def _number_problems(path: Path, split: str, manifest: dict[str, Any]) -> list[str]:
    """Of files that are what was written: the numbers in them that no `store_writer` writes."""
    if is_remote(path):
        return []
    found = []
    for index, shard in enumerate(manifest["splits"][split]["shards"]):
        arrays = {
            part: np.load(path / shard_name(split, index, part), mmap_mode="r", allow_pickle=False)
            for part in PARTS
        }
        size, offsets = shard["num_tokens"], arrays["documents"]
        if offsets[0] != 0 or offsets[-1] != size or not _ascends(offsets, size):
            found.append(f"{shard_name(split, index, 'documents')}: not the offsets of documents")
        if not _ascends(arrays["sentences"], size - 1):
            found.append(f"{shard_name(split, index, 'sentences')}: not the offsets of sentences")
        if not _is_below(arrays["tokens"], manifest["vocab_size"]):
            found.append(f"{shard_name(split, index, 'tokens')}: ids beyond the vocabulary")
    return found


def _ascends(offsets: np.ndarray, last: int) -> bool:
    """Whether each is larger than the one before it, and none larger than `last`."""
    if len(offsets) and offsets[-1] > last:
        return False
    starts = range(0, max(len(offsets) - 1, 0), _AT_ONCE)
    chunks = (offsets[start : start + _AT_ONCE + 1] for start in starts)
    return all(bool((chunk[1:] > chunk[:-1]).all()) for chunk in chunks)


def _is_below(tokens: np.ndarray, vocab_size: int) -> bool:
    chunks = (tokens[i : i + _AT_ONCE] for i in range(0, len(tokens), _AT_ONCE))
    return all(int(chunk.max()) < vocab_size for chunk in chunks)
