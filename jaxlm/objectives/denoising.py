"""Denoising: the encoder reads a document that was spoilt in several ways, the decoder writes it as it was."""

import dataclasses

import numpy as np

from jaxlm.objectives.seq2seq import Seq2Seq, Text
from jaxlm.objectives.spans import Runs, draw_gaps, place, share
from jaxlm.objectives.tables import TokenTables
from jaxlm.objectives.window import Window

SHARES = ("permute_sentences", "rotate", "infill_rate", "delete_rate", "mask_rate")


@dataclasses.dataclass(frozen=True, eq=False)
class Denoising(Seq2Seq):
    """BART's denoising (Lewis et al. 2019, arXiv:1910.13461, section 2.2) over packed documents.

        raw                 [bos]  A   .   B   C   D   .  [eos]       labels of the decoder, in every case
        permute_sentences   [bos]  B   C   D   .   A   .  [eos]
        rotate              [bos]  C   D   .   A   .   B  [eos]       begins with a random token
        infill              [bos]  A   .  [M]  D  [M]  .  [eos]       a [MASK] for each span: here B C, and one of none
        delete              [bos]  A   B   C   .  [eos]
        mask                [bos]  A   .  [M]  C   D  [M] [eos]

    They are done in this order, each within its document; [bos] and [eos] stay. Both rows have `seq_len` places, the
    decoder's is full. The defaults are those of the released BART.

    permute_sentences, rotate: share of the documents that it is done to.
    infill_rate: share of a row's text that is in spans, exactly.
    mean_span: spans are Poisson(mean_span) tokens long, 0 included.
    delete_rate, mask_rate: share of what is left that it takes, exactly.

    Everything else: see `Seq2Seq`.
    """

    decoder_start: str = "eos"
    permute_sentences: float = 1.0
    rotate: float = 0.0
    infill_rate: float = 0.3
    mean_span: float = 3.0
    delete_rate: float = 0.0
    mask_rate: float = 0.0

    def find_problems(self) -> list[str]:
        """Shares outside 0 to 1, and spans that are not longer than 0."""
        shares = {name: getattr(self, name) for name in SHARES}
        problems = [
            f"{name} {value}: expected 0 <= {name} <= 1"
            for name, value in shares.items()
            if not 0 <= value <= 1
        ]
        if self.mean_span <= 0:
            problems.append(f"mean_span {self.mean_span}: expected more than 0")
        return problems

    def window(self, seq_len: int) -> Window:
        """As many tokens as the decoder predicts."""
        return Window(seq_len, seq_len, sentences=self.permute_sentences > 0)

    def target_len(self, seq_len: int) -> int:
        """The decoder writes all of it."""
        return seq_len

    def source(self, example: dict) -> Text:
        """The documents as they are."""
        return example["tokens"], example["segment_ids"]

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example of at most T tokens; see the picture."""
        original = self.source(example)
        noised = original
        if self.permute_sentences:
            starts = example["sentence_starts"]
            noised = permute(rng, *noised, starts, self.permute_sentences, self.tables)
        if self.rotate:
            noised = rotate(rng, *noised, self.rotate, self.tables)
        if self.infill_rate:
            noised = infill(rng, *noised, self.infill_rate, self.mean_span, self.tables)
        if self.delete_rate:
            chosen = choose(rng, noised[0], self.delete_rate, self.tables)
            noised = np.delete(noised[0], chosen), np.delete(noised[1], chosen)
        if self.mask_rate:
            tokens = noised[0].copy()
            tokens[choose(rng, tokens, self.mask_rate, self.tables)] = self.tables.mask_id
            noised = tokens, noised[1]
        return self.row(noised, original, seq_len)


def permute(
    rng: np.random.Generator,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    sentence_starts: np.ndarray,
    rate: float,
    tables: TokenTables,
) -> Text:
    """The sentences of a share `rate` of the documents in a random order. tokens, segment_ids, sentence_starts: (n,)."""
    runs = Runs.of(tokens, segment_ids, tables)
    text, run = runs.places()
    starts = sentence_starts[text].copy()
    starts[runs.size.cumsum() - runs.size] = True
    sentence = starts.cumsum() - 1
    key = np.arange(starts.sum(), dtype=float)
    moved = (rng.random(len(runs.start)) < rate)[run[starts]]
    key[moved] = rng.random(moved.sum())  # those of a document that stays are in order, as they are
    out = tokens.copy()
    out[text] = tokens[text[np.lexsort((key[sentence], run))]]
    return out, segment_ids


def rotate(
    rng: np.random.Generator,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    rate: float,
    tables: TokenTables,
) -> Text:
    """A share `rate` of the documents of (n,) tokens begin at a random one, what was before it follows at the end."""
    runs = Runs.of(tokens, segment_ids, tables)
    text, run = runs.places()
    turned = rng.random(len(runs.start)) < rate
    shift = (rng.random(len(runs.start)) * runs.size).astype(np.int64) * turned
    place_in_run = (text - runs.start[run] + shift[run]) % runs.size[run]
    out = tokens.copy()
    out[text] = tokens[runs.start[run] + place_in_run]
    return out, segment_ids


def infill(
    rng: np.random.Generator,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    rate: float,
    mean_span: float,
    tables: TokenTables,
) -> Text:
    """Spans of exactly a share `rate` of the (n,) tokens' text, none in two documents, each become one [MASK].

    Spans of length 0 put a [MASK] between two tokens; there are never more of them than places that the others free.
    """
    runs = Runs.of(tokens, segment_ids, tables)
    hidden = share(rng, round(rate * int(runs.size.sum())), runs.size, runs.size)
    lengths, spans = draw_lengths(rng, hidden, mean_span)
    gaps = draw_gaps(rng, runs.size - hidden, spans, apart=0)
    found = place(runs, gaps, lengths, spans)

    kept = ~found.mask(len(tokens))
    inner, between = found.start[lengths > 0], found.start[lengths == 0]
    tokens = tokens.copy()
    tokens[inner], kept[inner] = tables.mask_id, True
    owners = np.repeat(segment_ids[runs.start], spans)[lengths == 0]
    kept = np.insert(kept, between, True)
    tokens = np.insert(tokens, between, tables.mask_id)[kept]
    return tokens, np.insert(segment_ids, between, owners)[kept]


def draw_lengths(
    rng: np.random.Generator, hidden: np.ndarray, mean_span: float
) -> tuple[np.ndarray, np.ndarray]:
    """Poisson lengths of spans, cut off where a document has as many hidden tokens as it should.

    hidden: (documents,). Returns the lengths document after document, in random order within one, and how many spans
    each has.
    """
    total = int(hidden.sum())
    drawn = np.zeros(0, np.int64)
    while drawn.sum() < total:
        drawn = np.append(drawn, rng.poisson(mean_span, int(total / mean_span) + 8))
    ends, document_ends = drawn.cumsum(), hidden.cumsum()
    num = int(ends.searchsorted(total)) + 1 if total else 0
    edges = np.unique(np.concatenate([[0], ends[:num].clip(max=total), document_ends]))
    lengths = np.diff(edges)
    empty = (ends - drawn)[:num][drawn[:num] == 0][: total - len(lengths)]  # where they lie
    at = np.concatenate([edges[:-1], np.minimum(empty, total - 1)])
    owner = document_ends.searchsorted(at, side="right")
    order = np.lexsort((rng.random(len(at)), owner))
    lengths = np.append(lengths, np.zeros(len(empty), np.int64))[order]
    return lengths, np.bincount(owner, minlength=len(hidden))


def choose(
    rng: np.random.Generator, tokens: np.ndarray, rate: float, tables: TokenTables
) -> np.ndarray:
    """Exactly a share `rate` of the places, int64 (chosen,), whose tokens (n,) are text, at random."""
    where = np.flatnonzero(~tables.special[tokens])
    return rng.permutation(where)[: round(rate * len(where))]
