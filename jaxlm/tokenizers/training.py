"""Learning a vocabulary from text."""

import io
from collections.abc import Callable, Iterable, Iterator

import sentencepiece
import tokenizers as hf

from jaxlm.tokenizers.base import ROLES, SENTINEL, Tokenizer, chunks, pick, reserved_names
from jaxlm.tokenizers.kinds import JSONTokenizer, SentencePieceTokenizer
from jaxlm.tokenizers.loading import make_tokenizer


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
    train = pick(TRAINERS, kind, "trainable tokenizer kind")
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
    model, names = io.BytesIO(), reserved_names()
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
            control_symbols=[*names[4:], *map(SENTINEL.format, range(num_sentinels))],
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
        special_tokens=[*reserved_names(), *map(SENTINEL.format, range(num_sentinels))],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    parts = (chunk for text in _first_bytes(texts, max_bytes) for chunk in chunks(text))
    model.train_from_iterator(parts, trainer)
    return JSONTokenizer(model.to_str().encode(), num_sentinels=num_sentinels)


TRAINERS: dict[str, Callable[..., Tokenizer]] = {
    "bytes": _train_bytes,
    "chars": _train_chars,
    "unigram": _train_sentencepiece,
    "bpe": _train_sentencepiece,
    "byte_bpe": _train_byte_bpe,
}


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text
