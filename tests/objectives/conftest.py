"""A toy tokenizer: two pieces to a word, so that whole words can be told apart from tokens."""

from types import SimpleNamespace

import numpy as np
import pytest

WORDS = 50
SENTINELS = 60


@pytest.fixture(scope="session")
def tokenizer():
    """Ids 0 to 6 are special; 7 + 2w starts word w, 8 + 2w goes on with it; an id is 3 bytes; the last ones are sentinels."""
    text = 7 + 2 * WORDS
    vocab_size = text + SENTINELS
    is_word_start = np.zeros(vocab_size, bool)
    is_word_start[7:text:2] = True
    num_bytes = np.zeros(vocab_size, np.int32)
    num_bytes[7:text] = 3
    return SimpleNamespace(
        vocab_size=vocab_size,
        **dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, cls_id=4, sep_id=5, mask_id=6),
        sentinel_ids=tuple(range(text, vocab_size)),
        special_ids=frozenset([*range(7), *range(text, vocab_size)]),
        is_word_start=is_word_start,
        num_bytes=num_bytes,
    )


@pytest.fixture(scope="session")
def make_example():
    """make_example(rng, lengths): documents [bos] words [eos] of these many tokens, packed."""

    def make(rng, lengths, sentence_every=5):
        documents = []
        for length in lengths:
            document = np.empty(length, np.int32)
            document[:] = rng.integers(7, 7 + 2 * WORDS, length)
            document[0], document[-1] = 1, 2
            documents.append(document)
        positions = [np.arange(length, dtype=np.int32) for length in lengths]
        sentence_starts = [p % sentence_every == 1 for p in positions]
        segment_ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
        return {
            "tokens": np.concatenate(documents),
            "segment_ids": segment_ids,
            "positions": np.concatenate(positions),
            "sentence_starts": np.concatenate(sentence_starts),
        }

    return make
