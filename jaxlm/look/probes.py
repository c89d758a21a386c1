"""Linear probes: from which layer's states can a linear classifier read a label? (arXiv:1610.01644)

The same classifier is also trained to tell shuffled labels, which the states cannot know: what it gains over those, its
selectivity, is not the classifier's own doing (arXiv:1909.03368).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from jaxlm import api
from jaxlm.inference.internals import pooled_states
from jaxlm.language_model import BadInput, LanguageModel

TEST_SHARE = 0.25
LEAST_OF_A_LABEL = 4


@dataclass(frozen=True, eq=False)
class Probe:
    """Accuracies on held-out texts, in [0, 1].

    accuracies, controls: (L + 1,), of the embeddings and then of each layer; controls with shuffled labels.
    majority: of always naming the commonest label. num_train, num_test: texts. labels: in the order of their names.
    """

    accuracies: np.ndarray
    controls: np.ndarray
    majority: float
    num_train: int
    num_test: int
    labels: tuple[str, ...]


def probe(
    lm: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    pooling: str = "",
    seed: int = 0,
) -> Probe:
    """Trains a logistic regression on each layer's pooled states; a stratified quarter of the texts judges it.

    >>> lm = load(workdir)
    >>> found = probe(lm, ["import os", "def f(x):"] * 8, ["import", "def"] * 8)
    >>> found.accuracies.shape, found.labels
    ((3,), ('def', 'import'))

    pooling: as in `api.embed`. seed: of the split and of the shuffled labels. Texts that are too long are cut.

    Raises:
      BadInput: for a family that has no vectors, labels that are not as many as the texts, fewer than two labels, or a label
        of fewer than four texts.
    """
    check_labels(texts, labels)
    return probe_states(layer_states(lm, texts, pooling), labels, seed)


def layer_states(lm: LanguageModel, texts: Sequence[str], pooling: str = "") -> np.ndarray:
    """Float32 (L + 1, n, D): of each text the embeddings and then each layer's states, pooled as in `api.embed`."""
    rows, where = api.rows_to_embed(lm, texts, pooling, cut=True)
    read = lm.in_mesh(pooled_states)
    return read(lm.model, lm.params, rows, pooling=where, max_len=lm.max_len)


def check_labels(texts: Sequence[str] | np.ndarray, labels: Sequence[str]) -> None:
    """Raises BadInput unless there is a label for each text, two kinds or more, and each often enough to be held out."""
    names, counts = np.unique(np.asarray(labels, str), return_counts=True)
    if len(labels) != len(texts) or len(names) < 2 or counts.min() < LEAST_OF_A_LABEL:
        raise BadInput(
            f"found {len(texts)} texts, {len(labels)} labels of {len(names)} kinds, the rarest "
            f"{counts.min(initial=len(texts))} times; expected a label for each text, two kinds or more, each "
            f"{LEAST_OF_A_LABEL} times or more"
        )


def probe_states(states: np.ndarray, labels: Sequence[str], seed: int = 0) -> Probe:
    """The same of states that are at hand: (L + 1, n, D) and n labels."""
    check_labels(states[0], labels)
    from sklearn.model_selection import train_test_split

    names, label_N = np.unique(np.asarray(labels, str), return_inverse=True)
    train, test = train_test_split(
        np.arange(len(label_N)), test_size=TEST_SHARE, random_state=seed, stratify=label_N
    )
    shuffled_N = np.random.default_rng(seed).permutation(label_N)
    score = lambda layer_ND, gold_N: fit_and_score(layer_ND, gold_N, train, test)
    return Probe(
        accuracies=np.array([score(layer_ND, label_N) for layer_ND in states]),
        controls=np.array([score(layer_ND, shuffled_N) for layer_ND in states]),
        majority=float((label_N[test] == np.bincount(label_N[train]).argmax()).mean()),
        num_train=len(train),
        num_test=len(test),
        labels=tuple(map(str, names)),
    )


def fit_and_score(
    layer_ND: np.ndarray, gold_N: np.ndarray, train: np.ndarray, test: np.ndarray
) -> float:
    """Accuracy on `test` of a logistic regression of standardised states, trained on `train` (indices)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(gold_N[train])) < 2:  # of shuffled labels
        return float((gold_N[test] == gold_N[train][0]).mean())
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return float(classifier.fit(layer_ND[train], gold_N[train]).score(layer_ND[test], gold_N[test]))


def draw_probe(found: Probe) -> Figure:
    """Accuracy over the layers, 0 being the embeddings, with shuffled labels' and the commonest label's beside it."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    layers = np.arange(len(found.accuracies))
    axes.plot(layers, found.accuracies, marker="o", label="probe")
    axes.plot(layers, found.controls, marker="o", alpha=0.5, label="probe of shuffled labels")
    axes.axhline(found.majority, color="gray", linestyle="--", label="commonest label")
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel(f"accuracy on {found.num_test} held-out texts")
    axes.set_ylim(0, 1.02)
    axes.set_xticks(layers)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
