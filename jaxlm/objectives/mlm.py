"""Masked language modelling: hidden tokens are predicted from both sides."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jaxlm.objectives.losses import label_cross_entropy
from jaxlm.objectives.masking import Masking
from jaxlm.objectives.tables import TokenTables, padded, positions_of
from jaxlm.objectives.window import Window


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedLM:
    """BERT's masked language model over packed documents.

        raw                [bos]  the   cat   sat  [eos] [bos]   a    dog     T - 2 tokens
        tokens             [cls]  the  [MASK] sat  [eos] [bos]  hog   dog  [sep]  + 1 pad
        segment_ids          1     1     1     1     1     2     2     2     2      0
        positions            0     1     2     3     4     0     1     2     3      0
        masked_positions     2     6     0                       M slots, in order
        labels              cat    a     0
        weights              1     1     0                       unused slots weigh nothing

    [cls] takes the place of a [bos] that the example starts with; [cls] and [sep] belong to the
    first and the last document. Only M = round(rate * T) positions reach the vocabulary matrix.

    tokenizer: gives ids and tables; not kept.
    static: an example is masked alike in every epoch (BERT), instead of anew (RoBERTa).
    rate, mask_share, random_share, whole_word, max_ngram, ngram_decay: see `Masking`.
    label_smoothing, chunk_tokens: see `cross_entropy`.
    """

    tokenizer: dataclasses.InitVar[Any]
    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_word: bool = False
    max_ngram: int = 1
    ngram_decay: float = 0.0
    static: bool = False
    label_smoothing: float = 0.0
    chunk_tokens: int = 0
    tables: TokenTables = dataclasses.field(init=False, repr=False)
    masking: Masking = dataclasses.field(init=False, repr=False)

    families: ClassVar[tuple[str, ...]] = ("bert",)

    def __post_init__(self, tokenizer: Any) -> None:
        object.__setattr__(self, "tables", TokenTables.of(tokenizer))
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(Masking)}
        object.__setattr__(self, "masking", Masking(**options))

    def window(self, seq_len: int) -> Window:
        """Room is left for [cls] and [sep]."""
        return Window(length=seq_len - 2, stride=seq_len - 2)

    def num_predictions(self, seq_len: int) -> int:
        """M: positions of a row that go through the vocabulary matrix."""
        return max(1, round(self.rate * seq_len))

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example of at most T - 2 tokens; see the picture."""
        raw, segment_ids = example["tokens"], example["segment_ids"]
        if len(raw) and raw[0] == self.tables.bos_id:
            raw, segment_ids = raw[1:], segment_ids[1:]
        ends = segment_ids[[0, -1]] if len(raw) else np.ones(2, np.int32)
        tokens = np.concatenate([[self.tables.cls_id], raw, [self.tables.sep_id]])
        segment_ids = np.concatenate([ends[:1], segment_ids, ends[1:]])
        return self._masked(rng, tokens, segment_ids, seq_len)

    def _masked(
        self, rng: np.random.Generator, tokens: np.ndarray, segment_ids: np.ndarray, seq_len: int
    ) -> dict:
        """Masks and pads a row of at most T tokens."""
        tokens, num_slots = tokens.astype(np.int32), self.num_predictions(seq_len)
        chosen = self.masking.choose(rng, tokens, segment_ids, self.tables)
        replaced = self.masking.replace(rng, tokens, chosen, self.tables)
        return {
            "tokens": padded(replaced, seq_len, self.tables.pad_id),
            "segment_ids": padded(segment_ids.astype(np.int32), seq_len),
            "positions": padded(positions_of(segment_ids), seq_len),
            "masked_positions": padded(chosen.astype(np.int32), num_slots),
            "labels": padded(tokens[chosen], num_slots),
            "weights": padded(np.ones(len(chosen), np.float32), num_slots),
        }

    def loss(self, outputs: Any, batch: dict) -> tuple[tuple, dict]:
        """((total, weight), metrics) over the masked positions: loss, nll, accuracy."""
        total, metrics = label_cross_entropy(
            outputs,
            batch,
            label_smoothing=self.label_smoothing,
            chunk_tokens=self.chunk_tokens,
        )
        return total, {"loss": total, **metrics}
