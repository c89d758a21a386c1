"""What tasks share whose predictions are texts: the loss of the right ones, and how written ones are judged.

A model that writes is a language model still: it has no head, and learns to give the right next token. Evaluation asks for
the loss of the right texts; a report also has the model write its own, which are compared with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.tasks.base import Feature, Metrics
from jaxlm.tasks.text_scores import TEXT_SCORES


@dataclass(frozen=True)
class Writer:
    """What a task must know of the model that is to write.

    family: a key of MODELS. seq_len: tokens of a row; of an encoder-decoder, of the encoder's. prefix: the ids that
    stand before a text. start_id: what an encoder-decoder's decoder begins with. template: a dialogue's, see `chat`.
    cross_entropy: `objectives.losses.cross_entropy`.
    """

    family: str
    seq_len: int
    prefix: tuple[int, ...] = ()
    start_id: int = 0
    template: str = ""
    cross_entropy: Callable[..., Any] | None = None

    @property
    def has_encoder(self) -> bool:
        """Whether the source is read by an encoder, and only the answer is in the decoder's row."""
        return self.family == "encoder_decoder"


class WritingTask:
    """The parts of such a task that do not depend on what its records are.

    target_len: tokens of a written text at most, its end counted. label_smoothing: see `cross_entropy`.
    metrics: names of `text_scores.TEXT_SCORES` with + between, '' for none.

    A subclass has `features` and `prompt`, and says `reference`: the right texts of a record, none for one without a label.
    """

    writes = True
    families: tuple[str, ...] = ()
    text_fields = ()
    labels: tuple[str, ...] = ()
    head = None
    best_metric = "nll"

    def __init__(
        self,
        tokenizer: Any,
        writer: Writer,
        fitted: Mapping[str, Any],
        *,
        target_len: int,
        label_smoothing: float = 0.0,
        metrics: str = "",
    ):
        self.tokenizer, self.writer = tokenizer, writer
        self.target_len, self.label_smoothing = target_len, label_smoothing
        self.metrics = tuple(filter(None, metrics.split("+")))
        self.end_id = tokenizer.eos_id
        problems = []
        if writer.family not in self.families:
            problems.append(
                f"found a model of the family {writer.family!r}: {self.kind} takes {' or '.join(self.families)}"
            )
        if unknown := [name for name in self.metrics if name not in TEXT_SCORES]:
            problems.append(
                f"task.metrics={metrics!r}: {', '.join(unknown)} is unknown; use some of {', '.join(TEXT_SCORES)}, with + "
                "between them"
            )
        if not 1 <= target_len < writer.seq_len and not writer.has_encoder:
            problems.append(
                f"task.target_len={target_len}: expected 1 to seq_len - 1, which is {writer.seq_len - 1}"
            )
        if problems:
            raise ValueError(f"{self.kind}:\n  " + "\n  ".join(problems))

    @staticmethod
    def infer(records: Sequence[Any], **options: Any) -> dict[str, Any]:
        """Nothing is learned from the training rows."""
        return {"labels": []}

    def reference(self, record: Any) -> list[str]:
        """The texts that would be right; [] where none is known."""
        raise NotImplementedError

    def is_labelled(self, record: Any) -> bool:
        """Whether a record has a reference."""
        return bool(self.reference(record))

    def loss(
        self, outputs: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """The summed loss of the tokens that are to be written, and their number; metrics: loss, nll and accuracy."""
        loss, metrics = self.writer.cross_entropy(
            outputs.hidden,
            outputs.unembed,
            batch["labels"],
            batch["weights"],
            bias_V=outputs.unembed_bias,
            softcap=outputs.softcap,
            label_smoothing=self.label_smoothing,
        )
        return loss, {"loss": loss, **metrics}

    def predict(self, outputs: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Nothing: what a record is answered with is written token by token, see `jaxlm.tuning.writing`."""
        return {}

    def decode(
        self, record: Any, features: Sequence[Feature], outputs: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, Any]:
        """Nothing: texts are written after the pass that gives the loss."""
        return {}

    def scores(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> dict[str, float]:
        """The metrics of the records that have a written text."""
        texts, references = self._written(records, predictions)
        found: dict[str, float] = {}
        for name in self.metrics if texts else ():
            found |= TEXT_SCORES[name](texts, references)
        return found

    def report(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> str:
        """The first few texts beside the right ones."""
        texts, references = self._written(records, predictions)
        pairs = zip(texts[:3], references[:3], strict=True)
        return "\n".join(f"  wrote     {text!r}\n  expected  {right[0]!r}" for text, right in pairs)

    def _written(
        self, records: Sequence[Any], predictions: Sequence[Mapping]
    ) -> tuple[list[str], list[list[str]]]:
        pairs = [(r, p) for r, p in zip(records, predictions, strict=True) if "text" in p]
        return [p["text"] for _, p in pairs], [self.reference(r) for r, _ in pairs]


def next_tokens(ids: np.ndarray, is_target: np.ndarray) -> Feature:
    """A sequence (n,) to learn from, of which the tokens where `is_target` are to be predicted:

    ids        <bos>  q   q  <sep>  a   a  <eos>
    is_target    0    0   0    0    1   1    1
    tokens     <bos>  q   q  <sep>  a   a             all but the last one
    labels       q    q  <sep>  a   a  <eos>          what comes next
    weights      0    0   0     1   1    1            is it to be predicted?
    """
    return {
        "tokens": ids[:-1].astype(np.int32),
        "labels": ids[1:].astype(np.int32),
        "weights": is_target[1:].astype(np.float32),
    }
