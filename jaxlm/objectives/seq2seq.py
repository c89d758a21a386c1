"""What the objectives of encoder-decoders share: the row of a pair, and its loss over the decoder's labels."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jaxlm.objectives.losses import label_cross_entropy
from jaxlm.objectives.tables import TokenTables, padded, positions_of

STARTS = ("bos", "pad", "eos")
MODES = 3  # the last sentinels, which name the denoisers of UL2


@dataclasses.dataclass(frozen=True, eq=False)
class Seq2Seq:
    """An objective that gives the encoder one text and asks the decoder for another.

    tokenizer: gives ids and tables; not kept.
    decoder_start: what the decoder reads first: 'bos', 'pad' (T5) or 'eos' (BART).
    mode: 0, or n = the n-th sentinel from the end begins each document of the encoder's row (UL2's mode tokens, of which
      there are MODES).
    z_loss, label_smoothing, chunk_tokens: see `cross_entropy`.
    """

    tokenizer: dataclasses.InitVar[Any]
    decoder_start: str = "bos"
    mode: int = 0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk_tokens: int = 0
    tables: TokenTables = dataclasses.field(init=False, repr=False)

    static: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ("encoder_decoder",)

    def __post_init__(self, tokenizer: Any) -> None:
        problems = self.find_problems()
        if self.decoder_start not in STARTS:
            known = ", ".join(STARTS)
            problems.append(f"decoder_start {self.decoder_start!r}: expected one of {known}")
        if not 0 <= self.mode <= MODES:
            problems.append(f"mode {self.mode}: expected 0 to {MODES}")
        if problems:
            raise ValueError(f"{type(self).__name__}:\n  " + "\n  ".join(problems))
        object.__setattr__(self, "tables", TokenTables.of(tokenizer))

    def find_problems(self) -> list[str]:
        """What is wrong with the options, each as found and expected."""
        return []

    def target_len(self, seq_len: int) -> int:
        """Positions of a decoder's row beside `seq_len` of the encoder's."""
        raise NotImplementedError

    def num_predictions(self, seq_len: int) -> int:
        """Positions of a row that go through the vocabulary matrix."""
        return self.target_len(seq_len)

    def source(self, example: dict) -> "Text":
        """What is corrupted: an example's documents without their [bos]; with a mode, all of them with one, in its place."""
        tokens, segment_ids = example["tokens"], example["segment_ids"]
        is_bos = (tokens == self.tables.bos_id) & (positions_of(segment_ids) == 0)
        if not self.mode:
            return tokens[~is_bos], segment_ids[~is_bos]
        if is_bos[:1].all():
            return tokens, segment_ids
        bos = tokens.dtype.type(self.tables.bos_id)
        return np.append(bos, tokens), np.append(segment_ids[:1], segment_ids)

    def row(
        self,
        encoder: "Text",
        labels: "Text",
        seq_len: int,
    ) -> dict:
        """The row of (tokens, segment_ids) of the encoder and of (labels, segment_ids) of the decoder.

        The decoder's tokens are its labels one place later, and its start in front of each segment.
        """
        tables, target_len = self.tables, self.target_len(seq_len)
        (sources, source_segments), (targets, segments) = encoder, labels
        source_positions = positions_of(source_segments)
        if self.mode:
            sources = np.where(source_positions == 0, tables.sentinels[-self.mode], sources)
        positions = positions_of(segments)
        tokens = np.empty(len(targets), np.int32)
        tokens[1:] = targets[:-1]
        tokens[positions == 0] = getattr(tables, f"{self.decoder_start}_id")
        return {
            "encoder_tokens": padded(sources.astype(np.int32), seq_len, tables.pad_id),
            "encoder_segment_ids": padded(source_segments.astype(np.int32), seq_len),
            "encoder_positions": padded(source_positions, seq_len),
            "tokens": padded(tokens, target_len, tables.pad_id),
            "segment_ids": padded(segments.astype(np.int32), target_len),
            "positions": padded(positions, target_len),
            "labels": padded(targets.astype(np.int32), target_len, tables.pad_id),
            "weights": padded(np.ones(len(targets), np.float32), target_len),
        }

    def loss(self, outputs: Any, batch: dict) -> tuple[tuple, dict]:
        """((total, weight), metrics) over the decoder's labels: loss, nll, accuracy."""
        total, metrics = label_cross_entropy(
            outputs,
            batch,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            chunk_tokens=self.chunk_tokens,
        )
        return total, {"loss": total, **metrics}


Text = tuple[np.ndarray, np.ndarray]  # tokens and segment_ids, each (n,)


def with_end(tokens: np.ndarray, segment_ids: np.ndarray, tables: TokenTables) -> Text:
    """A text with [eos] at its end, which belongs to its last document (to the first, if there is no text)."""
    if len(tokens) and tokens[-1] == tables.eos_id:
        return tokens, segment_ids
    last = segment_ids[-1] if len(segment_ids) else 1
    return np.append(tokens, tokens.dtype.type(tables.eos_id)), np.append(segment_ids, last)
