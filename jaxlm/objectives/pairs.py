"""Sentence pairs joint with masked language modelling: next sentence (BERT), order (ALBERT)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.objectives.mlm import MaskedLM
from jaxlm.objectives.window import Window


@dataclasses.dataclass(frozen=True, eq=False)
class NextSentence(MaskedLM):
    """Masked language modelling, and is B what follows A? (BERT: Devlin et al. 2019, section 3.1)

        raw            [bos]  it    is   late   go   home  [eos]      T - 3 tokens of one document
        tokens         [cls]  it    is   late  [sep]  go   home  [sep]
        token_types      0     0     0     0     0     1     1     1
        segment_ids      1     1     1     1     1     1     1     1     the pair attends to itself
        example_labels   0 = B follows A, 1 = B is from another document; at position 0, [cls]

    A document's window is cut at a random sentence start. Half of the time B comes from a random
    sentence start of another document instead. A window without a sentence start inside is all A,
    and its pair weighs nothing. (Masks, smoothing and so on: see `MaskedLM`.)
    """

    def window(self, seq_len: int) -> Window:
        """Room is left for [cls] and two [sep]; a window is of one document."""
        size = seq_len - 3
        return Window(size, size, within_document=True, pair=True, sentences=True)

    def corrupt(self, rng: np.random.Generator, example: dict, seq_len: int) -> dict:
        """The row of a pair, and its label; see the picture."""
        first, second, label, weight = self._pair(rng, example, seq_len)
        cls, sep = [self.tables.cls_id], [self.tables.sep_id]
        parts = [cls, first, sep] + ([second, sep] if len(second) else [])
        tokens = np.concatenate(parts)
        row = self._masked(rng, tokens, np.ones(len(tokens), np.int32), seq_len)
        token_types = np.zeros(seq_len, np.int32)
        token_types[len(first) + 2 : len(tokens)] = 1
        return {
            **row,
            "token_types": token_types,
            "example_positions": np.zeros(1, np.int32),
            "example_labels": np.array([label], np.int32),
            "example_weights": np.array([weight], np.float32),
        }

    def _pair(self, rng: np.random.Generator, example: dict, seq_len: int) -> tuple:
        """(A, B, label, weight); A and B together are at most T - 3 tokens."""
        first, second = self._cut(rng, example)
        if not len(second) or rng.random() < 0.5:
            return first, second, 0, float(len(second) > 0)
        other, starts = self._text(example["other"])
        begin = rng.choice(np.flatnonzero(starts)) if starts.any() else 0
        other = other[begin:][: seq_len - 3 - len(first)]
        return first, other, 1, float(len(other) > 0)

    def _cut(self, rng: np.random.Generator, example: dict) -> tuple[np.ndarray, np.ndarray]:
        """The text before and from a random inner sentence start; without one, all and nothing."""
        text, starts = self._text(example)
        inner = np.flatnonzero(starts[1:]) + 1
        cut = int(rng.choice(inner)) if len(inner) else len(text)
        return text[:cut], text[cut:]

    def _text(self, example: dict) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, sentence starts) without the document's own [bos] and [eos]."""
        tokens, starts = example["tokens"], example["sentence_starts"]
        low = int(len(tokens) > 0 and tokens[0] == self.tables.bos_id)
        high = len(tokens) - int(len(tokens) > low and tokens[-1] == self.tables.eos_id)
        return tokens[low:high], starts[low:high]

    def loss(self, outputs: Any, batch: dict) -> tuple[tuple, dict]:
        """((total, weight), metrics): the mean masked loss plus the mean pair loss.

        A row's pair loss weighs as much as its masked positions together, so that both means share
        one denominator and no regrouping of rows changes the loss.
        """
        (total, weight), metrics = super().loss(outputs, batch)
        log_probs_BEC = jax.nn.log_softmax(outputs.pair_logits.astype(jnp.float32))
        labels_BE = batch["example_labels"]
        nll_BE = -jnp.take_along_axis(log_probs_BEC, labels_BE[..., None], axis=-1)[..., 0]
        correct_BE = log_probs_BEC.argmax(-1) == labels_BE
        weights_BE = batch["example_weights"]
        row_weights_BE = weights_BE * batch["weights"].sum(-1, keepdims=True)
        joint = (total + (nll_BE * row_weights_BE).sum(), weight)
        return joint, {
            **metrics,
            "mlm_loss": metrics["loss"],
            "loss": joint,
            "pair_loss": ((nll_BE * weights_BE).sum(), weights_BE.sum()),
            "pair_accuracy": ((correct_BE * weights_BE).sum(), weights_BE.sum()),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceOrder(NextSentence):
    """Masked language modelling, and are the halves swapped? (ALBERT: Lan et al. 2020, section 3.1)

        raw            [bos]  it    is   late   go   home  [eos]      T - 3 tokens of one document
        tokens         [cls]  go   home  [sep]  it    is   late  [sep]      half of the time; else as they stand
        token_types      0     0     0     0     1     1     1     1
        example_labels   1 = the half that comes second stands first, 0 = as in the text

    Everything else: see `NextSentence`.
    """

    def window(self, seq_len: int) -> Window:
        """As for next sentences, but nothing from another document."""
        return super().window(seq_len)._replace(pair=False)

    def _pair(self, rng: np.random.Generator, example: dict, seq_len: int) -> tuple:
        first, second = self._cut(rng, example)
        if not len(second) or rng.random() < 0.5:
            return first, second, 0, float(len(second) > 0)
        return second, first, 1, 1.0
