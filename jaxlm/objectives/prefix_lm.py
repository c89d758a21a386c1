"""Prefix language modelling: what follows a prefix is predicted from all of it; for decoders and for encoder-decoders."""

import dataclasses

import numpy as np

from jaxlm.objectives.causal import CausalLM
from jaxlm.objectives.seq2seq import Seq2Seq, Text
from jaxlm.objectives.spans import share
from jaxlm.objectives.tables import padded
from jaxlm.objectives.window import Window


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixLM(CausalLM):
    """A decoder's prefix LM over packed documents (Liu et al. 2018, arXiv:1801.10198; T5's section 3.2.1).

        raw          [bos]  the   cat   sat   on  [eos] [bos]   a    dog     T + 1 tokens, stride T
        tokens       [bos]  the   cat   sat   on  [eos] [bos]   a
        is_prefix      1     1     1     0     0    0     1     0            these see one another
        labels        the   cat   sat   on   [eos] [bos]  a    dog
        weights        0     0     1     1     1    0     1     1            no label is in a prefix
        segment_ids    1     1     1     1     1    1     2     2

    The prefix of each document (or of what the row has of it) ends anywhere, all lengths that leave something to predict
    being equally likely; a prefix of one token is plain causal modelling. Options: see `CausalLM`.
    """

    static = False

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example of at most T + 1 tokens, each array (T,); see the picture."""
        row = super().corrupt(rng, example, seq_len)
        starts, sizes = stretches(example["segment_ids"])
        prefix = 1 + (rng.random(len(sizes)) * (sizes - 1)).astype(np.int64)
        is_prefix = np.arange(len(example["tokens"])) < np.repeat(starts + prefix, sizes)
        weights = row["weights"] * ~padded(is_prefix[1:], seq_len)
        return {**row, "is_prefix": padded(is_prefix[:-1], seq_len), "weights": weights}


@dataclasses.dataclass(frozen=True, eq=False)
class Seq2SeqPrefixLM(Seq2Seq):
    """An encoder-decoder's prefix LM: the encoder reads the prefix of each document, the decoder goes on.

        raw              [bos]  the   cat   sat   on  [eos] [bos]   a    dog
        encoder_tokens    the   cat    a
        encoder_segments   1     1     2
        labels            sat   on   [eos]  dog
        tokens          [start] sat   on  [start]
        segment_ids        1     1     1     2

    rate: 0 = the prefix of each document ends anywhere (then the decoder's row is as long as the encoder's); otherwise
      the share of a row that is predicted, exactly, and of each document within a token, if it is long enough.

    Everything else: see `Seq2Seq`.
    """

    rate: float = 0.0

    def find_problems(self) -> list[str]:
        """A rate outside [0, 1)."""
        if 0 <= self.rate < 1:
            return []
        return [f"rate {self.rate}: expected 0 <= rate < 1"]

    def window(self, seq_len: int) -> Window:
        """As many tokens as the encoder has room for, and those that the decoder gets instead."""
        length = self.raw_len(seq_len) - bool(self.mode)
        return Window(length=length, stride=length)

    def raw_len(self, seq_len: int) -> int:
        """The most tokens, mode included, of which the encoder gets at most `seq_len`."""
        length = int(seq_len / (1 - self.rate)) + 2
        while length - round(self.rate * length) > seq_len:
            length -= 1
        return length

    def target_len(self, seq_len: int) -> int:
        """All tokens that are predicted."""
        return round(self.rate * self.raw_len(seq_len)) if self.rate else seq_len

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example of at most `window(seq_len).length` tokens; see the picture."""
        tokens, segment_ids = self.source(example)
        while True:
            starts, sizes = stretches(segment_ids)
            suffix = self.draw_suffixes(rng, sizes)
            surplus = len(tokens) - int(suffix.sum()) - seq_len
            if surplus <= 0:
                break
            tokens, segment_ids = tokens[:-surplus], segment_ids[:-surplus]
        is_prefix = np.arange(len(tokens)) < np.repeat(starts + sizes - suffix, sizes)
        encoder: Text = (tokens[is_prefix], segment_ids[is_prefix])
        return self.row(encoder, (tokens[~is_prefix], segment_ids[~is_prefix]), seq_len)

    def draw_suffixes(self, rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
        """How much of each document is predicted, int64 (documents,): at least one token is left as a prefix."""
        if self.rate:
            return share(rng, round(self.rate * int(sizes.sum())), sizes, sizes - 1)
        return np.ceil(rng.random(len(sizes)) * (sizes - 1)).astype(np.int64)


def stretches(segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) of the documents in a row, each int64 (documents,)."""
    edges = np.flatnonzero(np.diff(segment_ids, prepend=0))
    return edges, np.diff(edges, append=len(segment_ids))
