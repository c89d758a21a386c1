"""UL2: a mixture of denoisers, each with a token that says which one it is."""

import dataclasses
from typing import Any

import numpy as np

from jaxlm.objectives.prefix_lm import Seq2SeqPrefixLM
from jaxlm.objectives.seq2seq import Seq2Seq
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.objectives.tables import padded
from jaxlm.objectives.window import Window

# Mode tokens, as sentinels from the end: short spans (R), what follows (S), long spans or many (X).
R, S, X = 3, 2, 1

# (mode, mean span, noise density) of table 1 of the paper; S has one span, which ends the text.
DENOISERS = (
    (R, 3.0, 0.15),
    (R, 8.0, 0.15),
    (S, 0.0, 0.25),
    (X, 3.0, 0.5),
    (X, 8.0, 0.5),
    (X, 64.0, 0.15),
    (X, 64.0, 0.5),
)


@dataclasses.dataclass(frozen=True, eq=False)
class UL2(Seq2Seq):
    """A row is corrupted by one of seven denoisers, all equally likely (Tay et al. 2022, arXiv:2205.05131, section 3.1).

        raw      [bos] the cat sat on the mat and slept [eos]
        R        encoder_tokens  [R] the <0> on the mat and slept [eos]         few tokens in short spans
                 labels          <0> cat sat [eos]
        S        encoder_tokens  [S] the cat sat on the mat                     the end is predicted
                 labels          and slept [eos]
        X        encoder_tokens  [X] the <0> on <1> slept [eos]                 many tokens, or long spans
                 labels          <0> cat sat <1> the mat and [eos]

    [R], [S] and [X] are the tokenizer's last three sentinels; each document of a row begins with one. Rows and sentinels
    are those of `SpanCorruption` and, for S, of `Seq2SeqPrefixLM`; a denoiser that reads less than the window reads a
    random stretch of it. Options: see `Seq2Seq`.
    """

    parts: tuple[Seq2Seq, ...] = dataclasses.field(init=False, repr=False)

    def find_problems(self) -> list[str]:
        """A mode from outside."""
        return [f"mode {self.mode}: expected 0, as UL2 has its own"] if self.mode else []

    def __post_init__(self, tokenizer: Any) -> None:
        super().__post_init__(tokenizer)
        make = lambda mode, span, rate: (
            Seq2SeqPrefixLM(tokenizer, self.decoder_start, mode, rate=rate)
            if mode == S
            else SpanCorruption(
                tokenizer, self.decoder_start, mode, noise_density=rate, mean_span=span
            )
        )
        object.__setattr__(self, "parts", tuple(make(*denoiser) for denoiser in DENOISERS))

    def window(self, seq_len: int) -> Window:
        """The longest of the denoisers' windows. Raises ValueError where the tokenizer lacks sentinels."""
        length = max(part.window(seq_len).length for part in self.parts)
        return Window(length=length, stride=length)

    def target_len(self, seq_len: int) -> int:
        """The longest of the denoisers' targets."""
        return max(part.target_len(seq_len) for part in self.parts)

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example of at most `window(seq_len).length` tokens; see the picture."""
        part = self.parts[rng.integers(len(self.parts))]
        example = crop(rng, example, part.window(seq_len).length)
        row = part.corrupt(rng, example, seq_len)
        return widened(row, seq_len, self.target_len(seq_len), self.tables.pad_id)


def crop(rng: np.random.Generator, example: dict, length: int) -> dict:
    """A random stretch of at most `length` tokens of an example, its segments counted from 1."""
    start = int(rng.integers(max(0, len(example["tokens"]) - length) + 1))
    part = {key: value[start : start + length] for key, value in example.items()}
    if start and len(part["tokens"]):
        part["segment_ids"] = part["segment_ids"] - part["segment_ids"][0] + 1
    return part


def widened(row: dict, seq_len: int, target_len: int, pad_id: int) -> dict:
    """A row whose arrays are filled up: those of the encoder to `seq_len`, the others to `target_len`."""
    fills = {"tokens": pad_id, "labels": pad_id, "encoder_tokens": pad_id}
    return {
        key: padded(
            value,
            seq_len if key.startswith("encoder_") else target_len,
            fills.get(key, 0),
        )
        for key, value in row.items()
    }
