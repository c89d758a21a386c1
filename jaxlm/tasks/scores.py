"""Scores and printed reports, from labels and predictions: scikit-learn, scipy and seqeval, each imported when needed.

Scores are floats by name, fractions rather than percent, and never NaN. Where a score is not defined (a ratio of
nothing, the correlation of a constant) it is 0.0, as in the libraries' own convention, and no warning is printed.
"""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.tasks import tags

UNKNOWN = "(unknown label)"
_MAX_NAME = 40


def classification_scores(
    gold: Sequence[int], predicted: Sequence[int], names: Sequence[str]
) -> dict[str, float]:
    """Scores of one of C classes per example.

    gold: ids 0..C-1, or -1 where the label is none of `names`: never right, and one more class in the macro means.
    predicted: ids 0..C-1. names: the C classes.

    Returns:
      accuracy; f1_micro, which is the accuracy where each example has one class; f1_macro, precision_macro and
      recall_macro, means over the classes that occur in gold or predictions (scikit-learn's default); mcc, Matthews'
      correlation for C classes (0 if all is one class).

    Raises:
      ValueError: different lengths, no examples or ids out of range.
    """
    from sklearn import metrics

    gold_N, predicted_N = _class_ids(gold, predicted, len(names))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        gold_N, predicted_N, average="macro", zero_division=0
    )
    is_constant = len(np.union1d(gold_N, predicted_N)) == 1  # of which scikit-learn would warn
    return {
        "accuracy": float(metrics.accuracy_score(gold_N, predicted_N)),
        "f1_micro": float(metrics.f1_score(gold_N, predicted_N, average="micro", zero_division=0)),
        "f1_macro": float(f1),
        "precision_macro": float(precision),
        "recall_macro": float(recall),
        "mcc": 0.0 if is_constant else float(metrics.matthews_corrcoef(gold_N, predicted_N)),
    }


def multi_label_scores(
    gold: Any, predicted: Any, unknown: Sequence[int] | None = None
) -> dict[str, float]:
    """Scores of any number of C classes per example.

    gold, predicted: (N, C) of 0 and 1. unknown: (N,) how many gold labels of an example are none of the C classes;
    they are one class more, which is never predicted.

    Returns:
      accuracy, of whole sets; f1_micro, precision_micro and recall_micro, over all decisions; f1_macro, the mean over
      all classes, those without examples and predictions as 0 (scikit-learn's default).
    """
    from sklearn import metrics

    gold_NC, predicted_NC, classes = _indicators(gold, predicted, unknown)
    micro = metrics.precision_recall_fscore_support(
        gold_NC, predicted_NC, labels=classes, average="micro", zero_division=0
    )
    f1_macro = metrics.f1_score(
        gold_NC, predicted_NC, labels=classes, average="macro", zero_division=0
    )
    return {
        "accuracy": float(metrics.accuracy_score(gold_NC, predicted_NC)),
        "f1_micro": float(micro[2]),
        "f1_macro": float(f1_macro),
        "precision_micro": float(micro[0]),
        "recall_micro": float(micro[1]),
    }


def regression_scores(gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """pearson and spearman, 0.0 where one side is constant or there are fewer than two examples, and mse.

    Raises:
      ValueError: different lengths, no examples or a number that is not finite.
    """
    from scipy import stats

    gold_N, predicted_N = np.asarray(gold, np.float64), np.asarray(predicted, np.float64)
    problems = _length_problems(gold_N, predicted_N)
    for side, values in (("gold", gold_N), ("predicted", predicted_N)):
        if bad := int((~np.isfinite(values)).sum()):
            problems.append(f"{bad} {side} numbers are not finite: correct the file, or the run")
    _raise("regression scores", problems)

    def correlation(function) -> float:
        if min(np.ptp(gold_N), np.ptp(predicted_N)) == 0:
            return 0.0
        with warnings.catch_warnings():
            # Constant but for rounding: scipy warns, and what it returns is noise or NaN.
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            value = float(function(gold_N, predicted_N).statistic)
        return value if math.isfinite(value) else 0.0

    return {
        "pearson": correlation(stats.pearsonr),
        "spearman": correlation(stats.spearmanr),
        "mse": float(np.square(gold_N - predicted_N).mean()),
    }


def semeval_scores(
    gold: Sequence[str], predicted: Sequence[str], other: str = "Other"
) -> dict[str, float]:
    """The official scores of SemEval-2010 Task 8: relations with their direction taken into account.

    gold, predicted: 'Cause-Effect(e1,e2)', 'Cause-Effect(e2,e1)', …, and `other`, which is no relation.

        gold                  predicted
        Cause-Effect(e1,e2)   Cause-Effect(e1,e2)   right
        Cause-Effect(e1,e2)   Cause-Effect(e2,e1)   wrong: one more of both predicted and gold Cause-Effect
        Cause-Effect(e1,e2)   Other                 wrong: one more gold Cause-Effect
        Other                 Cause-Effect(e2,e1)   wrong: one more predicted Cause-Effect

    Precision and recall of a relation are right / predicted and right / gold, both directions together; the macro
    means are over the relations in gold, without `other` (scorer v1.2, its '(9+1)-way evaluation taking
    directionality into account'; Hendrickx et al., SemEval 2010).

    Returns:
      semeval_f1 (the official macro-F1), semeval_precision and semeval_recall (macro), semeval_f1_micro.
    """
    _raise("relation scores", _length_problems(gold, predicted))
    in_gold, in_predicted = Counter(map(_relation, gold)), Counter(map(_relation, predicted))
    right = Counter(_relation(g) for g, p in zip(gold, predicted, strict=True) if g == p)
    relations = sorted(in_gold.keys() - {other})
    counts = np.array([(right[r], in_predicted[r], in_gold[r]) for r in relations]).reshape(-1, 3)
    precision, recall, f1 = _precision_recall_f1(*counts.T)
    count = max(1, len(relations))
    return {
        "semeval_f1": float(f1.sum() / count),
        "semeval_precision": float(precision.sum() / count),
        "semeval_recall": float(recall.sum() / count),
        "semeval_f1_micro": float(_precision_recall_f1(*counts.sum(0))[2]),
    }


def entity_scores(
    gold: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    *,
    strict: bool = False,
    scheme: str = "",
) -> dict[str, float]:
    """Micro precision, recall and F1 of whole entities, right where first word, last word and kind are.

    gold, predicted: the tags of each sentence, one for each word, in any scheme of `tags.SCHEMES`; what is no tag of
    an entity is outside of all.
    strict: False reads as conlleval does, where I after O begins an entity too (`tags.tags_to_spans`); True counts
    only entities that are well-formed in `scheme` ('' = what the tags look like).

    Returns:
      entity_precision, entity_recall, entity_f1: 0.0 if there is nothing to find, also if nothing is found (seqeval,
      conlleval); token_accuracy, the share of words whose tag is right.

    Raises:
      ValueError: different lengths, no sentences, or strict and a tag that `scheme` does not have.
    """
    from seqeval import metrics

    arguments = _seqeval_arguments(gold, predicted, strict, scheme)
    return {
        "entity_precision": float(metrics.precision_score(**arguments)),
        "entity_recall": float(metrics.recall_score(**arguments)),
        "entity_f1": float(metrics.f1_score(**arguments)),
        "token_accuracy": token_accuracy(gold, predicted),
    }


def token_accuracy(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """The share of words whose tag is right; 0.0 without words. Lengths as for `entity_scores`."""
    _check_sentences(gold, predicted)
    right = [g == p for row in zip(gold, predicted, strict=True) for g, p in zip(*row, strict=True)]
    return sum(right) / max(1, len(right))


def retrieval_ranks(similarities: Any, gold: Sequence[int]) -> np.ndarray:
    """For each query, the rank (1 = first) of its right candidate among all: int64 (Q,).

    similarities: (Q, C), larger = nearer. gold: (Q,) the right candidate's column.
    Candidates as near as the right one, or NaN, count as before it: who cannot tell candidates apart ranks last.
    """
    similarities_QC, gold_Q = np.asarray(similarities), np.asarray(gold)
    right_Q1 = np.take_along_axis(similarities_QC, gold_Q[:, None], axis=1)
    return (~(similarities_QC < right_Q1)).sum(1)


def retrieval_scores(ranks: Sequence[int]) -> dict[str, float]:
    """recall_at_1, recall_at_5 and recall_at_10, the share of ranks at most k, and mrr, the mean of 1 / rank.

    ranks: of each query's right candidate, from 1 (see `retrieval_ranks`).
    """
    ranks_Q = np.asarray(ranks)
    if not len(ranks_Q) or ranks_Q.min() < 1:
        raise ValueError("retrieval scores: expected one rank or more, counted from 1")
    recalls = {f"recall_at_{k}": float((ranks_Q <= k).mean()) for k in (1, 5, 10)}
    return recalls | {"mrr": float((1 / ranks_Q).mean())}


def classification_report(
    gold: Sequence[int], predicted: Sequence[int], names: Sequence[str]
) -> str:
    """Precision, recall, F1 and support of each class that occurs, their means, and the ten most confused pairs.

    Arguments as for `classification_scores`; the macro mean is its f1_macro.
    """
    from sklearn import metrics

    gold_N, predicted_N = _class_ids(gold, predicted, len(names))
    present = np.union1d(gold_N, predicted_N)
    table = metrics.classification_report(
        gold_N,
        predicted_N,
        labels=present,
        target_names=[_name(names, i) for i in present],
        digits=3,
        zero_division=0,
    )
    lines = _tidy(table)
    if absent := [_name(names, i) for i in range(len(names)) if i not in set(present.tolist())]:
        text = f"without examples and predictions ({len(absent)}): {', '.join(absent)}"
        lines += textwrap.wrap(text, 100, subsequent_indent="  ", break_on_hyphens=False)
    pairs = confused_pairs(gold_N, predicted_N)
    if pairs:
        lines += ["", "most confused:", f"{'count':>7} {'of gold':>8}  gold -> predicted"]
    for g, p, count in pairs:
        share = count / (gold_N == g).sum()
        lines.append(f"{count:>7} {share:>8.1%}  {_name(names, g)} -> {_name(names, p)}")
    return "\n".join(lines)


def confused_pairs(
    gold: Sequence[int], predicted: Sequence[int], limit: int = 10
) -> list[tuple[int, int, int]]:
    """The most frequent (gold, predicted, count) with different ids; equals in the order of the ids."""
    pairs = zip(np.asarray(gold).tolist(), np.asarray(predicted).tolist(), strict=True)
    counts = Counter((g, p) for g, p in pairs if g != p)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(g, p, count) for (g, p), count in ordered[:limit]]


def multi_label_report(
    gold: Any, predicted: Any, names: Sequence[str], unknown: Sequence[int] | None = None
) -> str:
    """Precision, recall, F1 and support of every class, and their means. Arguments as for `multi_label_scores`."""
    from sklearn import metrics

    gold_NC, predicted_NC, classes = _indicators(gold, predicted, unknown)
    table = metrics.classification_report(
        gold_NC,
        predicted_NC,
        labels=classes,
        target_names=[_name(names, i if i < len(names) else -1) for i in classes],
        digits=3,
        zero_division=0,
    )
    return "\n".join(_tidy(table))


def entity_report(
    gold: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    *,
    strict: bool = False,
    scheme: str = "",
) -> str:
    """Precision, recall, F1 and support of each kind of entity, and their means. Arguments as for `entity_scores`."""
    from seqeval import metrics

    arguments = _seqeval_arguments(gold, predicted, strict, scheme)
    if not len(metrics.f1_score(average=None, **arguments)):
        return "no entities, neither in the data nor predicted"
    return "\n".join(_tidy(metrics.classification_report(digits=3, **arguments)))


def _class_ids(gold: Any, predicted: Any, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    gold_N, predicted_N = np.asarray(gold), np.asarray(predicted)
    problems = _length_problems(gold_N, predicted_N)
    for side, ids, lowest in (("gold", gold_N, -1), ("predicted", predicted_N, 0)):
        bad = sorted({i for i in ids.tolist() if i not in range(lowest, num_classes)})
        if bad:
            problems.append(f"{side} ids {bad[:10]}: expected {lowest} to {num_classes - 1}")
    _raise("classification scores", problems)
    return gold_N, predicted_N


def _indicators(
    gold: Any, predicted: Any, unknown: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Both sides with a last column of the unknown labels, and the columns that count: it does if there are any.

    The column also keeps scikit-learn from reading a single class as a choice between two.
    """
    gold_NC, predicted_NC = np.asarray(gold), np.asarray(predicted)
    unknown_N = np.zeros(len(gold_NC), bool) if unknown is None else np.asarray(unknown) > 0
    problems = _length_problems(gold_NC, predicted_NC)
    if gold_NC.ndim != 2 or gold_NC.shape != predicted_NC.shape or len(unknown_N) != len(gold_NC):
        problems.append(
            f"gold {gold_NC.shape}, predicted {predicted_NC.shape}, unknown {unknown_N.shape}:"
            " expected (N, C), (N, C) and (N,)"
        )
    if not np.isin(gold_NC, (0, 1)).all() or not np.isin(predicted_NC, (0, 1)).all():
        problems.append("expected nothing but 0 and 1")
    _raise("multi-label scores", problems)
    classes = list(range(gold_NC.shape[1] + unknown_N.any()))
    none_N1 = np.zeros((len(gold_NC), 1), np.int64)
    return np.hstack([gold_NC, unknown_N[:, None]]), np.hstack([predicted_NC, none_N1]), classes


def _relation(label: str) -> str:
    return re.sub(r"\(e[12],e[12]\)$", "", label)


def _precision_recall_f1(right: Any, predicted: Any, gold: Any) -> np.ndarray:
    """Of counts, elementwise; 0 where a denominator is."""
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(gold, 1)
    return np.array([precision, recall, 2 * right / np.maximum(predicted + gold, 1)])


def _seqeval_arguments(gold: Any, predicted: Any, strict: bool, scheme: str) -> dict[str, Any]:
    _check_sentences(gold, predicted)
    arguments = {
        "y_true": _entity_tags(gold),
        "y_pred": _entity_tags(predicted),
        "zero_division": 0,
    }
    if strict:
        arguments |= {"mode": "strict", "scheme": _strict_scheme(gold, predicted, scheme)}
    return arguments


def _strict_scheme(gold: Any, predicted: Any, scheme: str) -> Any:
    """seqeval's class of a scheme, where every tag is of it."""
    from seqeval import scheme as schemes

    scheme = scheme or tags.detect_scheme([*gold, *predicted])
    allowed = {"O", *tags.SCHEMES.get(scheme, ())} | ({"B"} if scheme == "IOB1" else set())
    allowed = {tags.split_tag(prefix)[0] for prefix in allowed}
    used = {tag for side in (gold, predicted) for sentence in side for tag in sentence}
    foreign = sorted(tag for tag in used if tags.split_tag(tag)[0] not in allowed)
    problems = []
    if scheme not in (*tags.SCHEMES, tags.PLAIN):
        problems.append(f"scheme {scheme!r}: use one of {', '.join(tags.SCHEMES)}")
    elif foreign:
        problems.append(
            f"tags {foreign[:10]} are not of the scheme {scheme}: name their scheme, convert them"
            " (tags.convert_tags) or do without strict"
        )
    _raise("strict entity scores", problems)
    if scheme in ("BIOES", "BILOU"):
        return schemes.IOBES
    return schemes.IOB2 if scheme == "BIO" else schemes.IOB1


def _entity_tags(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """As seqeval reads them: BILOU as BIOES, O for what is no tag of an entity."""
    split = [[tags.split_tag(tag) for tag in sentence] for sentence in sentences]
    return [[p + "-" * bool(name) + name for p, name in sentence] for sentence in split]


def _check_sentences(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
    problems = _length_problems(gold, predicted)
    lengths = zip(map(len, gold), map(len, predicted), strict=False)
    bad = [f"sentence {i}: {g} and {p} tags" for i, (g, p) in enumerate(lengths) if g != p]
    if bad:
        problems.append(
            f"{len(bad)} sentences with different numbers of gold and predicted tags: {'; '.join(bad[:3])}"
        )
    _raise("scores of tags", problems)


def _length_problems(gold: Any, predicted: Any) -> list[str]:
    if len(gold) == len(predicted) > 0:
        return []
    return [f"found {len(gold)} gold and {len(predicted)} predicted: expected as many, and some"]


def _raise(what: str, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{what}:\n  " + "\n  ".join(problems))


def _name(names: Sequence[str], index: int) -> str:
    if index < 0:
        return UNKNOWN
    name = " ".join(str(names[index]).split())
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def _tidy(table: str) -> list[str]:
    return [line.rstrip() for line in table.splitlines() if line.strip()]
