"""Permutation language modelling: tokens are predicted in a random order (XLNet, arXiv:1906.08237)."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jaxlm.objectives.losses import label_cross_entropy
from jaxlm.objectives.tables import TokenTables, padded, positions_of
from jaxlm.objectives.window import Window


@dataclasses.dataclass(frozen=True, eq=False)
class PermutationLM:
    """Spans of tokens, about 1/K of all, are predicted one after the other in a random order from all others.

        raw                [bos]  the  cat  sat  on  [eos] [bos]  a   dog      T - 2 tokens
        tokens             [bos]  the  cat  sat  on  [eos] [bos]  a   dog  [sep] [cls]
        segment_ids          1     1    1    1    1    1     2    2    2    2     2
        order                0     0    2    1    0    0     0    3    0    0     0
        masked_positions     2     3    7                        M slots, by place
        labels              cat   sat   a
        weights              1     1    1                        unused slots weigh nothing

    Each place to predict (order 1 and on) sees all context (order 0) of its document and the places before it in the
    order; the model sees to that (`models.xlnet`). The tokens are the text as it is: nothing is masked or replaced.

    Places are chosen as section 2.6 has it: of a stretch of K L tokens a span of L, L from 1 to max_span with
    P(L) ~ 1 / L (as released), at a random place in it. Special ids are never predicted, and no span crosses documents.

    partial: K.
    max_span: the longest span.
    tokenizer: gives ids and tables; not kept.
    static: as of `MaskedLM`.
    label_smoothing, chunk_tokens: see `cross_entropy`.
    """

    tokenizer: dataclasses.InitVar[Any]
    partial: int = 6
    max_span: int = 5
    static: bool = False
    label_smoothing: float = 0.0
    chunk_tokens: int = 0
    tables: TokenTables = dataclasses.field(init=False, repr=False)

    families: ClassVar[tuple[str, ...]] = ("xlnet",)

    def __post_init__(self, tokenizer: Any) -> None:
        problems = [
            f"{name} {value}: expected 1 or more"
            for name, value in (("partial", self.partial), ("max_span", self.max_span))
            if value < 1
        ]
        if problems:
            raise ValueError("permutation:\n  " + "\n  ".join(problems))
        object.__setattr__(self, "tables", TokenTables.of(tokenizer))

    def window(self, seq_len: int) -> Window:
        """Room is left for [sep] and [cls], which XLNet has at the end."""
        return Window(length=seq_len - 2, stride=seq_len - 2)

    def num_predictions(self, seq_len: int) -> int:
        """M: places of a row with a query, which go through the vocabulary matrix."""
        return max(1, round(seq_len / self.partial))

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example of at most T - 2 tokens; see the picture."""
        raw, segment_ids = example["tokens"], example["segment_ids"]
        last = segment_ids[-1:].repeat(2) if len(raw) else np.ones(2, np.int32)
        ends = [self.tables.sep_id, self.tables.cls_id]
        tokens = np.concatenate([raw, ends]).astype(np.int32)
        segment_ids = np.concatenate([segment_ids, last]).astype(np.int32)
        num_slots = self.num_predictions(seq_len)
        chosen = self.choose(rng, tokens, segment_ids)[:num_slots].astype(np.int32)
        order = np.zeros(len(tokens), np.int32)
        order[chosen] = 1 + rng.permutation(len(chosen))
        return {
            "tokens": padded(tokens, seq_len, self.tables.pad_id),
            "segment_ids": padded(segment_ids, seq_len),
            "positions": padded(positions_of(segment_ids), seq_len),
            "order": padded(order, seq_len),
            "masked_positions": padded(chosen, num_slots),
            "labels": padded(tokens[chosen], num_slots),
            "weights": padded(np.ones(len(chosen), np.float32), num_slots),
        }

    def choose(
        self, rng: np.random.Generator, tokens: np.ndarray, segment_ids: np.ndarray
    ) -> np.ndarray:
        """Sorted places to predict, int64 (chosen,), of (n,) tokens.

            K 3, spans of 1, 2, 1     . x .  . . . x x .  x . .

        A span that would run over the end of its document stops there.
        """
        sizes = np.arange(1, self.max_span + 1)
        count = -(-len(tokens) // self.partial)
        spans = rng.choice(sizes, size=count, p=1 / sizes / (1 / sizes).sum())
        stretches = spans * self.partial
        starts = np.cumsum(stretches) - stretches + rng.integers(stretches - spans + 1)
        places = np.repeat(starts - np.cumsum(spans) + spans, spans) + np.arange(spans.sum())
        heads = np.repeat(starts, spans)
        inside = places < len(tokens)
        places, heads = places[inside], heads[inside]
        kept = ~self.tables.special[tokens[places]] & (segment_ids[places] == segment_ids[heads])
        return places[kept]

    def loss(self, outputs: Any, batch: dict) -> tuple[tuple, dict]:
        """((total, weight), metrics) over the predicted places: loss, nll, accuracy."""
        total, metrics = label_cross_entropy(
            outputs,
            batch,
            label_smoothing=self.label_smoothing,
            chunk_tokens=self.chunk_tokens,
        )
        return total, {"loss": total, **metrics}
