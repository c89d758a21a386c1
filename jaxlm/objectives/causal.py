"""Causal language modelling: every token is predicted from those before it in its document."""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxlm.objectives.losses import label_cross_entropy
from jaxlm.objectives.tables import TokenTables, padded
from jaxlm.objectives.window import Window


@dataclasses.dataclass(frozen=True, eq=False)
class CausalLM:
    """Next-token prediction over packed documents.

        raw          [bos]  the   cat  [eos] [bos]   a    dog     T + 1 tokens, stride T
        tokens       [bos]  the   cat  [eos] [bos]   a
        labels        the   cat  [eos] [bos]   a    dog
        weights        1     1     1     0     1     1            no label crosses documents
        segment_ids    1     1     1     1     2     2
        positions      0     1     2     3     0     1

    The last raw token is the next example's first, so every token but a document's [bos] is a
    label exactly once.

    tokenizer: gives ids and the UTF-8 bytes of each id, for bits per byte; not kept.
    z_loss, label_smoothing, chunk_tokens: see `cross_entropy`.
    """

    tokenizer: dataclasses.InitVar[Any]
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk_tokens: int = 0
    tables: TokenTables = dataclasses.field(init=False, repr=False)

    static: ClassVar[bool] = True  # nothing random
    families: ClassVar[tuple[str, ...]] = ("gpt",)

    def __post_init__(self, tokenizer: Any) -> None:
        object.__setattr__(self, "tables", TokenTables.of(tokenizer))

    def window(self, seq_len: int) -> Window:
        """One token more than it predicts from."""
        return Window(length=seq_len + 1, stride=seq_len)

    def num_predictions(self, seq_len: int) -> int:
        """Positions of a row that go through the vocabulary matrix."""
        return seq_len

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of an example of at most T + 1 tokens, each array (T,); see the picture."""
        del rng
        raw, segments = example["tokens"], example["segment_ids"]
        same_document = segments[1:] == segments[:-1]
        return {
            "tokens": padded(raw[:-1], seq_len, self.tables.pad_id),
            "segment_ids": padded(segments[:-1], seq_len),
            "positions": padded(example["positions"][:-1], seq_len),
            "labels": padded(raw[1:], seq_len, self.tables.pad_id),
            "weights": padded(same_document.astype(np.float32), seq_len),
        }

    def loss(self, outputs: Any, batch: dict) -> tuple[tuple, dict]:
        """((total, weight), metrics): loss, nll, accuracy, and bits per UTF-8 byte of text."""
        (total, weight), metrics = label_cross_entropy(
            outputs,
            batch,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            chunk_tokens=self.chunk_tokens,
        )
        bytes_BT = jnp.asarray(self.tables.num_bytes)[batch["labels"]] * (batch["weights"] > 0)
        bits = metrics["nll"][0] / math.log(2)
        return (total, weight), {
            "loss": (total, weight),
            **metrics,
            "bits_per_byte": (bits, bytes_BT.sum().astype(jnp.float32)),
        }
