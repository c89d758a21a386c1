"""Which tokens of a row are hidden, and what stands in their place; numpy, a row at a time."""

import dataclasses

import numpy as np

from jaxlm.objectives.tables import TokenTables


@dataclasses.dataclass(frozen=True)
class Masking:
    """The choice of masked positions and their replacement (BERT: Devlin et al. 2019, section 3.1).

    rate: share of the row's maskable tokens (all but special ids) that are predicted.
    mask_share, random_share: of those, how many become [MASK], how many a random ordinary id; the
      rest stay as they are.
    whole_word: words are predicted whole or not at all.
    max_ngram: tokens (or words, with whole_word) are hidden in runs of 1 to max_ngram.
    ngram_decay: P(run of n) ~ (1 - ngram_decay) ** n (SpanBERT: 0.2 and max_ngram 10); 0 means
      P ~ 1 / n (ALBERT, section 4.1: max_ngram 3).
    """

    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_word: bool = False
    max_ngram: int = 1
    ngram_decay: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.rate <= 1:
            problems.append(f"rate {self.rate}: expected 0 < rate <= 1")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            problems.append(
                f"mask_share {self.mask_share}, random_share {self.random_share}: expected shares "
                ">= 0 that sum to at most 1"
            )
        if self.max_ngram < 1:
            problems.append(f"max_ngram {self.max_ngram}: expected 1 (no runs) or more")
        if not 0 <= self.ngram_decay < 1:
            problems.append(f"ngram_decay {self.ngram_decay}: expected 0 <= ngram_decay < 1")
        if problems:
            raise ValueError("masking:\n  " + "\n  ".join(problems))

    def choose(
        self,
        rng: np.random.Generator,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        tables: TokenTables,
    ) -> np.ndarray:
        """Sorted positions to predict, exactly round(rate * maskable) of them.

        With whole_word as many as whole words fill of that number: no unchosen word would fit, too.
        """
        maskable = ~tables.special[tokens]
        budget = round(self.rate * int(maskable.sum()))
        where = np.flatnonzero(maskable)
        if self.max_ngram == 1 and not self.whole_word:
            return np.sort(rng.permutation(where)[:budget])

        # A unit is what is hidden whole: a token, or a word. It ends at specials and at documents.
        starts_run = np.ones(len(where), bool)
        starts_run[1:] = (np.diff(where) > 1) | (np.diff(segment_ids[where]) != 0)
        starts = starts_run | tables.word_start[tokens[where]] if self.whole_word else starts_run
        starts = starts if self.whole_word else np.ones(len(where), bool)
        unit = np.cumsum(starts) - 1
        sizes = np.bincount(unit)
        ngram = self._ngrams(rng, starts_run[starts])

        # n-grams come in random order, the units of each from left to right.
        order = np.argsort(rng.random(len(sizes))[ngram], kind="stable")
        chosen = np.zeros(len(sizes), bool)
        chosen[order[_fill(sizes[order], budget)]] = True
        return where[chosen[unit]]

    def _ngrams(self, rng: np.random.Generator, starts_run: np.ndarray) -> np.ndarray:
        """The n-gram of each unit: a random partition, cut anew where a run of units starts."""
        n = np.arange(1, self.max_ngram + 1)
        share = (1 - self.ngram_decay) ** n if self.ngram_decay else 1 / n
        lengths = rng.choice(n, len(starts_run), p=share / share.sum())
        ends = np.cumsum(lengths)
        starts = starts_run.copy()
        starts[ends[ends < len(starts)]] = True
        return np.cumsum(starts) - 1

    def replace(
        self, rng: np.random.Generator, tokens: np.ndarray, chosen: np.ndarray, tables: TokenTables
    ) -> np.ndarray:
        """A copy of `tokens` in which those at `chosen` are masked, random or kept, independently."""
        share = rng.random(len(chosen))
        random = tables.ordinary[rng.integers(len(tables.ordinary), size=len(chosen))]
        kept = tokens[chosen]
        other = np.where(share < self.mask_share + self.random_share, random, kept)
        replaced = tokens.copy()
        replaced[chosen] = np.where(share < self.mask_share, tables.mask_id, other)
        return replaced


def _fill(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Indices of what goes in, first come first served, skipping what does not fit any more.

    Each turn takes the longest prefix that fits and drops all that is too large for the rest.
    """
    taken = [np.empty(0, np.int64)]
    waiting = np.arange(len(sizes))
    while True:
        waiting = waiting[sizes[waiting] <= budget]
        fits = np.cumsum(sizes[waiting]) <= budget
        if not fits.any():
            return np.concatenate(taken)
        taken.append(waiting[fits])
        budget -= int(sizes[taken[-1]].sum())
        waiting = waiting[~fits]
