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

from jaxlm.tokenizers.base import META, ROLES, Tokenizer
from jaxlm.tokenizers.kinds import TOKENIZERS
from jaxlm.tokenizers.loading import is_saved, load_tokenizer, make_tokenizer
from jaxlm.tokenizers.training import TRAINERS, train_tokenizer

__all__ = [
    "META",
    "ROLES",
    "TOKENIZERS",
    "TRAINERS",
    "Tokenizer",
    "is_saved",
    "load_tokenizer",
    "make_tokenizer",
    "train_tokenizer",
]
