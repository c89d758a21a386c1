"""How near written texts are to the right ones: exact match, BLEU, chrF and ROUGE, each from its own library.

    TEXT_SCORES["rouge"](["the cat sat"], [["the cat sat down", "a cat sat"]])      {"rouge1": …, "rouge2": …, "rougeL": …}

Every score takes the texts (n,) and the references of each, one or more. The libraries are an extra: pip install
'jaxlm[eval]'.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

Texts = Sequence[str]
References = Sequence[Sequence[str]]
ROUGE = ("rouge1", "rouge2", "rougeL")


def exact_match(texts: Texts, references: References) -> dict[str, float]:
    """The share of texts that are one of their references, white space apart."""
    same = [
        " ".join(text.split()) in {" ".join(r.split()) for r in right}
        for text, right in zip(texts, references, strict=True)
    ]
    return {"exact_match": sum(same) / len(same)}


def bleu(texts: Texts, references: References) -> dict[str, float]:
    """sacreBLEU's corpus BLEU, 0 to 100 (Papineni et al. 2002; Post 2018, arXiv:1804.08771)."""
    score = _sacrebleu().corpus_bleu(list(texts), by_stream(references))
    return {"bleu": float(score.score)}


def chrf(texts: Texts, references: References) -> dict[str, float]:
    """sacreBLEU's chrF2, 0 to 100 (Popović 2015)."""
    score = _sacrebleu().corpus_chrf(list(texts), by_stream(references))
    return {"chrf": float(score.score)}


def rouge(texts: Texts, references: References) -> dict[str, float]:
    """The means of rouge-score's ROUGE-1, -2 and -L, 0 to 1: F1 with stemming, of the best reference (Lin 2004)."""
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(ROUGE, use_stemmer=True)
    found = [
        scorer.score_multi(list(right), text) for text, right in zip(texts, references, strict=True)
    ]
    return {name: sum(one[name].fmeasure for one in found) / len(found) for name in ROUGE}


TEXT_SCORES: dict[str, Callable[[Texts, References], dict[str, float]]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
}


def by_stream(references: References) -> list[list[str | None]]:
    """sacreBLEU's way: the first reference of every text, then the second, …; None where a text has fewer."""
    most = max(map(len, references))
    return [[r[i] if i < len(r) else None for r in references] for i in range(most)]


def _sacrebleu() -> Any:
    return _library("sacrebleu")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name.partition('.')[0]} is not installed, which computes this score: pip install 'jaxlm[eval]', "
            "or take it out of task.metrics"
        ) from error
