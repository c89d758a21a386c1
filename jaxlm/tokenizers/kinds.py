"""The kinds of tokenizers: one class each, and the table that selects them."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sentencepiece
import tokenizers as hf

from jaxlm.files import as_path
from jaxlm.tokenizers.base import ROLES, Tokenizer, is_ideograph, reserved_names

MAX_IDS = 1 << 22  # published vocabularies have 262,144 at most; a file may claim any


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 after the seven reserved ids (ByT5, Xue et al. 2021)."""

    kind, filename = "bytes", "bytes.txt"

    def _read(self, blob):
        pieces = [bytes([byte]) for byte in range(256)]
        names = [p.decode() if p.isascii() else f"<0x{p[0]:02X}>" for p in pieces]
        return (
            [*reserved_names(), *names],
            [*([b""] * len(ROLES)), *pieces],
            set(range(len(ROLES))),
        )

    def _encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + len(ROLES)

    def _is_exact(self):
        return True


class CharTokenizer(Tokenizer):
    """One id per character of a given set, after the seven reserved ids; others are unk."""

    kind, filename = "chars", "characters.txt"

    def _read(self, blob):
        characters = blob.decode("utf-8")
        if list(characters) != sorted(set(characters)):
            raise ValueError("the characters must be sorted and distinct")
        self._codes = np.array([ord(c) for c in characters], np.uint32)
        names = [*reserved_names(), *characters]
        pieces = [*([b""] * len(ROLES)), *(c.encode() for c in characters)]
        return names, pieces, set(range(len(ROLES)))

    def _encode(self, text):
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        if not len(self._codes):
            return np.full(len(codes), self.roles["unk"], np.int32)
        index = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        known = self._codes[index] == codes
        return np.where(known, index + len(ROLES), self.roles["unk"]).astype(np.int32)

    def _spans(self, text):
        return [(i, i + 1) for i in range(len(text))]

    def _is_exact(self):
        return True  # for texts of its characters


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo & Richardson 2018): unigram or BPE.

    Exact for `train_tokenizer`'s models: no normalization, no dummy prefix, byte fallback (also for
    newlines and tabs). SentencePiece writes a space as U+2581, so a U+2581 in the text itself is encoded
    as its three bytes here; without byte fallback it becomes a space.
    """

    kind, filename = "sentencepiece", "tokenizer.model"

    def _read(self, blob):
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=blob)
        tokens = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        special = {i for i in range(len(tokens)) if model.is_control(i) or model.is_unknown(i)}
        pieces = [
            bytes([int(token[3:5], 16)]) if model.is_byte(i) else token.replace("▁", " ").encode()
            for i, token in enumerate(tokens)
        ]
        self._escape = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        if any(i in special for i in self._escape):
            self._escape = []
        return tokens, pieces, special

    def _encode(self, text):
        text.encode()  # SentencePiece would replace lone surrogates in silence
        if "▁" not in text or not self._escape:
            return np.array(self._model.encode(text, out_type=int), np.int32)
        ids: list[int] = []
        for number, part in enumerate(text.split("▁")):
            ids += self._escape if number else []
            ids += self._model.encode(part, out_type=int)
        return np.array(ids, np.int32)

    def _spans(self, text):
        spans: list[tuple[int, int]] = []
        start = 0
        for number, part in enumerate(text.split("▁") if self._escape else [text]):
            spans += [(start - 1, start)] * len(self._escape) if number else []
            spans += [(start + a, start + b) for a, b in self._part_spans(part)]
            start += len(part) + 1
        return spans

    def _part_spans(self, text):
        if hasattr(self._model, "EncodeAsOffsetMapping"):
            return self._model.EncodeAsOffsetMapping(text)["offsets"]
        # before sentencepiece 0.2.2
        return [(p.begin, p.end) for p in self._model.encode_as_immutable_proto(text).pieces]

    def _decode(self, ids):
        return self._model.decode([i for i in ids if i < self.num_model_ids])


class JSONTokenizer(Tokenizer):
    """Hugging Face's tokenizer.json. A special token that is written in the text is plain text here.

    Exact where the model is byte-level without a normalizer (GPT-2, Llama 3, `train_tokenizer`'s own).
    """

    kind, filename = "tokenizer_json", "tokenizer.json"

    def _read(self, blob):
        self._model = model = hf.Tokenizer.from_str(blob.decode("utf-8"))
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        config = json.loads(blob)
        vocab = model.get_vocab(with_added_tokens=True)
        size = max(vocab.values(), default=-1) + 1
        if size > MAX_IDS:
            raise ValueError(f"tokenizer.json has the id {size - 1}; expected less than {MAX_IDS}")
        tokens = [""] * size
        for token, i in vocab.items():
            tokens[i] = token
        added = {entry["id"]: entry for entry in config.get("added_tokens") or ()}
        to_bytes = _piece_reader(config)
        pieces = [t.encode() if i in added else to_bytes(t) for i, t in enumerate(tokens)]
        return tokens, pieces, {i for i, entry in added.items() if entry["special"]}

    def _encode(self, text):
        return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def _spans(self, text):
        return self._model.encode(text, add_special_tokens=False).offsets

    def _encode_many(self, texts):
        for text in texts:
            text.encode()
        encoded = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return (np.array(encoding.ids, np.int32) for encoding in encoded)

    def _decode(self, ids):
        return self._model.decode(ids, skip_special_tokens=False)

    def save(self, directory):
        """Also writes tokenizer_config.json, with which `transformers` finds the reserved tokens."""
        super().save(directory)
        known = {r: self.token(i) for r, i in self.roles.items() if i < self.num_model_ids}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        config |= {f"{role}_token": token for role, token in known.items()}
        (as_path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "bytes": ByteTokenizer,
    "chars": CharTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "tokenizer_json": JSONTokenizer,
}


def _piece_reader(config: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How the tokens of a tokenizer.json spell bytes."""
    parts = json.dumps([config.get("pre_tokenizer"), config.get("decoder")])
    if '"ByteLevel"' in parts:
        table = _byte_level_table()
        return lambda token: bytes(table.get(c, 0x3F) for c in token)
    if (config.get("model") or {}).get("type") == "WordPiece":
        return _wordpiece_bytes
    byte = re.compile(r"<0x([0-9A-F]{2})>")

    def read(token: str) -> bytes:
        match = byte.fullmatch(token)
        return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()

    return read


def _wordpiece_bytes(token: str) -> bytes:
    """The piece with the space that most likely stands before it."""
    if token.startswith("##"):
        return token[2:].encode()
    spaced = token[:1].isalnum() and not is_ideograph(token[0])
    return (" " + token if spaced else token).encode()


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for the bytes: printable Latin-1 is itself, the rest follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
