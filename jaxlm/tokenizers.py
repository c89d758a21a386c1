"""Bytes, characters, SentencePiece and Hugging Face's tokenizer.json behind one small interface.

    tokenizer = train_tokenizer("byte_bpe", texts, vocab_size=2048)
    ids = tokenizer.encode("text")          # int32 (n,), never a special id, whatever the text says
    tokenizer.decode(ids)                   # "text"
    tokenizer.save("folder"); load_tokenizer("folder")

Exact and approximate. What `train_tokenizer` and `make_tokenizer` make is exact (`is_exact`): ids decode
to the very text, whitespace runs, tabs and newlines included, and `num_bytes` of the ids add up to its
UTF-8 bytes (characters: if each is in the vocabulary; an unknown one counts no bytes). A loaded foreign
model often is not: BERT's WordPiece drops case and spacing, T5's SentencePiece turns newlines into
spaces. Then `decode` gives the model's own approximation, and `num_bytes` the bytes of the piece with
the space before it; so bits per byte are approximate, too.
"""

import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sentencepiece
import tokenizers as hf

ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
META = "jaxlm_tokenizer.json"
# How the field's vocabularies spell the roles, in the order of preference.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
}
_SENTINEL = "<extra_id_{}>"
_CHUNK = 1 << 16  # characters that a backend sees at once: its memory and its agenda stay small
_BOUNDARY = re.compile(r"\n(?=\S)")  # no backend's piece crosses the end of a line before text
_PROBE = " a  b\n\n\tc ﬁ\r\n"  # survives exact backends only


class Tokenizer:
    """Text to ids and back; the tables say what each id stands for. See the module's docstring.

    vocab_size: all ids, reserved ones included. Reserved ids that a loaded vocabulary lacks are appended
      after its last id; cls is bos and sep is eos where it has one pair only (RoBERTa's way).
    special_ids: ids that stand for no text; `encode` never gives them (except unk), `decode` skips them.
    is_word_start: bool (V,), the piece begins with a space, a punctuation mark or an ideograph.
    ends_sentence: bool (V,), the piece ends with . ! ? (also 。！？؟۔), or holds a line's end.
    num_bytes: int32 (V,), UTF-8 bytes that the id stands for, specials 0.
    """

    kind: ClassVar[str]
    filename: ClassVar[str]

    def __init__(self, blob: bytes, reserved: Mapping[str, Any] | None = None, num_sentinels=0):
        """blob: the model file. reserved: {'roles', 'sentinel_ids', 'vocab_size'} as saved, or None."""
        self.blob = blob
        tokens, pieces, special = self._read(blob)
        if reserved is None:
            reserved = _reserve(tokens, self._named_roles(tokens), num_sentinels)
        _check_reserved(reserved, len(tokens))
        self.vocab_size: int = reserved["vocab_size"]
        roles = self.roles = {role: int(reserved["roles"][role]) for role in ROLES}
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = (roles[r] for r in ROLES[:4])
        self.cls_id, self.sep_id, self.mask_id = (roles[r] for r in ROLES[4:])
        self.sentinel_ids = tuple(int(i) for i in reserved["sentinel_ids"])
        appended = range(len(tokens), self.vocab_size)
        self.special_ids = frozenset({*special, *roles.values(), *self.sentinel_ids, *appended})
        spelling = {i: f"<{role}>" for role, i in roles.items()}
        spelling |= {i: _SENTINEL.format(n) for n, i in enumerate(self.sentinel_ids)}
        self._tokens = [*tokens, *(spelling.get(i, "") for i in appended)]
        pieces = [*pieces, *(b"" for _ in appended)]
        self._pieces = [b"" if i in self.special_ids else p for i, p in enumerate(pieces)]
        self._make_tables()
        identity = [self.kind, hashlib.sha256(blob).hexdigest(), self._reserved()]
        self.sha256 = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.is_exact = self._join(self._encode(_PROBE)) == _PROBE

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 (n,), without bos and eos. Long texts are encoded in parts cut at the
        ends of lines, which no piece crosses. Raises UnicodeEncodeError for lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        chunks = [list(_chunks(text)) for text in texts]
        encoded = iter(self._encode_many(list(itertools.chain.from_iterable(chunks))))
        parts = [list(itertools.islice(encoded, len(text))) for text in chunks]
        return [p[0] if len(p) == 1 else np.concatenate(p) for p in parts]

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
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.filename).write_bytes(self.blob)
        meta = {"kind": self.kind, "sha256": self.sha256} | self._reserved()
        (directory / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    def __reduce__(self):
        return _restore, (self.kind, self.blob, self._reserved())

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

    def _decode(self, ids: list[int]) -> str:
        return self._join(ids)

    def _named_roles(self, tokens: Sequence[str]) -> dict[str, int]:
        """The roles that the vocabulary has, by the field's spellings."""
        ids = {token: i for i, token in reversed(list(enumerate(tokens)))}
        found = {role: [ids[s] for s in names if s in ids] for role, names in _SPELLINGS.items()}
        return {role: hits[0] for role, hits in found.items() if hits}


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 after the seven reserved ids (ByT5, Xue et al. 2021)."""

    kind, filename = "bytes", "bytes.txt"

    def _read(self, blob):
        pieces = [bytes([byte]) for byte in range(256)]
        names = [p.decode() if p.isascii() else f"<0x{p[0]:02X}>" for p in pieces]
        return (
            [*_reserved_names(), *names],
            [*([b""] * len(ROLES)), *pieces],
            set(range(len(ROLES))),
        )

    def _encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + len(ROLES)


class CharTokenizer(Tokenizer):
    """One id per character of a given set, after the seven reserved ids; others are unk."""

    kind, filename = "chars", "characters.txt"

    def _read(self, blob):
        characters = blob.decode("utf-8")
        if list(characters) != sorted(set(characters)):
            raise ValueError("the characters must be sorted and distinct")
        self._codes = np.array([ord(c) for c in characters], np.uint32)
        names = [*_reserved_names(), *characters]
        pieces = [*([b""] * len(ROLES)), *(c.encode() for c in characters)]
        return names, pieces, set(range(len(ROLES)))

    def _encode(self, text):
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        if not len(self._codes):
            return np.full(len(codes), self.roles["unk"], np.int32)
        index = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        known = self._codes[index] == codes
        return np.where(known, index + len(ROLES), self.roles["unk"]).astype(np.int32)

    def _decode(self, ids):
        return self._join(ids)


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

    def _decode(self, ids):
        return self._model.decode([i for i in ids if i < self._model.get_piece_size()])


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
        tokens = [""] * (max(vocab.values(), default=-1) + 1)
        for token, i in vocab.items():
            tokens[i] = token
        added = {entry["id"]: entry for entry in config.get("added_tokens") or ()}
        to_bytes = _piece_reader(config)
        pieces = [t.encode() if i in added else to_bytes(t) for i, t in enumerate(tokens)]
        return tokens, pieces, {i for i, entry in added.items() if entry["special"]}

    def _encode(self, text):
        return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

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
        known = {r: self.token(i) for r, i in self.roles.items() if i < len(self._model_tokens())}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        config |= {f"{role}_token": token for role, token in known.items()}
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=1))

    def _model_tokens(self) -> range:
        return range(max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1)


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "bytes": ByteTokenizer,
    "chars": CharTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "tokenizer_json": JSONTokenizer,
}


def make_tokenizer(
    kind: str, *, characters: str = "", path: str | os.PathLike = "", num_sentinels: int = 100
) -> Tokenizer:
    """A tokenizer that needs no training: 'bytes', 'chars' (of `characters`), or a model file at `path`
    ('sentencepiece', 'tokenizer_json'). A loaded model gets sentinels up to `num_sentinels` of them."""
    _pick(TOKENIZERS, kind, "tokenizer kind")
    if kind in ("bytes", "chars"):
        blob = "".join(sorted(set(characters))).encode() if kind == "chars" else b"bytes\n"
        return TOKENIZERS[kind](blob, num_sentinels=num_sentinels)
    return TOKENIZERS[kind](Path(path).read_bytes(), num_sentinels=num_sentinels)


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """What `save` wrote, or a foreign tokenizer.json, *.model or vocab.txt: the file or its folder.

    In a foreign folder tokenizer_config.json and special_tokens_map.json name the reserved tokens, else
    they are found by their usual spellings; those that are nowhere are appended after the last id.

    Raises:
      FileNotFoundError: if none of these is there.
      ValueError: if a saved tokenizer's file is not the one that was saved.
    """
    path = Path(directory)
    meta = path / META
    if meta.is_file():
        saved = json.loads(meta.read_text(encoding="utf-8"))
        kind = _pick(TOKENIZERS, saved["kind"], "tokenizer kind")
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


def train_tokenizer(
    kind: str,
    texts: Iterable[str],
    vocab_size: int = 0,
    num_sentinels: int = 100,
    max_bytes: int = 1 << 28,
) -> Tokenizer:
    """Learns a vocabulary from texts; the same texts give the same tokenizer.

    kind: 'bytes' and 'chars' (vocab_size is what comes out), 'unigram' and 'bpe' (SentencePiece),
      'byte_bpe' (byte-level BPE, natively a tokenizer.json).
    vocab_size: all ids, reserved ones included; a small corpus may give fewer.
    max_bytes: only the first so many bytes are read ('chars' reads all); give texts in mixed order.

    Raises:
      ValueError: for an unknown kind, or a vocab_size without room for the bytes and reserved ids.
    """
    train = _pick(TRAINERS, kind, "trainable tokenizer kind")
    least = 256 + len(ROLES) + num_sentinels + 1
    if train in (_train_sentencepiece, _train_byte_bpe) and vocab_size < least:
        raise ValueError(
            f"vocab_size {vocab_size} has no room for 256 bytes, {len(ROLES)} reserved ids and "
            f"{num_sentinels} sentinels: set at least {least}, or fewer sentinels"
        )
    return train(kind, texts, vocab_size, num_sentinels, max_bytes)


def _train_bytes(kind, texts, vocab_size, num_sentinels, max_bytes) -> Tokenizer:
    return make_tokenizer("bytes", num_sentinels=num_sentinels)


def _train_chars(kind, texts, vocab_size, num_sentinels, max_bytes) -> Tokenizer:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    return make_tokenizer("chars", characters="".join(characters), num_sentinels=num_sentinels)


def _train_sentencepiece(kind, texts, vocab_size, num_sentinels, max_bytes) -> Tokenizer:
    """Lines with their ends are the trainer's sentences; at most 200,000 of them are sampled."""
    model, names = io.BytesIO(), _reserved_names()
    lines = (
        line[start : start + 4000]
        for text in _first_bytes(texts, max_bytes)
        for line in text.splitlines(keepends=True)
        for start in range(0, len(line), 4000)
    )
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            input_sentence_size=200_000,
            shuffle_input_sentence=True,
            max_sentence_length=1 << 16,
            num_threads=2,
            minloglevel=2,
            **{f"{role}_id": i for i, role in enumerate(ROLES[:4])},
            **{f"{role}_piece": name for role, name in zip(ROLES[:4], names, strict=False)},
            control_symbols=[*names[4:], *map(_SENTINEL.format, range(num_sentinels))],
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece could not learn {vocab_size} pieces from this text: {error}"
        ) from error
    return SentencePieceTokenizer(model.getvalue(), num_sentinels=num_sentinels)


# Letters with one character before them, numbers by up to three digits, punctuation, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _train_byte_bpe(kind, texts, vocab_size, num_sentinels, max_bytes) -> Tokenizer:
    model = hf.Tokenizer(hf.models.BPE())
    split = hf.pre_tokenizers.Split(hf.Regex(_SPLIT), "isolated")
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = hf.pre_tokenizers.Sequence([split, byte_level])
    model.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_reserved_names(), *map(_SENTINEL.format, range(num_sentinels))],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chunks = (chunk for text in _first_bytes(texts, max_bytes) for chunk in _chunks(text))
    model.train_from_iterator(chunks, trainer)
    return JSONTokenizer(model.to_str().encode(), num_sentinels=num_sentinels)


TRAINERS: dict[str, Callable[..., Tokenizer]] = {
    "bytes": _train_bytes,
    "chars": _train_chars,
    "unigram": _train_sentencepiece,
    "bpe": _train_sentencepiece,
    "byte_bpe": _train_byte_bpe,
}


def _foreign(kind: type[Tokenizer], blob: bytes, folder: Path) -> Tokenizer:
    """A tokenizer whose reserved tokens the JSON files beside it may name."""
    plain = kind(blob)
    ids = {plain.token(i): i for i in reversed(range(len(plain._read(blob)[0])))}
    named: dict[str, int] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for role in ROLES:
            token = config.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in ids:
                named[role] = ids[token]
    if not named:
        return plain
    tokens = list(plain._read(blob)[0])
    return kind(blob, _reserve(tokens, plain._named_roles(tokens) | named, 0))


def _wordpiece(vocab: Path, folder: Path) -> bytes:
    """BERT's vocab.txt as a tokenizer.json; lower case as tokenizer_config.json says, else if no entry
    has a capital."""
    words = vocab.read_text(encoding="utf-8").split("\n")
    if words and not words[-1]:
        words.pop()
    ids = {word.rstrip("\r"): i for i, word in enumerate(words)}
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    cased = any(re.search("[A-Z]", word) for word in ids if word not in _known_spellings())
    lower = bool(settings.get("do_lower_case", not cased))
    model = hf.Tokenizer(hf.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    model.normalizer = hf.normalizers.BertNormalizer(lowercase=lower)
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    model.decoder = hf.decoders.WordPiece()
    model.add_special_tokens([word for word in ids if word in _known_spellings()])
    return model.to_str().encode()


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
    spaced = token[:1].isalnum() and not _is_ideograph(token[0])
    return (" " + token if spaced else token).encode()


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for the bytes: printable Latin-1 is itself, the rest follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _reserve(tokens: Sequence[str], found: Mapping[str, int], num_sentinels: int) -> dict[str, Any]:
    """Completes the reserved ids of a vocabulary: aliases first, then new ids after the last one."""
    roles = dict(found)
    for one, other in (("bos", "cls"), ("eos", "sep")):
        if one in roles or other in roles:
            roles.setdefault(one, roles.get(other, -1))
            roles.setdefault(other, roles[one])
    fresh = itertools.count(len(tokens))
    for role in ROLES:
        if role not in roles:
            roles[role] = next(fresh)
    ids = {token: i for i, token in enumerate(tokens)}
    known = itertools.takewhile(
        lambda i: i is not None, (ids.get(_SENTINEL.format(n)) for n in range(1000))
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


def _restore(kind: str, blob: bytes, reserved: Mapping[str, Any]) -> Tokenizer:
    return TOKENIZERS[kind](blob, reserved)


def _reserved_names() -> list[str]:
    return [f"<{role}>" for role in ROLES]


def _known_spellings() -> set[str]:
    return {name for names in _SPELLINGS.values() for name in names}


def _chunks(text: str) -> Iterator[str]:
    """Parts of about `_CHUNK` characters that together are the text, cut where no piece can cross."""
    start = 0
    while len(text) - start > _CHUNK:
        match = _BOUNDARY.search(text, start + _CHUNK - 1)
        if not match:
            break
        yield text[start : match.end()]
        start = match.end()
    yield text[start:] if start else text


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text


def _starts_word(text: str) -> bool:
    if not text:
        return False
    first = text[0]
    inside = first.isalnum() or first in "_'’" or unicodedata.category(first)[0] == "M"
    return not inside or _is_ideograph(first)


def _is_ideograph(character: str) -> bool:
    """Chinese characters and kana, which are written without spaces."""
    code = ord(character)
    return 0x3040 <= code <= 0x30FF or 0x3400 <= code <= 0x9FFF or 0x20000 <= code <= 0x3FFFF


def _ends_sentence(text: str) -> bool:
    return "\n" in text or text.rstrip().rstrip("\"')]}”’»」』").endswith(tuple(".!?。！？؟۔…"))


def _pick(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}")
    return table[name]
