"""How a token store lies on disk: the names, types and lengths of its files, and its manifest.

    STORE/manifest.json                 counts, sha256 of each file, tokenizer sha256, fingerprint, and its own sha256
    STORE/tokenizer/                    the tokenizer that made the ids
    STORE/train-00000.tokens.npy        uint16 | uint32, flat
    STORE/train-00000.documents.npy     uint64 (n + 1,), offsets of documents inside the shard
    STORE/train-00000.sentences.npy     uint64, sorted offsets of sentences inside the shard
    STORE/train-00000.blocks.npy        uint64, the sums of the blocks of these three, one after the other (blocks.py)

Schema 1, which is still read, has neither blocks nor the manifest's own sha256.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.blocks import file_bytes, num_blocks
from jaxlm.exits import Damaged
from jaxlm.files import as_path, is_remote
from jaxlm.sealed import is_sealed, read_object

SCHEMA_VERSION = 2
PARTS = ("tokens", "documents", "sentences")
BLOCKS = "blocks"
COUNTS = ("num_tokens", "num_documents", "num_sentences", "num_bytes")
SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_OTHER_NAME = re.compile(r"(\w[\w.-]*/)*\w[\w.-]*")  # no way out of the folder
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = (
    1 << 48
)  # of anything that is counted; files are compared with the counts before they are mapped
_MANIFEST_BYTES = 1 << 28  # that of 2e12 tokens in shards of 2**24
_SHOWN = 10  # how many problems an error names


def shard_name(split: str, index: int, part: str) -> str:
    """The file of a part of a shard: 'tokens', 'documents', 'sentences' or 'blocks'."""
    return f"{split}-{index:05d}.{part}.npy"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def layout(
    manifest: Mapping[str, Any], shard: Mapping[str, Any]
) -> dict[str, tuple[np.dtype, int]]:
    """(dtype, length) of each file of a shard, by its part."""
    wide = np.dtype(np.uint64)
    files = {
        "tokens": (np.dtype(manifest["dtype"]), shard["num_tokens"]),
        "documents": (wide, shard["num_documents"] + 1),  # n documents have n + 1 offsets
        "sentences": (wide, shard["num_sentences"]),
    }
    if manifest["schema_version"] > 1:
        files[BLOCKS] = (wide, sum(num_blocks(file_bytes(*files[part])) for part in PARTS))
    return files


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(tokenizer_sha256: str, splits: Mapping[str, Any]) -> str:
    """Of what the store holds: its tokenizer, and the bytes of its parts in their order. Schemas share it."""
    digests = [
        [split, index, {part: shard["sha256"][part] for part in PARTS}]
        for split, entry in sorted(splits.items())
        for index, shard in enumerate(entry["shards"])
    ]
    identity = json.dumps([1, tokenizer_sha256, digests], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the store at `path`, whole and with nothing in it that a store cannot have.

    File names are never read from it: they follow from a split's name and a shard's number.

    Raises:
      FileNotFoundError: without one. Damaged: if it is not what was written.
      ValueError: for another schema, or names, types and numbers that are no store's.
    """
    file = as_path(path) / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is no token store (it has no manifest.json): make one with "
            "`jaxlm-tool prepare_data --sources=… --tokenizer=… --output=…`"
        )
    manifest = read_object(file, _MANIFEST_BYTES)
    schema = manifest.get("schema_version")
    if (schema == SCHEMA_VERSION or "sha256" in manifest) and not is_sealed(manifest):
        raise Damaged(
            f"{file}: its sha256 is not the one in it: it is not what was written. Bring it back from a copy, or delete "
            "the store and prepare it again"
        )
    if schema not in (1, SCHEMA_VERSION):
        problems = [f"schema_version {schema}, expected {SCHEMA_VERSION} or 1: prepare it again"]
    else:
        problems = list(_problems(manifest))
    raise_problems(ValueError, as_path(path), problems)
    return manifest


def size_problems(path: Path, manifest: dict[str, Any], split: str) -> list[str]:
    """The files of a split that are missing, links, or of another size than the manifest says. Of a bucket's only those
    that are missing, which takes one listing: what is copied from there is compared by its sha256."""
    problems, remote = [], is_remote(path)
    found = {file.name: file for file in (path.iterdir() if remote else os.scandir(path))}
    for index, shard in enumerate(manifest["splits"][split]["shards"]):
        for part, (dtype, length) in layout(manifest, shard).items():
            name, expected = shard_name(split, index, part), file_bytes(dtype, length)
            if name not in found:
                problems.append(f"{name}: missing")
            elif remote:
                continue
            elif found[name].is_symlink():
                problems.append(f"{name}: a link, expected a file of the store's own")
            elif (size := found[name].stat().st_size) != expected:
                problems.append(f"{name}: {size:,} bytes, expected {expected:,}")
    return problems


def raise_problems(kind: type[Exception], path: Path, problems: list[str]) -> None:
    """Raises `kind` with the first problems of a store, if there are any."""
    if problems:
        more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = [f"the token store {path} cannot be used:", *problems[:_SHOWN], *more]
        raise kind("\n  ".join(lines))


def _problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What in a manifest no store has."""
    vocab_size, dtype = manifest.get("vocab_size"), manifest.get("dtype")
    if not _is_count(vocab_size) or dtype != str(token_dtype(vocab_size)):
        yield f"vocab_size {vocab_size!r} and dtype {dtype!r} do not fit one another"
    if not _is_sha256(manifest.get("tokenizer_sha256")):
        yield "its tokenizer_sha256 is no sha256"
    others = manifest.get("other_files", {})
    if not isinstance(others, dict) or not all(
        _OTHER_NAME.fullmatch(name) and _is_sha256(digest) for name, digest in others.items()
    ):
        yield "its other_files are not names in its folder and their sha256"
    splits = manifest.get("splits")
    if not isinstance(splits, dict):
        yield "it names no splits"
        return
    shards_are_right = True
    for split, entry in splits.items():
        if not SPLIT_NAME.fullmatch(split):
            yield f"a split is named {split!r}, expected lower-case letters, digits and '_'"
        for problem in _split_problems(manifest, entry):
            yield f"{split}: {problem}"
            shards_are_right = False
    if shards_are_right and manifest.get("fingerprint") != fingerprint(
        manifest.get("tokenizer_sha256"), splits
    ):
        yield "its fingerprint is not that of its files"


def _split_problems(manifest: Mapping[str, Any], entry: Any) -> Iterator[str]:
    shards = entry.get("shards") if isinstance(entry, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        yield "it names no shards"
        return
    parts = PARTS if manifest["schema_version"] == 1 else (*PARTS, BLOCKS)
    for index, shard in enumerate(shards):
        digests = shard.get("sha256")
        if not all(_is_count(shard.get(name)) for name in COUNTS):
            yield f"shard {index}: expected counts from 0 to {_MOST}"
            return
        if not isinstance(digests, dict) or not all(_is_sha256(digests.get(p)) for p in parts):
            yield f"shard {index}: expected a sha256 of each of {', '.join(parts)}"
    for name in COUNTS:
        if entry.get(name) != sum(shard[name] for shard in shards):
            yield f"{name} {entry.get(name)!r} is not the sum of its shards'"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
