"""A label for a text or a pair of texts: one of several classes, any number of them, or a number.

text [, text_pair] ──▶ [CLS] text [SEP] text_pair [SEP] ──▶ vector at [CLS], or the mean ──▶ head ──▶ C logits
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.tasks import scores
from jaxlm.tasks.base import (
    Feature,
    Layout,
    Metrics,
    make_feature,
    real_weights,
    share,
    softmax_cross_entropy,
)

PROBLEMS = ("single_label", "multi_label", "regression")
POOLINGS = ("", "mean")


class SequenceClassification:
    """Texts or pairs of texts to classes or a number.

    problem: 'single_label' (softmax), 'multi_label' (a sigmoid for each class, which is said from one half on) or
      'regression' (squared error).
    label_smoothing: of the single label, see `softmax_cross_entropy`.
    class_weights: '' or 'balanced': an example weighs in inverse proportion to its class's frequency in the training rows.
    pooling: '', the head that the model's family has (BERT: dense and tanh at [CLS]), or 'mean', a matrix on the mean of
      all tokens, which suits models that were trained so (sentence embeddings); `transformers` has no class for it.
    """

    kind = "sequence_classification"
    text_fields = ("text", "text_pair")  # what text augmentation may change

    def __init__(
        self,
        tokenizer: Any,
        layout: Layout,
        fitted: Mapping[str, Any],
        *,
        problem: str = "single_label",
        label_smoothing: float = 0.0,
        class_weights: str = "",
        pooling: str = "",
    ):
        self.tokenizer, self.layout = tokenizer, layout
        self.labels, self.weights = tuple(fitted["labels"]), tuple(fitted["class_weights"])
        self.ids = {label: index for index, label in enumerate(self.labels)}
        self.problem_type, self.label_smoothing = problem, label_smoothing
        self.pooling = pooling
        self.best_metric = "spearman" if problem == "regression" else "f1_macro"
        if problem == "single_label":
            self.best_metric = "accuracy"

    @staticmethod
    def infer(
        records: Sequence[Any],
        *,
        problem: str = "single_label",
        class_weights: str = "",
        pooling: str = "",
        **other: Any,
    ) -> dict[str, Any]:
        """The classes of the training rows, sorted, and the weight of each.

        Raises:
          ValueError: with everything that is wrong with the options or the labels.
        """
        problems = []
        if problem not in PROBLEMS:
            problems.append(f"task.problem={problem!r}: use one of {', '.join(PROBLEMS)}")
        for name, value, known in (
            ("class_weights", class_weights, ("", "balanced")),
            ("pooling", pooling, POOLINGS),
        ):
            if value not in known:
                problems.append(f"task.{name}={value!r}: use {' or '.join(map(repr, known))}")
        if class_weights and problem != "single_label":
            problems.append(f"task.class_weights={class_weights!r} needs problem 'single_label'")
        counts: Counter[str] = Counter()
        if problem != "regression":
            for record in records:
                label = record.fields["label"]
                counts.update(label if problem == "multi_label" else [label])
            if len(counts) < (1 if problem == "multi_label" else 2):
                problems.append(f"found the labels {sorted(counts)}: expected two or more")
        if problems:
            raise ValueError("sequence classification:\n  " + "\n  ".join(problems))
        labels = sorted(counts)
        mean = counts.total() / max(1, len(labels))
        weights = [mean / counts[label] if class_weights else 1.0 for label in labels]
        return {"labels": labels, "class_weights": weights}

    @property
    def head(self) -> dict[str, Any]:
        """A number for each class, or one."""
        mean = {"pooling": "mean", "transform": "", "use_norm": False} if self.pooling else {}
        return {"num_classes": len(self.labels) or 1, **mean}

    def problem(self, record: Any, training: bool) -> str:
        """Why a record cannot be used, or ''."""
        fields = record.fields
        if not training:
            return ""
        if not str(fields.get("text") or "").strip():
            return "the text is empty"
        label = fields.get("label")
        if label is None or label == "":
            return "the label is missing"
        if self.problem_type == "regression":
            return ""
        unknown = sorted(
            set(label if self.problem_type == "multi_label" else [label]) - set(self.ids)
        )
        return f"unknown label {', '.join(map(repr, unknown))}" if unknown else ""

    def features(self, record: Any) -> tuple[list[Feature], bool]:
        """One feature with one slot; example_labels: int32 (1,), of several classes float32 (1, C), a number's (1,)."""
        fields = record.fields
        texts = [fields["text"]] + ([fields["text_pair"]] if "text_pair" in fields else [])
        laid = self.layout.lay(*self.tokenizer.encode_batch([text or "" for text in texts]))
        target, weight = self._target(fields.get("label"))
        return [
            make_feature(laid, example_labels=[target], example_weights=[weight])
        ], laid.truncated

    def _target(self, label: Any) -> tuple[Any, np.float32]:
        """The label as the loss wants it, and its weight: 0 where there is none that the training rows know."""
        if self.problem_type == "regression":
            return np.float32(label or 0.0), np.float32(label is not None)
        if self.problem_type == "multi_label":
            hot = np.zeros(len(self.labels), np.float32)
            hot[[self.ids[one] for one in label or () if one in self.ids]] = 1
            return hot, np.float32(label is not None)
        if label not in self.ids:
            return np.int32(0), np.float32(0)
        return np.int32(self.ids[label]), np.float32(self.weights[self.ids[label]])

    def loss(
        self, outputs: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """The summed loss of all examples and their summed weight; metrics: loss, and accuracy of the single label."""
        logits_BEC, labels, weights_BE = (
            outputs.head_logits,
            batch["example_labels"],
            real_weights(batch),
        )
        if self.problem_type == "regression":
            squared_BE = jnp.square(logits_BEC[..., 0] - labels)
            loss = (squared_BE * weights_BE).sum(), weights_BE.sum()
            return loss, {"loss": loss}
        if self.problem_type == "multi_label":
            # -log sigmoid(x) of what is so and -log sigmoid(-x) of what is not, the mean over the classes
            signs_BEC = 2 * labels - 1
            loss_BE = -jax.nn.log_sigmoid(signs_BEC * logits_BEC).mean(-1)
            loss = (loss_BE * weights_BE).sum(), weights_BE.sum()
            return loss, {"loss": loss}
        loss = softmax_cross_entropy(logits_BEC, labels, weights_BE, self.label_smoothing)
        return loss, {"loss": loss, "accuracy": share(logits_BEC.argmax(-1) == labels, weights_BE)}

    def predict(self, outputs: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """slot_scores (B, E, C): probabilities, or the number itself."""
        activate = {
            "single_label": jax.nn.softmax,
            "multi_label": jax.nn.sigmoid,
            "regression": lambda x: x,
        }[self.problem_type]
        return {"slot_scores": activate(outputs.head_logits)}

    def decode(
        self, record: Any, features: Sequence[Feature], outputs: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, Any]:
        """The label, or labels, with the probability of each; or the number."""
        values = outputs[0]["slot_scores"][0]
        if self.problem_type == "regression":
            return {"score": float(values[0])}
        probabilities = {label: float(p) for label, p in zip(self.labels, values, strict=True)}
        if self.problem_type == "multi_label":
            said = [label for label, p in probabilities.items() if p >= 0.5]
        else:
            said = self.labels[int(values.argmax())]
        return {"label": said, "probabilities": probabilities}

    def scores(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> dict[str, float]:
        """Those of the problem's kind; see `jaxlm.tasks.scores`."""
        gold = [record.fields["label"] for record in records]
        if self.problem_type == "regression":
            return scores.regression_scores(gold, [p["score"] for p in predictions])
        said = [p["label"] for p in predictions]
        if self.problem_type == "multi_label":
            return scores.multi_label_scores(self._hot(gold), self._hot(said), self._unknown(gold))
        return scores.classification_scores(self._ids(gold), self._ids(said), self.labels)

    def report(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> str:
        """Precision, recall and F1 of each class; nothing for numbers."""
        gold = [record.fields["label"] for record in records]
        if self.problem_type == "regression":
            return ""
        said = [p["label"] for p in predictions]
        if self.problem_type == "multi_label":
            unknown = self._unknown(gold)
            return scores.multi_label_report(self._hot(gold), self._hot(said), self.labels, unknown)
        return scores.classification_report(self._ids(gold), self._ids(said), self.labels)

    def confusion(
        self, records: Sequence[Any], predictions: Sequence[Mapping]
    ) -> np.ndarray | None:
        """Counts (C, C), gold in rows; rows with labels that training does not know are left out. None: there is no such table."""
        if self.problem_type != "single_label":
            return None
        table = np.zeros((len(self.labels), len(self.labels)), np.int64)
        for gold, said in zip(
            self._ids([r.fields["label"] for r in records]),
            self._ids([p["label"] for p in predictions]),
            strict=True,
        ):
            if gold >= 0:
                table[gold, said] += 1
        return table

    def _ids(self, labels: Sequence[str]) -> np.ndarray:
        return np.array([self.ids.get(label, -1) for label in labels], np.int64)

    def _hot(self, labels: Sequence[Sequence[str]]) -> np.ndarray:
        """(rows, C) 0 or 1."""
        return np.array([[name in row for name in self.labels] for row in labels], np.int64)

    def _unknown(self, labels: Sequence[Sequence[str]]) -> list[int]:
        """How many labels of each row training does not know; none of them can be predicted."""
        return [len(set(row) - set(self.ids)) for row in labels]
