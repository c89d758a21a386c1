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
        """Sorted positions to predict, int64 (chosen,): exactly round(rate * maskable) of the (n,) tokens.

        With whole_word as many as whole words fill of that number: no unchosen word would fit, too.
        """
        where = (~tables.special[tokens]).nonzero()[0]
        budget = round(self.rate * len(where))
        if self.max_ngram == 1 and not self.whole_word:
            return np.sort(rng.permutation(where)[:budget])

        # A unit is what is hidden whole: a token, or a word. It ends at specials and at documents.
        segments = segment_ids[where]
        starts = np.ones(len(where), bool)  # where a run of maskable tokens of one document starts
        starts[1:] = (where[1:] != where[:-1] + 1) | (segments[1:] != segments[:-1])
        if self.whole_word:
            starts_unit = starts | tables.word_start[tokens[where]]
            unit = starts_unit.cumsum() - 1
            sizes, starts = np.bincount(unit), starts[starts_unit]
        else:
            unit, sizes = np.arange(len(where)), np.ones(len(where), np.int64)

        # n-grams come in random order, the units of each from left to right.
        ngram = self._ngrams(rng, starts)
        order = rng.random(len(sizes))[ngram].argsort(kind="stable")
        chosen = np.zeros(len(sizes), bool)
        chosen[order[_fill(sizes[order], budget)]] = True
        return where[chosen[unit]]

    def _ngrams(self, rng: np.random.Generator, starts_run: np.ndarray) -> np.ndarray:
        """The n-gram of each unit: a random partition, cut anew where a run of units starts."""
        if self.max_ngram == 1:
            return np.arange(len(starts_run))
        n = np.arange(1, self.max_ngram + 1)
        share = np.cumsum((1 - self.ngram_decay) ** n if self.ngram_decay else 1 / n)
        draws = rng.random(len(starts_run)) * share[-1]
        ends = (np.searchsorted(share, draws, side="right") + 1).cumsum()
        starts = starts_run.copy()
        starts[ends[: np.searchsorted(ends, len(starts))]] = True
        return starts.cumsum() - 1

    def replace(
        self, rng: np.random.Generator, tokens: np.ndarray, chosen: np.ndarray, tables: TokenTables
    ) -> np.ndarray:
        """A copy of `tokens` (n,) in which those at `chosen` (m,) are masked, random or kept, independently."""
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
    waiting = (sizes <= budget).nonzero()[0]
    while len(waiting):
        total = sizes[waiting].cumsum()
        fits = int(total.searchsorted(budget, side="right"))
        taken.append(waiting[:fits])
        budget -= int(total[fits - 1])
        waiting = waiting[fits:]
        waiting = waiting[sizes[waiting] <= budget]
    return np.concatenate(taken)
