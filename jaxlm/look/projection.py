"""Vectors on a plane: principal components (Pearson 1901), of token embeddings or of whatever else has a vector."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from jaxlm.language_model import BadInput, LanguageModel
from jaxlm.look.attention import spell
from jaxlm.parallel.processes import fetch

MAX_NAMES = 200  # points that have their names beside them; of more, every other one or so


@dataclass(frozen=True, eq=False)
class Projection:
    """Points on a plane: float32 (n, 2), and which share of the variance each of its axes has (2,)."""

    points: np.ndarray
    shares: np.ndarray


def token_vectors(lm: LanguageModel, count: int = 300) -> tuple[tuple[str, ...], np.ndarray]:
    """(the first `count` tokens that can be printed, their embeddings float32 (n, table_dim)), specials left out.

    Most vocabularies have their commonest tokens first: byte-pair merges stand in the order they were made, after the
    characters; SentencePiece's unigrams by their probability.
    """
    if count < 2:
        raise BadInput(f"count={count}: expected 2 or more")
    special = set(lm.tokenizer.special_ids)
    is_text = lambda id: id not in special and is_printable(lm.tokenizer.decode([id]))
    ids = np.array([*itertools.islice(filter(is_text, range(lm.num_tokens)), count)], np.int32)
    table = lm.params["embed"]["embedding"]
    return spell(lm, ids), np.asarray(fetch(table[ids]), np.float32)


def is_printable(text: str) -> bool:
    """Whether something is seen of it: more than blanks, and no half of a character."""
    return bool(text.strip()) and text.strip().isprintable() and "\ufffd" not in text


def project(vectors: np.ndarray) -> Projection:
    """The two directions in which (n, D) vectors differ most, n and D from 2 on.

    Signs, which principal components leave open, are such that the entry of each direction farthest from 0 is positive.

    Raises:
      ValueError: vectors of another shape, or with values that are not finite.
    """
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2 or min(vectors.shape) < 2 or not np.isfinite(vectors).all():
        raise ValueError(
            f"found: vectors of the shape {vectors.shape}; expected: two or more finite ones of two or more numbers"
        )
    centred = vectors - vectors.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    first = directions[:2]
    first = first * np.sign(first[[0, 1], np.abs(first).argmax(1)])[:, None]
    total = max(float((sizes**2).sum()), np.finfo(float).tiny)
    return Projection((centred @ first.T).astype(np.float32), sizes[:2] ** 2 / total)


def draw_projection(
    projection: Projection, names: Sequence[str] = (), groups: Sequence[str] = ()
) -> Figure:
    """A dot for each point. names: of each, or none; some 200 are shown. groups: of each point, or none; each has a colour."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    axes = figure.subplots()
    groups = list(groups) or [""] * len(projection.points)
    colors = colormaps["tab10" if len(set(groups)) <= 10 else "tab20"]
    for index, group in enumerate(dict.fromkeys(groups)):
        x, y = projection.points[[g == group for g in groups]].T
        axes.scatter(x, y, s=12, color=colors(index % colors.N), label=group or None)
    if any(groups):
        figure.legend(fontsize="small", loc="outside right upper")
    every = max(1, -(-len(names) // MAX_NAMES))
    for name, (x, y) in list(zip(names, projection.points, strict=bool(names)))[::every]:
        axes.annotate(
            name, (x, y), (2, 2), textcoords="offset points", fontsize=7, parse_math=False
        )
    first, second = projection.shares
    axes.set_xlabel(f"first component, {first:.0%} of the variance")
    axes.set_ylabel(f"second component, {second:.0%}")
    axes.grid(alpha=0.3)
    return figure
