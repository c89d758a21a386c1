"""Fill-in-the-middle: a decoder learns to write what lies between a prefix and a suffix, as ordinary text."""

import dataclasses
from typing import Any

import numpy as np

from jaxlm.objectives.causal import CausalLM
from jaxlm.objectives.spans import Runs
from jaxlm.objectives.tables import positions_of
from jaxlm.objectives.window import Window


@dataclasses.dataclass(frozen=True, eq=False)
class FillInTheMiddle(CausalLM):
    """Causal modelling in which some documents are rearranged (Bavarian et al. 2022, arXiv:2207.14255, section 3).

        raw      [bos]  the cat | sat on | the mat  [eos]          cut in two places, anywhere
        PSM      [bos] <0> the cat <1> the mat <2> sat on [eos]    prefix, suffix, middle
        SPM      [bos] <0> <1> the mat <2> the cat sat on [eos]    suffix, prefix, middle

    <0>, <1> and <2> are the tokenizer's first sentinels. To fill a gap, ask for what follows <2>, up to [eos]. Rows,
    labels and weights are those of `CausalLM`. A row is cut into its documents first, so parts never mix, and what three
    tokens more for each leave no room for at the end of the row is left out.

    rate: share of the documents (or of what the row has of them) that are rearranged.
    spm_share: of those, how many as SPM.

    Everything else: see `CausalLM`.
    """

    rate: float = 0.5
    spm_share: float = 0.5

    static = False

    def __post_init__(self, tokenizer: Any) -> None:
        super().__post_init__(tokenizer)
        options = {"rate": self.rate, "spm_share": self.spm_share}
        problems = [
            f"{name} {value}: expected 0 <= {name} <= 1"
            for name, value in options.items()
            if not 0 <= value <= 1
        ]
        if problems:
            raise ValueError("FillInTheMiddle:\n  " + "\n  ".join(problems))

    def window(self, seq_len: int) -> Window:
        """As for causal modelling. Raises ValueError where the tokenizer lacks sentinels."""
        if (known := len(self.tables.sentinels)) < 3:
            raise ValueError(
                f"found {known} sentinels; expected 3, for prefix, suffix and middle; "
                "change tokenizer.num_sentinels"
            )
        return super().window(seq_len)

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example of at most T + 1 tokens, each array (T,); see the picture."""
        tokens, segment_ids = example["tokens"], example["segment_ids"]
        runs = Runs.of(tokens, segment_ids, self.tables)
        is_chosen, room = rng.random(len(runs.start)) < self.rate, seq_len + 1
        width = np.ones(len(tokens), np.int64)  # of each token in the row, sentinels included
        width[runs.start[is_chosen]] += 3
        keep = int(width.cumsum().searchsorted(room, side="right"))
        is_chosen &= runs.start < keep
        width[keep:] = 1  # what there is no room to rearrange stays as it is
        keep = int(width.cumsum().searchsorted(room, side="right"))
        ends = np.minimum(runs.start + runs.size, keep)
        segment_ids = np.repeat(segment_ids[:keep], width[:keep])
        order = self.arrange(rng, runs.start[is_chosen], ends[is_chosen], keep)
        row = {
            "tokens": np.concatenate([tokens[:keep], self.tables.sentinels[:3]])[order],
            "segment_ids": segment_ids,
            "positions": positions_of(segment_ids),
        }
        return super().corrupt(rng, row, seq_len)

    def arrange(
        self, rng: np.random.Generator, starts: np.ndarray, ends: np.ndarray, size: int
    ) -> np.ndarray:
        """The order of `size` tokens in which the texts [start, end) are rearranged: int64 (row,).

        size, size + 1 and size + 2 stand for the three sentinels.
        """
        (pre, suf, mid), pieces, done = np.arange(size, size + 3)[:, None], [], 0
        for start, end in zip(starts, ends, strict=True):
            first, second = np.sort(rng.integers(start, end + 1, 2))
            prefix, middle = np.arange(start, first), np.arange(first, second)
            suffix = np.arange(second, end)
            pieces.append(np.arange(done, start))
            if rng.random() < self.spm_share:
                pieces += [pre, suf, suffix, mid, prefix, middle]
            else:
                pieces += [pre, prefix, suf, suffix, mid, middle]
            done = end
        return np.concatenate([*pieces, np.arange(done, size)])
