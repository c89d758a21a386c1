"""Tokenizers from files: saved ones, Hugging Face folders, SentencePiece models, BERT's vocab.txt."""

import os
import re
from pathlib import Path
from typing import Any

import tokenizers as hf

from jaxlm.exits import Damaged
from jaxlm.files import as_path, read_at_most
from jaxlm.sealed import read_object
from jaxlm.tokenizers.base import (
    META,
    ROLES,
    Tokenizer,
    identity_sha256,
    known_spellings,
    pick,
)
from jaxlm.tokenizers.kinds import TOKENIZERS, JSONTokenizer, SentencePieceTokenizer

MAX_MODEL_BYTES = 256 << 20  # the largest published ones have 35 MB
MAX_META_BYTES = 64 << 20  # of the JSON beside it; tokenizer_config.json lists all added tokens


def make_tokenizer(
    kind: str, *, characters: str = "", path: str | os.PathLike = "", num_sentinels: int = 100
) -> Tokenizer:
    """A tokenizer that needs no training: 'bytes', 'chars' (of `characters`), or a model file at `path`
    ('sentencepiece', 'tokenizer_json'). A loaded model gets sentinels up to `num_sentinels` of them."""
    pick(TOKENIZERS, kind, "tokenizer kind")
    if kind in ("bytes", "chars"):
        blob = "".join(sorted(set(characters))).encode() if kind == "chars" else b"bytes\n"
        return TOKENIZERS[kind](blob, num_sentinels=num_sentinels)
    return TOKENIZERS[kind](read_model(as_path(path)), num_sentinels=num_sentinels)


def read_model(file: Path) -> bytes:
    """A tokenizer's file; raises ValueError if it is larger than any."""
    return read_at_most(file, MAX_MODEL_BYTES)


def is_saved(directory: Path) -> bool:
    """Whether `save` has finished in the folder: on a bucket, a folder that is not whole looks like one that is."""
    return (directory / META).is_file()


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """What `save` wrote, or a foreign tokenizer.json, *.model or vocab.txt: the file or its folder.

    In a foreign folder tokenizer_config.json and special_tokens_map.json name the reserved tokens, else
    they are found by their usual spellings; those that are nowhere are appended after the last id.

    Raises:
      FileNotFoundError: if none of these is there.
      Damaged: if a saved tokenizer is not what was saved.
      ValueError: if a foreign one cannot be read.
    """
    path = as_path(directory)
    kind_of_error, load = (Damaged, _saved) if is_saved(path) else (ValueError, _foreign)
    try:
        return load(path)
    except OSError:
        raise
    except Exception as error:  # tokenizers and sentencepiece raise bare Exceptions for bad files
        raise kind_of_error(
            f"{path}: its tokenizer cannot be read: {str(error)[:300] or type(error).__name__}"
        ) from error


def _saved(path: Path) -> Tokenizer:
    saved = read_object(path / META, MAX_META_BYTES)
    kind = pick(TOKENIZERS, saved["kind"], "tokenizer kind")
    blob = read_model(path / kind.filename)
    reserved = {name: saved[name] for name in ("roles", "sentinel_ids", "vocab_size")}
    if identity_sha256(kind.kind, blob, reserved) != saved["sha256"]:  # before anything parses it
        raise ValueError(
            f"{kind.filename} and {META} are not those that were saved together (sha256): copy both again from where they "
            "came from"
        )
    return kind(blob, saved)


def _foreign(path: Path) -> Tokenizer:
    folder, files = (path, sorted(path.iterdir())) if path.is_dir() else (path.parent, [path])
    for file in sorted(files, key=lambda file: file.suffix != ".json"):
        if file.name == "tokenizer.json" or (file == path and file.suffix == ".json"):
            return _with_names(JSONTokenizer, read_model(file), folder)
        if file.suffix == ".model" and file.is_file():
            return _with_names(SentencePieceTokenizer, read_model(file), folder)
        if file.name == "vocab.txt":
            return _with_names(JSONTokenizer, _wordpiece(file, folder), folder)
    raise FileNotFoundError(
        f"found no tokenizer at {path}: expected a folder with {META}, tokenizer.json, *.model or vocab.txt"
    )


def _with_names(kind: type[Tokenizer], blob: bytes, folder: Path) -> Tokenizer:
    """A tokenizer whose reserved tokens the JSON files beside it may name."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = _read_json(folder / name)
        for role in ROLES:
            token = settings.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named[role] = token
    return kind(blob, named=named)


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file, MAX_META_BYTES) if file.is_file() else {}


def _wordpiece(vocab: Path, folder: Path) -> bytes:
    """BERT's vocab.txt as a tokenizer.json, its normalization as tokenizer_config.json says; without a word there, to lower
    case if no entry has a capital."""
    words = read_model(vocab).decode("utf-8").split("\n")
    if words and not words[-1]:
        words.pop()
    ids = {word.rstrip("\r"): i for i, word in enumerate(words)}
    cased = any(re.search("[A-Z]", word) for word in ids if word not in known_spellings())
    settings = _read_json(folder / "tokenizer_config.json")
    model = hf.Tokenizer(hf.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    model.normalizer = hf.normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", not cased)),
        strip_accents=settings.get("strip_accents"),  # None: where it makes lower case
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    model.decoder = hf.decoders.WordPiece()
    model.add_special_tokens([word for word in ids if word in known_spellings()])
    return model.to_str().encode()
