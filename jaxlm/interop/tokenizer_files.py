"""A tokenizer's files on both sides: Hugging Face's into ours, ours into those that AutoTokenizer loads.

Coming in, the source's own files are kept beside ours (`tokenizer/huggingface/`), so that an export gives them back byte
for byte. Without them the files are made from our tokenizer.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf

from jaxlm.interop import hub
from jaxlm.interop.mapping import BadModel, Family
from jaxlm.interop.safetensors_io import BadFile, inside, read_json
from jaxlm.tokenizers import load_tokenizer
from jaxlm.tokenizers.kinds import JSONTokenizer, SentencePieceTokenizer, _byte_level_table
from jaxlm.tokenizers.loading import read_model

KEPT = "huggingface"
MAX_SENTINELS = 10_000
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "generation_config.json",
)
# What stands around one text and around a pair, by model_type, else by model.
TEXT_ENDS = {
    "gpt": ("bos $A", "bos $A $B"),
    "bert": ("cls $A sep", "cls $A sep $B:1 sep:1"),
    "encoder_decoder": ("$A eos", "$A eos $B eos"),
    "bart": ("bos $A eos", "bos $A eos eos $B eos"),
    "xlnet": ("$A sep cls:2", "$A sep $B:1 sep:1 cls:2"),
}
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn x**2  # naïve café, 1234567\n\n",
    "Ελληνικά, русский, 中文字符 and 🙂.\r\n",
)


def read_tokenizer(folder: Path) -> Any:
    """Our tokenizer of a Hugging Face folder, or None if it has no tokenizer's files.

    Raises:
      BadFile, BadModel, ValueError: for files that are links out of the folder or no tokenizer.
    """
    models = (file.name for file in folder.glob("*.model"))
    for name in {*FILES, *models}:
        if (folder / name).exists() or (folder / name).is_symlink():
            inside(folder, name)
    try:
        return _read_any(folder)
    except FileNotFoundError:
        return None
    except (BadFile, BadModel):
        raise
    except Exception as error:  # tokenizers and sentencepiece raise bare Exceptions for bad files
        raise BadModel(f"{folder}: its tokenizer cannot be read: {str(error)[:300]}") from error


def _read_any(folder: Path) -> Any:
    if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
        return _from_spiece(folder)
    has_pairs = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if has_pairs and not (folder / "tokenizer.json").is_file():
        return _from_vocab_and_merges(folder)
    return load_tokenizer(folder)


def fetch_tokenizer(spec: str) -> Any:
    """The tokenizer of 'DIR_OR_HUB_ID[@revision]'.

    Raises:
      BadModel: if it has none.
    """
    folder, _ = hub.fetch(spec)
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise BadModel(
            f"{spec} has no tokenizer: set tokenizer.path to the one that it was trained with"
        )
    return tokenizer


def puts_bos(folder: Path, tokenizer: Any) -> bool:
    """Whether transformers puts bos before a text with the tokenizer's files in `folder`, of which ours was read."""
    settings = folder / "tokenizer_config.json"
    says = read_json(inside(folder, settings.name)) if settings.is_file() else {}
    if isinstance(says.get("add_bos_token"), bool):
        return says["add_bos_token"]
    if tokenizer.kind == "sentencepiece":
        return tokenizer.bos_id < num_model_ids(tokenizer)  # as Llama and Gemma do
    if tokenizer.kind != "tokenizer_json":
        return False
    model = hf.Tokenizer.from_str(tokenizer.blob.decode("utf-8"))
    return model.encode("").ids[:1] == [tokenizer.bos_id]


def _from_spiece(folder: Path) -> Any:
    """A SentencePiece model with T5's sentinels after its pieces, the last one first; or as many as `extra_ids` says, or as
    ALBERT, whose file has the same name, none.

        pieces    0 … 31,999        <extra_id_99>   32,000   …   <extra_id_0>   32,099
    """
    blob, settings = read_model(folder / "spiece.model"), folder / "tokenizer_config.json"
    plain = load_tokenizer(folder)
    about = read_json(settings) if settings.is_file() else {}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    count = about.get("extra_ids", 100 if config.get("model_type") == "t5" else 0)
    if type(count) is not int or not 0 <= count <= MAX_SENTINELS:
        raise BadModel(f"{settings}: extra_ids={count!r}, expected 0 to {MAX_SENTINELS}")
    if not count or plain.sentinel_ids:
        return plain
    size = num_model_ids(plain)
    # Roles that the pieces lack were appended after them: now after the sentinels.
    roles = {role: i if i < size else i + count for role, i in plain.roles.items()}
    sentinels = list(range(size + count - 1, size - 1, -1))
    reserved = dict(roles=roles, sentinel_ids=sentinels, vocab_size=plain.vocab_size + count)
    return SentencePieceTokenizer(blob, reserved)


def _from_vocab_and_merges(folder: Path) -> Any:
    """GPT-2's and RoBERTa's slow files as the byte-level BPE that they describe."""
    vocab = read_json(folder / "vocab.json")
    lines = read_model(folder / "merges.txt").decode("utf-8").replace("\r\n", "\n").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    settings = folder / "tokenizer_config.json"
    about = read_json(settings) if settings.is_file() else {}
    if "<|endoftext|>" not in vocab and "<s>" not in vocab:
        raise BadModel(
            f"{folder}: vocab.json has neither <|endoftext|> nor <s>: expected GPT-2's or RoBERTa's"
        )
    model = hf.Tokenizer(hf.models.BPE(vocab, merges))
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(
        add_prefix_space=bool(about.get("add_prefix_space", False))
    )
    model.decoder = hf.decoders.ByteLevel()
    special = [
        t for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>") if t in vocab
    ]
    model.add_special_tokens(
        [hf.AddedToken(t, lstrip=t == "<mask>", special=True) for t in special]
    )
    if (
        "<s>" in special and "</s>" in special
    ):  # as RoBERTa's and BART's classes do, GPT-2's does not
        model.post_processor = hf.processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[(t, vocab[t]) for t in ("<s>", "</s>")],
        )
    return JSONTokenizer(model.to_str().encode())


def keep_files(folder: Path, tokenizer_dir: Path) -> None:
    """Copies the source's tokenizer files, its chat template and its generation_config.json beside our own."""
    kept = tokenizer_dir / KEPT
    kept.mkdir()
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(inside(folder, name), kept / name)


def write_tokenizer(
    tokenizer: Any, saved: Path, target: Path, *, ends: tuple[str, str], max_len: int
) -> None:
    """Writes the files that AutoTokenizer loads. saved: the folder that `tokenizer` was loaded from.

    ends: what stands around one text and around a pair, as in ('bos $A eos', 'bos $A eos $B eos').

    Raises:
      BadModel: if what was written gives other ids than `tokenizer` does.
    """
    if (kept := saved / KEPT).is_dir() and any(kept.iterdir()):
        for file in sorted(kept.iterdir()):
            shutil.copyfile(inside(kept, file.name), target / file.name)
        if read_tokenizer(target) is not None:
            check_same_ids(tokenizer, target)
        return
    if tokenizer.kind not in EXPORTS:
        raise BadModel(
            f"a tokenizer of kind {tokenizer.kind!r} has no Hugging Face form; known are {', '.join(EXPORTS)}"
        )
    blob = EXPORTS[tokenizer.kind](tokenizer)
    names = {role: tokenizer.token(i) for role, i in tokenizer.roles.items()}
    size = num_model_ids(tokenizer)
    own = {role: name for role, name in names.items() if tokenizer.roles[role] < size}
    (target / "tokenizer.json").write_bytes(_with_template(blob, tokenizer, own, ends))
    if tokenizer.kind == "sentencepiece":
        (target / "tokenizer.model").write_bytes(tokenizer.blob)
    special = {f"{role}_token": token for role, token in own.items()}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        **special,
    }
    (target / "tokenizer_config.json").write_text(_dump(about), encoding="utf-8")
    (target / "special_tokens_map.json").write_text(_dump(special), encoding="utf-8")
    if tokenizer.kind == "tokenizer_json":
        _write_slow_files(json.loads(blob), target)
    check_same_ids(tokenizer, target)


def find_ends(family: Family) -> tuple[str, str]:
    """What `write_tokenizer` puts around the texts of a family."""
    return TEXT_ENDS.get(family.model_type) or TEXT_ENDS.get(family.model, TEXT_ENDS["bert"])


def num_model_ids(tokenizer: Any) -> int:
    """How many ids the exported files have; a loaded vocabulary's reserved ids after them are ours alone."""
    is_loaded = tokenizer.kind in ("tokenizer_json", "sentencepiece")
    return tokenizer.num_model_ids if is_loaded else tokenizer.vocab_size


def _with_template(
    blob: bytes, tokenizer: Any, own: dict[str, str], ends: tuple[str, str]
) -> bytes:
    """Adds to a tokenizer.json without a post-processor the special tokens that our models see around a text."""
    model = hf.Tokenizer.from_str(blob.decode("utf-8"))
    if json.loads(blob).get("post_processor") is not None:
        return blob
    single, pair = ends
    used = [role for role in tokenizer.roles if re.search(rf"\b{role}\b", single)]
    if any(role not in own for role in used):
        return blob

    def fill(template: str) -> str:
        for role in used:
            template = re.sub(rf"\b{role}\b", lambda _: own[role], template)
        return template

    model.post_processor = hf.processors.TemplateProcessing(
        single=fill(single),
        pair=fill(pair),
        special_tokens=[(own[r], tokenizer.roles[r]) for r in used],
    )
    return model.to_str().encode()


def _write_slow_files(config: dict[str, Any], target: Path) -> None:
    """vocab.txt of a WordPiece model; vocab.json and merges.txt of a byte-level BPE."""
    model = config.get("model") or {}
    vocab = model.get("vocab")
    if model.get("type") == "WordPiece":
        words = sorted(vocab, key=vocab.get)
        (target / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    elif model.get("type") == "BPE" and "ByteLevel" in json.dumps(config.get("pre_tokenizer")):
        (target / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        text = "\n".join(["#version: 0.2", *merges])
        (target / "merges.txt").write_text(text + "\n", encoding="utf-8")


def _bytes_json(tokenizer: Any) -> bytes:
    """Byte-level BPE without merges: each byte is its own id."""
    stand_in = {byte: character for character, byte in _byte_level_table().items()}
    first = len(tokenizer.roles)
    vocab = {stand_in[byte]: first + byte for byte in range(256)}
    return _plain_bpe(
        tokenizer,
        vocab,
        hf.pre_tokenizers.ByteLevel(False, use_regex=False),
        hf.decoders.ByteLevel(),
    )


def _chars_json(tokenizer: Any) -> bytes:
    """BPE without merges splits into characters; unknown ones become unk."""
    first = len(tokenizer.roles)
    vocab = {c: first + i for i, c in enumerate(tokenizer.blob.decode("utf-8"))}
    return _plain_bpe(tokenizer, vocab, None, hf.decoders.Fuse())


def _plain_bpe(tokenizer: Any, vocab: dict[str, int], pre_tokenizer: Any, decoder: Any) -> bytes:
    reserved = sorted(set(tokenizer.special_ids))
    names = {tokenizer.token(i): i for i in reserved}
    model = hf.Tokenizer(
        hf.models.BPE({**names, **vocab}, [], unk_token=tokenizer.token(tokenizer.unk_id))
    )
    if pre_tokenizer is not None:
        model.pre_tokenizer = pre_tokenizer
    model.decoder = decoder
    model.add_special_tokens([hf.AddedToken(name, special=True) for name in names])
    return model.to_str().encode()


def _sentencepiece_json(tokenizer: Any) -> bytes:
    """The pieces and scores of a SentencePiece model as a Unigram or BPE of `tokenizers`."""
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, and nothing else does

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.blob)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    unk = proto.trainer_spec.unk_id
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        merges = _merges(pieces, ids)
        options = dict(unk_token=pieces[unk][0], fuse_unk=True, byte_fallback=True)
        model = hf.Tokenizer(hf.models.BPE(ids, merges, **options))
    else:
        model = hf.Tokenizer(hf.models.Unigram(pieces, unk_id=unk, byte_fallback=True))
    about = proto.normalizer_spec
    steps: list[Any] = []
    if about.precompiled_charsmap:
        steps.append(hf.normalizers.Precompiled(about.precompiled_charsmap))
    if about.remove_extra_whitespaces:
        steps += [hf.normalizers.Strip(), hf.normalizers.Replace(hf.Regex(" {2,}"), " ")]
    if about.add_dummy_prefix:
        steps.append(hf.normalizers.Prepend("▁"))
    model.normalizer = hf.normalizers.Sequence([*steps, hf.normalizers.Replace(" ", "▁")])
    ends = [hf.decoders.Strip(" ", 1, 0)] if about.add_dummy_prefix else []
    model.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(), *ends]
    )
    control = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    control += sentinels_after(tokenizer, len(pieces))
    model.add_special_tokens([hf.AddedToken(name, special=True) for name in control])
    return model.to_str().encode()


def sentinels_after(tokenizer: Any, size: int) -> list[str]:
    """The names of the sentinels that have the ids from `size` on (T5's), in the order of these; [] if they lie elsewhere."""
    ids = sorted(tokenizer.sentinel_ids)
    return [tokenizer.token(i) for i in ids] if ids[:1] == [size] else []


def _merges(pieces: list[tuple[str, float]], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; the piece with the best score is made first."""
    merges = []
    for piece, score in pieces:
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in cuts if a in ids and b in ids]
        merges += [(-score, ids[a], ids[b], (a, b)) for a, b in known]
    return [pair for *_, pair in sorted(merges)]


EXPORTS: dict[str, Callable[[Any], bytes]] = {
    "tokenizer_json": lambda tokenizer: tokenizer.blob,
    "sentencepiece": _sentencepiece_json,
    "bytes": _bytes_json,
    "chars": _chars_json,
}


def check_same_ids(tokenizer: Any, target: Path) -> None:
    """Raises BadModel unless the exported files give the ids that our tokenizer gives, for texts of all kinds."""
    exported, rng = read_tokenizer(target), np.random.default_rng(0)
    # Text of the vocabulary's own pieces uses all of it, whatever language it is of.
    pieces = [rng.integers(0, tokenizer.vocab_size, 1000) for _ in range(4)]
    for text in (*PROBES, *map(tokenizer.decode, pieces)):
        ours, theirs = tokenizer.encode(text).tolist(), exported.encode(text).tolist()
        if ours != theirs:
            raise BadModel(
                f"the exported tokenizer gives other ids for {text[:80]!r}: {theirs[:20]}, expected "
                f"{ours[:20]}"
            )


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
