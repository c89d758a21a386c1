"""What tests of tasks that read tokens share: tokenizers of a few pieces, and heads that need no model."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import tokenizers as hf

from jaxlm.tasks.base import make_layout
from jaxlm.tokenizers import train_tokenizer
from jaxlm.tokenizers.kinds import JSONTokenizer

PIECES = "ada love ##lace wrote notes on the engine of in # $ ' s - , . paris france a b c".split()


def wordpiece() -> JSONTokenizer:
    """BERT's way; the ids of PIECES begin at 5."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {piece: i for i, piece in enumerate([*special, *PIECES])}
    model = hf.Tokenizer(hf.models.WordPiece(vocab, unk_token="[UNK]"))
    model.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    model.add_special_tokens(special)
    return JSONTokenizer(model.to_str().encode())


@functools.cache
def byte_bpe():
    return train_tokenizer("byte_bpe", ["Ada Lovelace wrote notes on the engine. " * 9], 300, 4)


def encoder(tokenizer, seq_len=64, num_token_types=2):
    return make_layout(tokenizer, seq_len, causal=False, num_token_types=num_token_types)


def decoder(tokenizer, seq_len=64):
    return make_layout(tokenizer, seq_len, causal=True, num_token_types=0)


def read_tokens(batch, width: int):
    """Outputs whose head_logits (B, T, width) are a fixed function of each token and its place in its segment."""
    rng = np.random.default_rng(0)
    by_token, by_place = rng.normal(size=(2, 512, width)).astype(np.float32)
    logits = by_token[np.asarray(batch["tokens"])] + by_place[np.asarray(batch["positions"])]
    return SimpleNamespace(head_logits=logits)


def predict(task, outputs, batch):
    said = _compiled(type(task))(outputs.head_logits, batch)
    return {key: np.asarray(value) for key, value in said.items()}


@functools.cache
def _compiled(kind):
    """The predict of tasks that read tokens, which no option changes: so it is compiled once for each shape."""
    return jax.jit(lambda x, batch: kind.predict(None, SimpleNamespace(head_logits=x), batch))


def taken_apart(said, places, features):
    """Of each feature its part of token_* (B, T, ...)."""
    return [
        {key: value[place.row, place.start :][: len(f["tokens"])] for key, value in said.items()}
        for place, f in zip(places.values(), features, strict=True)
    ]
