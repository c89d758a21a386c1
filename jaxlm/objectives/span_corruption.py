"""Span corruption: hidden spans become sentinels, and the decoder says what each stood for."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from jaxlm.objectives.seq2seq import MODES, Seq2Seq, with_end
from jaxlm.objectives.spans import Runs, Spans, cut, draw_gaps, place, share
from jaxlm.objectives.window import Window


@dataclasses.dataclass(frozen=True, eq=False)
class SpanCorruption(Seq2Seq):
    """T5's span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4) over packed documents.

        raw                  [bos] the cat sat on  it [eos] [bos]  a  dog ran      hidden: cat sat, it, dog
        encoder_tokens        the  <0> on  <1> [eos]  a   <0>  ran [eos]
        encoder_segment_ids    1    1   1   1    1    2    2    2    2
        encoder_positions      0    1   2   3    4    0    1    2    3
        labels                <0>  cat sat <1>  it   <0>  dog [eos]
        tokens              [start] <0> cat sat <1> [start] <0> dog
        segment_ids            1    1   1   1    1    2    2    2
        positions              0    1   2   3    4    0    1    2

    Sentinels count from <0> in every document, and no span is in two. Of n raw tokens (without [bos], which is dropped)
    exactly round(density n) are hidden in exactly round(hidden / mean_span) spans, whatever the documents are: so n is
    chosen such that a text fills both rows. [eos] is never hidden; the last document ends with one on both sides, as the
    whole example does in T5. Spans lie anywhere as long as they do not touch (T5's come after a kept token, and one ends
    the text). Documents too short to hide that much in have the end of their row left out.

    noise_density: share of the raw tokens that are hidden.
    mean_span: mean length of a span in tokens, 1 or more.

    Everything else: see `Seq2Seq`.
    """

    noise_density: float = 0.15
    mean_span: float = 3.0

    def find_problems(self) -> list[str]:
        """A density outside (0, 1), and spans shorter than a token."""
        problems = []
        if not 0 < self.noise_density < 1:
            problems.append(f"noise_density {self.noise_density}: expected 0 < noise_density < 1")
        if self.mean_span < 1:
            problems.append(f"mean_span {self.mean_span}: expected 1 or more")
        return problems

    def window(self, seq_len: int) -> Window:
        """As many raw tokens as fill the encoder's row. Raises ValueError where the tokenizer lacks sentinels."""
        lengths, known = self.lengths(seq_len), len(self.tables.sentinels)
        modes = MODES if self.mode else 0  # none of which may also stand for a span
        if (wanted := lengths.spans + modes) > known:
            also = f" and {modes} for modes" if modes else ""
            raise ValueError(
                f"found {known} sentinels; expected {wanted}, one for each span of a row of {seq_len}{also}; "
                "change tokenizer.num_sentinels, or take fewer or longer spans"
            )
        length = lengths.raw - bool(self.mode)
        return Window(length=length, stride=length)

    def target_len(self, seq_len: int) -> int:
        """All hidden tokens, a sentinel for each span, and [eos]."""
        lengths = self.lengths(seq_len)
        return lengths.hidden + lengths.spans + 1

    def lengths(self, seq_len: int) -> "Lengths":
        """Of a row whose encoder has `seq_len` places."""
        return fit(self.noise_density, self.mean_span, seq_len)

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example of at most `window(seq_len).length` tokens; see the picture."""
        tokens, segment_ids = self.source(example)
        while True:
            runs = Runs.of(tokens, segment_ids, self.tables)
            spans = draw_spans(rng, runs, count(len(tokens), self.noise_density, self.mean_span))
            surplus = len(tokens) - spans.length.sum() + len(spans.length) + 1 - seq_len
            if surplus <= 0:
                return self.hide(tokens, segment_ids, spans, seq_len)
            tokens, segment_ids = tokens[:-surplus], segment_ids[:-surplus]

    def hide(self, tokens: np.ndarray, segment_ids: np.ndarray, spans: Spans, seq_len: int) -> dict:
        """The row in which these spans of (n,) tokens are hidden."""
        sentinels, documents = self.sentinels_of(segment_ids[spans.start]), segment_ids[spans.start]
        mask = spans.mask(len(tokens))
        visible, kept = tokens.copy(), ~mask
        visible[spans.start], kept[spans.start] = sentinels, True
        encoder = with_end(visible[kept], segment_ids[kept], self.tables)

        at = spans.length.cumsum() - spans.length + np.arange(len(sentinels))
        targets = np.empty(mask.sum() + len(sentinels), tokens.dtype)
        is_sentinel = np.zeros(len(targets), bool)
        is_sentinel[at] = True
        targets[is_sentinel], targets[~is_sentinel] = sentinels, tokens[mask]
        segments = np.repeat(documents, spans.length + 1)
        return self.row(encoder, with_end(targets, segments, self.tables), seq_len)

    def sentinels_of(self, documents: np.ndarray) -> np.ndarray:
        """The sentinel of each span, by the ascending documents (spans,) that spans are in."""
        return self.tables.sentinels[np.arange(len(documents)) - documents.searchsorted(documents)]


class Lengths(NamedTuple):
    """Of a row: raw tokens, those of them that are hidden, and the spans that they are hidden in."""

    raw: int
    hidden: int
    spans: int


def count(raw: int, noise_density: float, mean_span: float) -> Lengths:
    """How many of `raw` tokens are hidden and in how many spans, rounded as T5 rounds."""
    hidden = min(max(round(raw * noise_density), 1), max(raw - 1, 0))
    return Lengths(raw, hidden, max(round(hidden / mean_span), 1) if hidden else 0)


@functools.lru_cache
def fit(noise_density: float, mean_span: float, seq_len: int) -> Lengths:
    """The most raw tokens whose visible ones, one for each span and [eos] are at most `seq_len`."""
    visible = lambda lengths: lengths.raw - lengths.hidden + lengths.spans + 1
    best = count(1, noise_density, mean_span)
    while visible(more := count(best.raw + 1, noise_density, mean_span)) <= seq_len:
        best = more
    return best


def draw_spans(rng: np.random.Generator, runs: Runs, wanted: Lengths) -> Spans:
    """`wanted.spans` random spans of `wanted.hidden` tokens in all, within runs and apart; less if runs are too short."""
    spans = share(rng, wanted.spans, runs.size, (runs.size + 1) // 2)
    hidden = spans + share(
        rng, wanted.hidden - int(spans.sum()), spans, (runs.size - 2 * spans + 1) * (spans > 0)
    )
    gaps = draw_gaps(rng, runs.size - hidden, spans, apart=1)
    return place(runs, gaps, cut(rng, hidden, spans), spans)
