"""Which of a few answers is right: each is read after its question, and one score apiece is compared.

    tokens            [CLS] question [SEP] choice 1 [SEP] [CLS] question [SEP] choice 2 [SEP]
    segments            1       1      1      1       1     2       2      2      2       2
    example_positions   ^                                   ^
    example_labels      0                                   1                                   (the second is right)

A record is one feature, so its choices are always in one batch; they do not see each other. Records may have different
numbers of choices. The softmax over choices is that of Radford et al. 2018, section 3.3, and of SWAG (arXiv:1808.05326).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.tasks.base import Feature, Layout, Metrics, fit_lengths, real_weights, share
from jaxlm.tasks.segments import check_usable, make_segments

# The score of what is not a choice: finite, so that an empty slot has no NaN in its gradient.
NEVER = -1e9


class MultipleChoice:
    """A question and its choices to the number of the right one, from 0."""

    kind = "sequence_classification"
    best_metric = "accuracy"
    text_fields = ("question",)  # what text augmentation may change

    def __init__(self, tokenizer: Any, layout: Layout, fitted: Mapping[str, Any]):
        self.tokenizer, self.layout = tokenizer, layout

    @staticmethod
    def infer(records: Sequence[Any]) -> dict[str, Any]:
        """Nothing is learned from the training rows: choices are texts and have no fixed set."""
        return {"labels": []}

    @property
    def head(self) -> dict[str, Any]:
        """One number for each choice."""
        return {"num_classes": 1}

    def problem(self, record: Any, training: bool) -> str:
        """Why a record cannot be used, or ''."""
        question, choices = _texts(record)
        if not choices:
            return "there are no choices"
        fixed = len(choices) * self._overhead(question)
        if fixed >= self.layout.seq_len:
            return (
                f"{len(choices)} choices need more than {fixed} tokens in one row: seq_len is "
                f"{self.layout.seq_len}"
            )
        if not training:
            return ""
        if len(choices) < 2:
            return "there is one choice only"
        if empty := [str(i) for i, choice in enumerate(choices) if not choice.strip()]:
            return f"choice {', '.join(empty)} is empty (counted from 0)"
        label = record.fields.get("label")
        if label is None or label == "":
            return "the label is missing"
        if _right_choice(record) is None:
            return f"label {label!r} is not the number of a choice, 0 to {len(choices) - 1}"
        return ""

    def features(self, record: Any) -> tuple[list[Feature], bool]:
        """One feature with a segment and a slot for each choice; and whether text was cut."""
        check_usable(self, record)
        question, choices = _texts(record)
        ids = self.tokenizer.encode_batch([question, *choices] if question else choices)
        asked, answers = (ids[0], ids[1:]) if question else (ids[0][:0], ids)
        room = self.layout.seq_len - len(answers) * self._overhead(question)
        asked_length, lengths = share_room(len(asked), [len(a) for a in answers], room)
        laid = []
        for answer, length in zip(answers, lengths, strict=True):
            texts = [asked[:asked_length], answer[:length]] if question else [answer[:length]]
            laid.append(self.layout.lay(*texts))
        right = _right_choice(record)
        feature = make_segments(
            laid,
            example_labels=np.array([i == right for i in range(len(laid))], np.int32),
            example_weights=np.full(len(laid), right is not None, np.float32),
        )
        cut = asked_length < len(asked) or lengths != [len(a) for a in answers]
        return [feature], cut

    def _overhead(self, question: str) -> int:
        """How many tokens of a choice's sequence are not text."""
        return self.layout.seq_len - self.layout.room(2 if question else 1)

    def loss(
        self, outputs: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """-log p of the right choice, summed over records, and how many records; metrics: loss, accuracy."""
        log_probs_BE = choice_log_probs(outputs.head_logits[..., 0], batch["example_ids"])
        weights_BE = real_weights(batch) * batch["example_labels"]
        loss = -(log_probs_BE * weights_BE).sum(), weights_BE.sum()
        best_BE = _is_best(log_probs_BE, batch["example_ids"])
        return loss, {"loss": loss, "accuracy": share(best_BE, weights_BE)}

    def predict(self, outputs: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """slot_scores (B, E): log-probabilities among the choices of one record."""
        return {"slot_scores": choice_log_probs(outputs.head_logits[..., 0], batch["example_ids"])}

    def decode(
        self, record: Any, features: Sequence[Feature], outputs: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, Any]:
        """The number of the choice that scores best, and the probabilities of all."""
        scores = np.asarray(outputs[0]["slot_scores"], np.float64)
        return {"label": int(scores.argmax()), "probabilities": np.exp(scores).tolist()}

    def scores(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> dict[str, float]:
        """accuracy: a label that names no choice counts as wrong."""
        return {"accuracy": float(np.mean(_hits(records, predictions)))}

    def report(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> str:
        """Accuracy against chance, and by the place of the right choice, which shows a liking for one place."""
        hits = _hits(records, predictions)
        chance = np.mean([1 / len(record.fields["choices"]) for record in records])
        lines = [
            f"{len(records)} records, accuracy by chance {chance:.4f}",
            "right choice   records   accuracy   chosen",
        ]
        places = [_right_choice(record) for record in records]
        chosen = Counter(prediction["label"] for prediction in predictions)
        for place in sorted({p for p in places if p is not None} | set(chosen)):
            of_place = hits[[p == place for p in places]]
            accuracy = f"{of_place.mean():.4f}" if len(of_place) else "-"
            lines.append(f"{place:12d}   {len(of_place):7d}   {accuracy:>8}   {chosen[place]:6d}")
        return "\n".join(lines)

    def confusion(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> None:
        """None: the places of choices are no classes."""
        return None


def share_room(question: int, choices: list[int], room: int) -> tuple[int, list[int]]:
    """(tokens of the question before each choice, tokens of each choice) that together are at most `room`.

    The question gives way first, by as much before every choice, for the choices are what differs; then the longest
    choices do.
    """
    question = min(question, max(0, room - sum(choices)) // len(choices))
    return question, fit_lengths(choices, room)


def choice_log_probs(scores_BE: jax.Array, ids_BE: jax.Array) -> jax.Array:
    """log p (B, E) of each slot among the slots of its row that have its id; empty slots have the id -1."""
    same_BEE = ids_BE[:, :, None] == ids_BE[:, None, :]
    rivals_BEE = jnp.where(same_BEE, scores_BE.astype(jnp.float32)[:, None, :], NEVER)
    return scores_BE - jax.nn.logsumexp(rivals_BEE, axis=-1)


def _is_best(scores_BE: jax.Array, ids_BE: jax.Array) -> jax.Array:
    """(B, E) bool: nothing of the same record has a higher score, or as high a one further in front, as in argmax."""
    theirs_B1E, ours_BE1 = scores_BE[:, None, :], scores_BE[:, :, None]
    number_E = jnp.arange(scores_BE.shape[1])
    in_front_1EE = (number_E[None, :] < number_E[:, None])[None]
    beaten_BEE = (theirs_B1E > ours_BE1) | ((theirs_B1E == ours_BE1) & in_front_1EE)
    same_BEE = ids_BE[:, :, None] == ids_BE[:, None, :]
    return ~(beaten_BEE & same_BEE).any(-1)


def _texts(record: Any) -> tuple[str, list[str]]:
    """The question, '' if it is blank, and the choices."""
    question = str(record.fields.get("question") or "")
    choices = record.fields.get("choices")
    return question if question.strip() else "", [
        str(c or "") for c in (choices if choices is not None else ())
    ]


def _right_choice(record: Any) -> int | None:
    """The number of the right choice, None where the record does not say, or names none."""
    label = record.fields.get("label")
    if not isinstance(label, int | np.integer) or isinstance(label, bool):
        return None
    return int(label) if 0 <= label < len(record.fields["choices"]) else None


def _hits(records: Sequence[Any], predictions: Sequence[Mapping]) -> np.ndarray:
    """(records,) bool."""
    pairs = zip(records, predictions, strict=True)
    return np.array([_right_choice(record) == said["label"] for record, said in pairs], bool)
