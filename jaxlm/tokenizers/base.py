"""What every kind of tokenizer shares: reserved ids, tables per id, chunks, save."""

import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxlm.files import as_path

ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
META = "jaxlm_tokenizer.json"
# How the field's vocabularies spell the roles, in the order of preference.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
}
SENTINEL = "<extra_id_{}>"
_CHUNK = 1 << 16  # characters that a backend sees at once: its memory and its agenda stay small
_BOUNDARY = re.compile(r"\n(?=\S)")  # no backend's piece crosses the end of a line before text
_PROBE = " a  b\n\n\tc ﬁ\r\n"  # survives exact backends only


class Tokenizer:
    """Text to ids and back; the tables say what each id stands for. See the module's docstring.

    num_model_ids: the ids that the model file itself has.
    vocab_size: all ids, reserved ones included. Reserved ids that a loaded vocabulary lacks are appended
      after its last id; cls is bos and sep is eos where it has one pair only (RoBERTa's way).
    special_ids: ids that stand for no text; `encode` never gives them (except unk), `decode` skips them.
    is_word_start: bool (V,), the piece begins with a space, a punctuation mark or an ideograph.
    ends_sentence: bool (V,), the piece ends with . ! ? (also 。！？؟۔), or holds a line's end.
    num_bytes: int32 (V,), UTF-8 bytes that the id stands for, specials 0.
    """

    kind: ClassVar[str]
    filename: ClassVar[str]

    def __init__(
        self,
        blob: bytes,
        reserved: Mapping[str, Any] | None = None,
        *,
        named: Mapping[str, str] | None = None,
        num_sentinels: int = 0,
    ):
        """blob: the model file. reserved: {'roles', 'sentinel_ids', 'vocab_size'} as saved. Without it the
        reserved ids are those that `named` ({role: token}) names, then those found by their spelling."""
        self.blob = blob
        tokens, pieces, special = self._read(blob)
        if reserved is None:
            reserved = reserve(tokens, named or {}, num_sentinels)
        _check_reserved(reserved, len(tokens))
        self.vocab_size: int = reserved["vocab_size"]
        roles = self.roles = {role: int(reserved["roles"][role]) for role in ROLES}
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = (roles[r] for r in ROLES[:4])
        self.cls_id, self.sep_id, self.mask_id = (roles[r] for r in ROLES[4:])
        self.sentinel_ids = tuple(int(i) for i in reserved["sentinel_ids"])
        self.num_model_ids = len(tokens)
        appended = range(len(tokens), self.vocab_size)
        self.special_ids = frozenset({*special, *roles.values(), *self.sentinel_ids, *appended})
        spelling = {i: f"<{role}>" for role, i in roles.items()}
        spelling |= {i: SENTINEL.format(n) for n, i in enumerate(self.sentinel_ids)}
        self._tokens = [*tokens, *(spelling.get(i, "") for i in appended)]
        pieces = [*pieces, *(b"" for _ in appended)]
        self._pieces = [b"" if i in self.special_ids else p for i, p in enumerate(pieces)]
        self._make_tables()
        self.sha256 = identity_sha256(self.kind, blob, self._reserved())
        self.is_exact: bool = self._is_exact()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 (n,), without bos and eos. Long texts are encoded in parts cut at the
        ends of lines, which no piece crosses. Raises UnicodeEncodeError for lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text: int32 (n,)."""
        split = [list(chunks(text)) for text in texts]
        encoded = iter(self._encode_many(list(itertools.chain.from_iterable(split))))
        parts = [list(itertools.islice(encoded, len(text))) for text in split]
        return [p[0] if len(p) == 1 else np.concatenate(p) for p in parts]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode`, and the characters of `text` that each id stands for: int32 (n,) and int64 (n, 2), [start, end).

            text     Two cafés        ids     Two   _caf  é (byte 1)  é (byte 2)  s
                     012345678        spans   0 3   3 7   7 8         7 8         8 9

        Starts and ends ascend. A character that was cut into bytes is in the span of each. Where a tokenizer is not
        exact, a span is that of the text which was normalised into the piece (ﬁ -> f i), it may be empty, and what the
        normalisation drops (spaces, control characters, accents) is in none.
        """
        ids = self.encode(text)
        if self.is_exact and self.num_bytes[ids].sum() == len(text.encode()):
            return ids, byte_spans(text, self.num_bytes[ids])
        spans, start = [], 0
        for chunk in chunks(text):
            spans.append(np.asarray(self._spans(chunk), np.int64).reshape(-1, 2) + start)
            start += len(chunk)
        return ids, np.concatenate(spans)

    def find_unknown(self, text: str) -> list[str]:
        """What in `text` is unknown, each once: parts that become unk, and characters that become nothing (without spaces,
        marks and control characters, which many tokenizers normalise away)."""
        ids, spans = self.encode_with_offsets(text)
        unknown = [text[start:end] for start, end in spans[ids == self.unk_id]]
        if not self.is_exact:
            visible = [c for c in dict.fromkeys(text) if unicodedata.category(c)[0] not in "ZCM"]
            encoded = zip(visible, self.encode_batch(visible), strict=True)
            unknown += [character for character, ids in encoded if not len(ids)]
        return list(dict.fromkeys(unknown))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; specials are skipped, broken UTF-8 becomes U+FFFD."""
        ids = [int(i) for i in ids if int(i) not in self.special_ids]
        return self._join(ids) if self.is_exact else self._decode(ids)

    def token(self, id: int) -> str:
        """The printable name of an id, as its vocabulary spells it."""
        return self._tokens[id]

    def sentence_starts(self, ids: np.ndarray) -> np.ndarray:
        """The indices in one document's ids (n,) at which a sentence begins, int64, 0 first.

        A sentence begins after a piece that ends one, at a word's start (so not inside 3.14) or on a new
        line. Bytes see the ASCII marks and line ends only.
        """
        if not len(ids):
            return np.empty(0, np.int64)
        ends, before, after = self.ends_sentence[ids], ids[:-1], ids[1:]
        begins = ends[:-1] & ~ends[1:] & (self.is_word_start[after] | self._ends_line[before])
        return np.concatenate([[0], np.flatnonzero(begins) + 1])

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the model file and the reserved ids; `load_tokenizer` reads them back."""
        directory = as_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.filename).write_bytes(self.blob)
        meta = {"kind": self.kind, "sha256": self.sha256} | self._reserved()
        (directory / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    def __reduce__(self):
        return type(self), (self.blob, self._reserved())

    def _reserved(self) -> dict[str, Any]:
        sentinels = list(self.sentinel_ids)
        return dict(roles=self.roles, sentinel_ids=sentinels, vocab_size=self.vocab_size)

    def _join(self, ids: Iterable[int]) -> str:
        return b"".join([self._pieces[i] for i in ids]).decode("utf-8", errors="replace")

    def _make_tables(self) -> None:
        texts = [piece.decode("utf-8", errors="ignore") for piece in self._pieces]
        self.num_bytes = np.array([len(piece) for piece in self._pieces], np.int32)
        self.is_word_start = np.array([_starts_word(text) for text in texts], bool)
        self.ends_sentence = np.array([_ends_sentence(text) for text in texts], bool)
        self._ends_line = np.array(["\n" in text for text in texts], bool)

    # What a kind defines.
    def _read(self, blob: bytes) -> tuple[list[str], list[bytes], set[int]]:
        """Per id its name and its bytes, and the ids that are special in the model itself."""
        raise NotImplementedError

    def _encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def _encode_many(self, texts: list[str]) -> Iterable[np.ndarray]:
        return map(self._encode, texts)

    def _spans(self, text: str) -> Sequence[tuple[int, int]]:
        """The characters of `text` behind each id of `_encode(text)`, where bytes do not say it."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        return self._join(ids)

    def _is_exact(self) -> bool:
        return self._join(self._encode(_PROBE)) == _PROBE


def identity_sha256(kind: str, blob: bytes, reserved: Mapping[str, Any]) -> str:
    """Of all that decides what ids stand for: `Tokenizer.sha256`, known without making one."""
    identity = [kind, hashlib.sha256(blob).hexdigest(), reserved]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def reserve(tokens: Sequence[str], named: Mapping[str, str], num_sentinels: int) -> dict[str, Any]:
    """Completes the reserved ids of a vocabulary: aliases first, then new ids after the last one."""
    ids = {token: i for i, token in reversed(list(enumerate(tokens)))}
    spelled = {role: [ids[s] for s in names if s in ids] for role, names in SPELLINGS.items()}
    roles = {role: hits[0] for role, hits in spelled.items() if hits}
    roles |= {role: ids[token] for role, token in named.items() if token in ids}
    for one, other in (("bos", "cls"), ("eos", "sep")):
        if one in roles or other in roles:
            roles.setdefault(one, roles.get(other, -1))
            roles.setdefault(other, roles[one])
    fresh = itertools.count(len(tokens))
    for role in ROLES:
        if role not in roles:
            roles[role] = next(fresh)
    known = itertools.takewhile(
        lambda i: i is not None, (ids.get(SENTINEL.format(n)) for n in range(1000))
    )
    sentinels = list(known)
    sentinels += [next(fresh) for _ in range(num_sentinels - len(sentinels))]
    return dict(roles=roles, sentinel_ids=sentinels, vocab_size=next(fresh))


def _check_reserved(reserved: Mapping[str, Any], num_tokens: int) -> None:
    """Raises ValueError if saved reserved ids do not fit the vocabulary."""
    ids = [*reserved["roles"].values(), *reserved["sentinel_ids"]]
    size = reserved["vocab_size"]
    room = num_tokens + len(ids)
    if set(reserved["roles"]) != set(ROLES) or not all(0 <= i < size for i in ids) or size > room:
        raise ValueError(f"reserved ids {reserved} do not fit a vocabulary of {num_tokens} tokens")


def reserved_names() -> list[str]:
    """The spellings of the reserved ids, by id."""
    return [f"<{role}>" for role in ROLES]


def known_spellings() -> set[str]:
    """How tokenizers of others spell reserved ids."""
    return {name for names in SPELLINGS.values() for name in names}


def chunks(text: str) -> Iterator[str]:
    """Parts of about `_CHUNK` characters that together are the text, cut where no piece can cross."""
    start = 0
    while len(text) - start > _CHUNK:
        match = _BOUNDARY.search(text, start + _CHUNK - 1)
        if not match:
            break
        yield text[start : match.end()]
        start = match.end()
    yield text[start:] if start else text


def byte_spans(text: str, num_bytes: np.ndarray) -> np.ndarray:
    """The characters of `text` that pieces touch which are together its UTF-8 bytes: (n,) -> int64 (n, 2)."""
    begins = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
    begun = np.concatenate([[0], np.cumsum(begins, dtype=np.int64)])  # before each byte
    ends = np.cumsum(num_bytes)
    first_begun = begun[np.minimum(ends - num_bytes + 1, len(begins))]
    return np.stack([first_begun - (num_bytes > 0), begun[ends]], axis=1)


def _starts_word(text: str) -> bool:
    if not text:
        return False
    first = text[0]
    inside = first.isalnum() or first in "_'’" or unicodedata.category(first)[0] == "M"
    return not inside or is_ideograph(first)


def is_ideograph(character: str) -> bool:
    """Chinese characters and kana, which are written without spaces."""
    code = ord(character)
    return 0x3040 <= code <= 0x30FF or 0x3400 <= code <= 0x9FFF or 0x20000 <= code <= 0x3FFFF


def _ends_sentence(text: str) -> bool:
    return "\n" in text or text.rstrip().rstrip("\"')]}”’»」』").endswith(tuple(".!?。！？؟۔…"))


def pick(table: Mapping[str, Any], name: str, what: str) -> Any:
    """The entry `name` of a table. Raises ValueError with the known names. what: what an error calls it."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}")
    return table[name]
