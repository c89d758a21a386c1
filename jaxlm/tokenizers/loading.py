"""Tokenizers from files: saved ones, Hugging Face folders, SentencePiece models, BERT's vocab.txt."""

import json
import os
import re
from pathlib import Path
from typing import Any

import tokenizers as hf

from jaxlm.files import as_path
from jaxlm.tokenizers.base import META, ROLES, Tokenizer, known_spellings, pick
from jaxlm.tokenizers.kinds import TOKENIZERS, JSONTokenizer, SentencePieceTokenizer


def make_tokenizer(
    kind: str, *, characters: str = "", path: str | os.PathLike = "", num_sentinels: int = 100
) -> Tokenizer:
    """A tokenizer that needs no training: 'bytes', 'chars' (of `characters`), or a model file at `path`
    ('sentencepiece', 'tokenizer_json'). A loaded model gets sentinels up to `num_sentinels` of them."""
    pick(TOKENIZERS, kind, "tokenizer kind")
    if kind in ("bytes", "chars"):
        blob = "".join(sorted(set(characters))).encode() if kind == "chars" else b"bytes\n"
        return TOKENIZERS[kind](blob, num_sentinels=num_sentinels)
    return TOKENIZERS[kind](as_path(path).read_bytes(), num_sentinels=num_sentinels)


def is_saved(directory: Path) -> bool:
    """Whether `save` has finished in the folder: on a bucket, a folder that is not whole looks like one that is."""
    return (directory / META).is_file()


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """What `save` wrote, or a foreign tokenizer.json, *.model or vocab.txt: the file or its folder.

    In a foreign folder tokenizer_config.json and special_tokens_map.json name the reserved tokens, else
    they are found by their usual spellings; those that are nowhere are appended after the last id.

    Raises:
      FileNotFoundError: if none of these is there.
      ValueError: if a saved tokenizer's file is not the one that was saved.
    """
    path = as_path(directory)
    meta = path / META
    if meta.is_file():
        saved = json.loads(meta.read_text(encoding="utf-8"))
        kind = pick(TOKENIZERS, saved["kind"], "tokenizer kind")
        tokenizer = kind((path / kind.filename).read_bytes(), saved)
        if tokenizer.sha256 != saved["sha256"]:
            raise ValueError(f"{path}: {kind.filename} is not the file that was saved with {META}")
        return tokenizer
    folder, files = (path, sorted(path.iterdir())) if path.is_dir() else (path.parent, [path])
    for file in sorted(files, key=lambda file: file.suffix != ".json"):
        if file.name == "tokenizer.json" or (file == path and file.suffix == ".json"):
            return _foreign(JSONTokenizer, file.read_bytes(), folder)
        if file.suffix == ".model" and file.is_file():
            return _foreign(SentencePieceTokenizer, file.read_bytes(), folder)
        if file.name == "vocab.txt":
            return _foreign(JSONTokenizer, _wordpiece(file, folder), folder)
    raise FileNotFoundError(
        f"found no tokenizer at {path}: expected a folder with {META}, tokenizer.json, *.model or vocab.txt"
    )


def _foreign(kind: type[Tokenizer], blob: bytes, folder: Path) -> Tokenizer:
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
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _wordpiece(vocab: Path, folder: Path) -> bytes:
    """BERT's vocab.txt as a tokenizer.json; lower case as tokenizer_config.json says, else if no entry
    has a capital."""
    words = vocab.read_text(encoding="utf-8").split("\n")
    if words and not words[-1]:
        words.pop()
    ids = {word.rstrip("\r"): i for i, word in enumerate(words)}
    cased = any(re.search("[A-Z]", word) for word in ids if word not in known_spellings())
    lower = bool(_read_json(folder / "tokenizer_config.json").get("do_lower_case", not cased))
    model = hf.Tokenizer(hf.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    model.normalizer = hf.normalizers.BertNormalizer(lowercase=lower)
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    model.decoder = hf.decoders.WordPiece()
    model.add_special_tokens([word for word in ids if word in known_spellings()])
    return model.to_str().encode()
