"""Scores of extractive question answering by the rules of SQuAD v1.1 and v2.0 (arXiv:1606.05250, arXiv:1806.03822).

One set of rules serves both: v2.0's. They differ from v1.1's only for gold answers that are nothing but
articles and punctuation, which v2.0 leaves out.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation, then without English articles, single spaces between words.

    'The  cat-flap, an' -> 'catflap'. The order is the official one: 'a.b' is 'ab' and no article.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, prediction: str) -> float:
    """1.0 if both are equal after `normalize`, else 0.0."""
    return float(normalize(answer) == normalize(prediction))


def word_f1(answer: str, prediction: str) -> float:
    """F1 of the bags of normalised words, 0 to 1; if one is empty, whether the other is, too."""
    gold, said = normalize(answer).split(), normalize(prediction).split()
    if not gold or not said:
        return float(gold == said)
    common = (Counter(gold) & Counter(said)).total()
    return 2 * common / (len(gold) + len(said))


def answer_scores(answers: Sequence[str], prediction: str) -> tuple[float, float]:
    """(exact match, F1) against the gold answer that suits best; without answers, '' is right."""
    gold = [answer for answer in answers if normalize(answer)] or [""]
    return (
        max(exact_match(answer, prediction) for answer in gold),
        max(word_f1(answer, prediction) for answer in gold),
    )


class Threshold(NamedTuple):
    """The best mean score and the threshold that gives it: answer unless the no-answer score is above."""

    score: float
    threshold: float


def best_threshold(
    kept: Sequence[float], answerable: Sequence[bool], no_answer_scores: Sequence[float]
) -> Threshold:
    """The threshold of the no-answer score that makes the mean score largest; the smallest of equals.

    A question whose no-answer score is above the threshold is left unanswered: right if it has no answer.

    kept: the score of each question's prediction, 0 to 1. answerable: whether it has an answer.
    no_answer_scores: any finite numbers; larger = rather no answer.

    As the official script does, but for two cases in which its threshold does not give its score: questions of
    equal no-answer score go together, and the threshold under which nothing is answered lies below all scores.
    """
    scores = np.asarray(no_answer_scores, np.float64)
    _check_threshold(len(kept), len(answerable), scores)
    unanswered = 1.0 - np.asarray(answerable, np.float64)
    order = np.argsort(scores, kind="stable")
    scores = scores[order]
    totals = unanswered.sum() + np.cumsum((np.asarray(kept, np.float64) - unanswered)[order])
    # Candidates: nothing answered, then everything up to the last question of each no-answer score.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    totals = np.concatenate([[unanswered.sum()], totals[ends]])
    thresholds = np.concatenate([[np.nextafter(scores[0], -math.inf)], scores[ends]])
    best = int(totals.argmax())
    return Threshold(float(totals[best] / len(scores)), float(thresholds[best]))


def squad_scores(
    answers: Sequence[Sequence[str]],
    predictions: Sequence[str],
    no_answer_scores: Sequence[float] | None = None,
) -> dict[str, float]:
    """Scores of questions in order, 0 to 1 (the official script prints percent).

    answers: each question's gold answers; none = the question has no answer.
    predictions: '' = no answer, so the threshold in use is already applied.
    no_answer_scores: larger = rather no answer. With it and some unanswerable question, `predictions` should be the
      best answer that is not empty, and the best threshold is searched for as well.

    Returns:
      exact_match, f1; if some questions have no answer, also answerable_exact_match, answerable_f1 and
      unanswerable_exact_match (of those that there are), and with no_answer_scores best_exact_match,
      best_exact_match_threshold, best_f1 and best_f1_threshold.

    Raises:
      ValueError: the lengths differ, there are no questions, or a no-answer score is not finite.
    """
    if not answers or len(answers) != len(predictions):
        raise ValueError(
            f"SQuAD scores: found {len(answers)} questions and {len(predictions)} predictions; expected one"
            " prediction for each question, and at least one question ('' is a prediction, too)"
        )
    pairs = zip(answers, predictions, strict=True)
    exact, f1 = np.array([answer_scores(gold, said) for gold, said in pairs]).T
    scores = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    answerable = np.array([bool(gold) for gold in answers])
    if answerable.all():
        return scores
    if answerable.any():
        scores["answerable_exact_match"] = float(exact[answerable].mean())
        scores["answerable_f1"] = float(f1[answerable].mean())
    scores["unanswerable_exact_match"] = float(exact[~answerable].mean())
    if no_answer_scores is not None:
        for name, kept in (("exact_match", exact), ("f1", f1)):
            best = best_threshold(kept, answerable, no_answer_scores)
            scores[f"best_{name}"], scores[f"best_{name}_threshold"] = best
    return scores


def _check_threshold(num_kept: int, num_answerable: int, scores: np.ndarray) -> None:
    problems = []
    if not num_kept == num_answerable == len(scores) > 0:
        problems.append(
            f"found {num_kept} scores, {num_answerable} answerable, {len(scores)} no-answer scores:"
            " expected one of each for every question, and at least one question"
        )
    if not np.isfinite(scores).all():
        problems.append(
            f"found {(~np.isfinite(scores)).sum()} no-answer scores that are no finite number"
        )
    if problems:
        raise ValueError("no-answer threshold:\n  " + "\n  ".join(problems))
