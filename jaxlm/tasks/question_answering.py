"""The answer to a question as a span of its context, or none: SQuAD v1.1 and v2 (arXiv:1606.05250, arXiv:1806.03822).

    context         Ada Lovelace wrote notes on the engine in Paris.
    tokens          [CLS] who wrote it ? [SEP] ada love ##lace wrote notes [SEP]           a window of the context
    example_start_positions                    ^ 6
    example_end_positions                               ^ 8                                both are of the answer
    example_positions ^ 0: where the head says that there is no answer here, as start and as end

A context that is too long is cut into windows, each behind the question, one feature each. A window's first token is
`doc_stride` tokens behind that of the one before, so windows overlap; one that does not have the whole answer has none.
A decoder says that there is no answer at its last <eos>, the only token that has read everything. Loss and combination
of windows: arXiv:1810.04805, sections 4.2 and 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.tasks import squad_scores
from jaxlm.tasks.base import Feature, Laid, Layout, Metrics, make_feature, real_weights, share

NEVER = -1e9  # the logit of a token of another feature: finite, so that an empty slot has no NaN in its gradient
NO_ANSWER = ""


class Window(NamedTuple):
    """A part of the context behind the question.

    start: where the context's tokens begin in laid.tokens. first: the number of the first of them in the whole context.
    spans: int (n, 2), the characters of each of them.
    """

    laid: Laid
    start: int
    first: int
    spans: np.ndarray


class Candidate(NamedTuple):
    """An answer [start, end) in characters of the context. score: log p(start) + log p(end) in its window."""

    score: float
    start: int
    end: int


class QuestionAnswering:
    """Questions and contexts to spans. See the module's docstring.

    doc_stride: tokens from the start of a window to the start of the next, at most half a window, so that an answer up to
      that length is whole in one of them.
    max_question_len: the tokens of a question; longer ones are cut.
    max_answer_len: the tokens of an answer that may be predicted.
    n_best: how many answers a prediction lists.
    no_answer_threshold: a question has no answer if the score of none is that much above the best answer's. Only where the
      training data has such questions. Scores name the threshold that is best on the data scored.
    """

    kind = "question_answering"
    best_metric = "f1"

    def __init__(
        self,
        tokenizer: Any,
        layout: Layout,
        fitted: Mapping[str, Any],
        *,
        doc_stride: int = 128,
        max_question_len: int = 64,
        max_answer_len: int = 30,
        n_best: int = 20,
        no_answer_threshold: float = 0.0,
    ):
        if layout.room(2) < 8:
            raise ValueError(
                f"seq_len {layout.seq_len} has no room for a question and its context: set 128 or more"
            )
        self.tokenizer, self.layout = tokenizer, layout
        self.has_unanswerable = bool(fitted["has_unanswerable"])
        self.doc_stride, self.max_answer_len, self.n_best = doc_stride, max_answer_len, n_best
        self.max_question_len = min(max_question_len, layout.room(2) // 2)
        self.no_answer_threshold = no_answer_threshold

    @staticmethod
    def infer(
        records: Sequence[Any],
        *,
        doc_stride: int = 128,
        max_question_len: int = 64,
        max_answer_len: int = 30,
        n_best: int = 20,
        **other: Any,
    ) -> dict[str, Any]:
        """Whether some training questions have no answer (v2), so that such a prediction is possible.

        Raises:
          ValueError: with every option that is not above 0.
        """
        sizes = dict(
            doc_stride=doc_stride,
            max_question_len=max_question_len,
            max_answer_len=max_answer_len,
            n_best=n_best,
        )
        problems = [f"task.{name}={n}: use 1 or more" for name, n in sizes.items() if n < 1]
        if problems:
            raise ValueError("question answering:\n  " + "\n  ".join(problems))
        unanswerable = [record for record in records if record.fields.get("answers") == []]
        return {"labels": [], "has_unanswerable": bool(unanswerable)}

    @property
    def head(self) -> dict[str, Any]:
        """Two numbers for each token: does the answer start, and end, there?"""
        return {"num_classes": 2}

    def problem(self, record: Any, training: bool) -> str:
        """Why a record cannot be used, or ''."""
        if not training:
            return ""
        question, context, answers = _texts(record)
        if not question.strip() or not context.strip():
            return f"the {'context' if question.strip() else 'question'} is empty"
        if answers is None:
            return "the answers are missing"
        for answer in answers[:1]:
            text, start = answer["text"], answer["start"]
            if not text.strip():
                return (
                    "the answer is empty; a question without an answer has an empty list of answers"
                )
            if start < 0 or not context.startswith(text, start):
                return f"the answer {text[:40]!r} is not at character {start} of its context"
        return ""

    def features(self, record: Any) -> tuple[list[Feature], bool]:
        """A feature for each window, with the first answer; truncated: whether the question is cut."""
        question, context, answers = _texts(record)
        windows, spans, truncated = self._windows(question, context)
        answer = find_answer(spans, answers[0]) if answers else None
        # Nothing is learned where the answer is not known, or only of characters that the tokenizer drops.
        weight = np.float32(answers == [] or answer is not None)
        features = []
        for window in windows:
            first, last = place_answer(window, answer)
            features.append(
                make_feature(
                    window.laid,
                    example_start_positions=np.array([first], np.int32),
                    example_end_positions=np.array([last], np.int32),
                    example_weights=np.array([weight]),
                )
            )
        return features, truncated

    def _windows(self, question: str, context: str) -> tuple[list[Window], np.ndarray, bool]:
        """The windows, the characters of all tokens of the context, and whether the question is cut."""
        question_ids = self.tokenizer.encode(question)
        ids, spans = self.tokenizer.encode_with_offsets(context)
        kept = question_ids[: self.max_question_len]
        room = self.layout.room(2) - len(kept)
        windows = []
        for first in window_starts(len(ids), room, self.doc_stride):
            laid = self.layout.lay(kept, ids[first : first + room])
            windows.append(Window(laid, laid.starts[1], first, spans[first : first + room]))
        return windows, spans, len(kept) < len(question_ids)

    def loss(
        self, outputs: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """The summed mean of -log p(start) and -log p(end) of all windows, and their number.

        Metrics: loss; accuracy, the share of windows with both ends right.
        """
        log_probs_BT2, own_BET = span_log_probs(outputs.head_logits, batch), own_tokens(batch)
        losses, rights = [], []
        for side, key in enumerate(("example_start_positions", "example_end_positions")):
            log_probs_BT, places_BE = log_probs_BT2[..., side], batch[key]
            losses.append(-jnp.take_along_axis(log_probs_BT, places_BE, axis=1))
            best_BE = jnp.where(own_BET, log_probs_BT[:, None], NEVER).argmax(-1)
            rights.append(best_BE == places_BE)
        weights_BE = real_weights(batch)
        loss = (sum(losses) / 2 * weights_BE).sum(), weights_BE.sum()
        return loss, {"loss": loss, "accuracy": share(rights[0] & rights[1], weights_BE)}

    def predict(self, outputs: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """token_log_probs (B, T, 2): of each token as start and as end of the answer, among all tokens of its feature."""
        return {"token_log_probs": span_log_probs(outputs.head_logits, batch)}

    def decode(
        self, record: Any, features: Sequence[Feature], outputs: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, Any]:
        """answer ('' = none), start and end (characters of the context), probability, n_best (a list of the same), and,
        where there may be no answer, no_answer_score: log p(none) - log p(best answer), both of the best window."""
        question, context, _ = _texts(record)
        windows, _, _ = self._windows(question, context)
        scored = [
            (window, np.asarray(output["token_log_probs"], np.float64))
            for window, output in zip(windows, outputs, strict=True)
        ]
        best = best_candidates(scored, context, self.max_answer_len, self.n_best)
        listed = [_listed(candidate, context) for candidate in best]
        prediction = dict(listed[0] if listed else _listed(Candidate(NEVER, 0, 0), ""))
        if "id" in record.fields:
            prediction = {"id": record.fields["id"], **prediction}
        if self.has_unanswerable:
            # The window that is least sure that there is no answer decides, as in BERT's script for v2.
            none = min(float(scores_n2[w.laid.pool_position].sum()) for w, scores_n2 in scored)
            score = none - (best[0].score if best else NEVER)
            prediction |= {"no_answer_score": score, "best_answer": prediction["answer"]}
            if score > self.no_answer_threshold:
                prediction |= {
                    "answer": NO_ANSWER,
                    "start": 0,
                    "end": 0,
                    "probability": float(np.exp(none)),
                }
        return prediction | {"n_best": listed}

    def scores(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> dict[str, float]:
        """exact_match and f1; with unanswerable questions also those of both kinds, and the best threshold's."""
        gold = [[answer["text"] for answer in record.fields["answers"]] for record in records]
        found = squad_scores.squad_scores(gold, [p["answer"] for p in predictions])
        if not self.has_unanswerable or all(gold):
            return found
        kept = [p["best_answer"] for p in predictions]
        none = [p["no_answer_score"] for p in predictions]
        searched = squad_scores.squad_scores(gold, kept, none)
        best = {name: value for name, value in searched.items() if name.startswith("best_")}
        return found | {"no_answer_threshold": self.no_answer_threshold} | best

    def report(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> str:
        """Some of the questions that were answered wrong."""
        lines = []
        for record, prediction in zip(records, predictions, strict=True):
            answers = [answer["text"] for answer in record.fields["answers"]]
            if squad_scores.answer_scores(answers, prediction["answer"])[1] == 0:
                gold, said = (answers or ["no answer"])[0], prediction["answer"] or "no answer"
                lines.append(f"  {_texts(record)[0][:70]}  {gold[:40]!r} -> {said[:40]!r}")
        return "\n".join(
            [f"without a word of the answer: {len(lines)} of {len(records)}", *lines[:10]]
        )

    def confusion(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> None:
        """None: there are no classes."""
        return None


def _texts(record: Any) -> tuple[str, str, list[dict[str, Any]] | None]:
    """Question, context and answers; None where it is not known whether there are any."""
    fields = record.fields
    return fields.get("question") or "", fields.get("context") or "", fields.get("answers")


def window_starts(length: int, room: int, stride: int) -> range:
    """Where windows of `room` (2 or more) of `length` tokens begin: `stride` apart, but no more than half a window."""
    step = min(stride, room // 2)
    return range(0, max(1, length - room + step), step)


def find_answer(spans_n2: np.ndarray, answer: Mapping[str, Any]) -> tuple[int, int] | None:
    """The numbers of the answer's first and last token in its context, by their characters (n, 2); None if no token is of it.

    A token of which a part is in the answer is in it as a whole.
    """
    text = answer["text"]
    begin, end = trim(text, 0, len(text))
    begin, end = answer["start"] + begin, answer["start"] + end
    touching = np.flatnonzero((spans_n2[:, 1] > begin) & (spans_n2[:, 0] < end))
    return (int(touching[0]), int(touching[-1])) if len(touching) else None


def place_answer(window: Window, answer: tuple[int, int] | None) -> tuple[int, int]:
    """Where the window has the answer in laid.tokens; where it says that there is none, if it has not all of it."""
    if answer and window.first <= answer[0] and answer[1] < window.first + len(window.spans):
        shift = window.start - window.first
        return answer[0] + shift, answer[1] + shift
    return window.laid.pool_position, window.laid.pool_position


def own_tokens(batch: Mapping[str, jax.Array]) -> jax.Array:
    """(B, E, T) bool: which tokens are of the feature in slot e; every feature has one slot and one segment, e + 1."""
    slots_E = jnp.arange(1, batch["example_ids"].shape[1] + 1)
    return batch["segment_ids"][:, None] == slots_E[None, :, None]


def span_log_probs(logits_BT2: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Log softmax over the tokens of each feature, for starts and for ends, float32 (B, T, 2)."""
    own_BET = own_tokens(batch)
    logits_BET2 = jnp.where(own_BET[..., None], logits_BT2[:, None].astype(jnp.float32), NEVER)
    normalizer_BE2 = jax.nn.logsumexp(logits_BET2, axis=2)
    slot_BT = jnp.clip(batch["segment_ids"] - 1, 0)
    return logits_BT2 - jnp.take_along_axis(normalizer_BE2, slot_BT[..., None], axis=1)


def best_candidates(
    scored: Sequence[tuple[Window, np.ndarray]], context: str, max_answer_len: int, count: int
) -> list[Candidate]:
    """The best `count` answers of different texts, best first, of all windows and their log probabilities (n, 2)."""
    found: list[Candidate] = []
    for window, log_probs_n2 in scored:
        context_part = log_probs_n2[window.start : window.start + len(window.spans)]
        for score, first, last in best_spans(context_part, max_answer_len, count):
            start, end = trim(context, int(window.spans[first, 0]), int(window.spans[last, 1]))
            if start < end:
                found.append(Candidate(score, start, end))
    different: dict[str, Candidate] = {}
    for candidate in sorted(found, key=lambda c: (-c.score, c.start, c.end)):
        different.setdefault(context[candidate.start : candidate.end], candidate)
    return list(different.values())[:count]


def best_spans(log_probs_n2: np.ndarray, longest: int, count: int) -> list[tuple[float, int, int]]:
    """(score, first, last) of the `count` best spans of 1 to `longest` tokens, last included: exact, not of best ends."""
    n = len(log_probs_n2)
    if not n:
        return []
    ends = np.concatenate([log_probs_n2[:, 1], np.full(longest - 1, -np.inf)])
    scores_nL = log_probs_n2[:, :1] + np.lib.stride_tricks.sliding_window_view(ends, longest)
    flat = scores_nL.ravel()
    best = np.argpartition(-flat, min(count, len(flat)) - 1)[:count]
    best = best[np.isfinite(flat[best])]
    return [(float(flat[i]), int(i // longest), int(i // longest + i % longest)) for i in best]


def trim(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without the spaces at its ends."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def _listed(candidate: Candidate, context: str) -> dict[str, Any]:
    return {
        "answer": context[candidate.start : candidate.end],
        "start": candidate.start,
        "end": candidate.end,
        "probability": float(np.exp(candidate.score)),
    }
