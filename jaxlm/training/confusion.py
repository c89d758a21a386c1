"""A picture of a confusion matrix: which classes a classifier takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxlm.files import as_path
from jaxlm.training.plots import save_figure

if TYPE_CHECKING:  # imported where something is drawn, as in `plots`
    from matplotlib.figure import Figure

# Up to so many classes, cells have their counts; and up to so many, rows and columns have names.
MAX_COUNTS = 20
MAX_NAMES = 40
_MAX_NAME = 28


def plot_confusion(counts: np.ndarray, names: Sequence[str], path: str | Path) -> Path:
    """Writes `draw_confusion` of counts (C, C) as a PNG, in one piece or not at all; returns its path."""
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = draw_confusion(counts, names)
    save_figure(figure, path)
    return path


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Gold classes in rows, predicted ones in columns; the colour is the share of the row.

    With more than 20 classes the cells have no counts, with more than 40 the axes no names. The colour scale is the
    square root, or a hundred rare confusions beside a strong diagonal would all be white.

    counts: (C, C), not negative; an example of class g taken for p counts at [g, p]. names: of the C classes.

    Raises:
      ValueError: counts and names do not fit each other.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts = np.asarray(counts)
    size = len(names)
    if counts.shape != (size, size) or not size or counts.min() < 0:
        raise ValueError(
            f"confusion picture: found counts of the shape {counts.shape} for {size} names; expected a square table"
            " of counts >= 0 with a row and a column for each name"
        )
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.4 + (0.62 * size if size <= MAX_COUNTS else 0.3 * min(size, MAX_NAMES))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the gold class", shrink=0.8)
    right = np.trace(counts) / max(1, counts.sum())
    axes.set_title(
        f"{size} classes, {counts.sum():,} examples, {right:.1%} right", fontsize="medium"
    )
    axes.set_ylabel("gold")
    axes.set_xlabel("predicted")
    if size <= MAX_NAMES:
        _write_names(axes, names)
    if size <= MAX_COUNTS:
        _write_counts(axes, counts, shares)
    return figure


def _write_names(axes, names: Sequence[str]) -> None:
    short = [n if len(n) <= _MAX_NAME else n[: _MAX_NAME - 1] + "…" for n in map(str, names)]
    # parse_math: a label may have dollar signs.
    style = {"fontsize": "small", "parse_math": False}
    axes.set_yticks(range(len(short)), short, **style)
    axes.set_xticks(
        range(len(short)), short, rotation=45, ha="right", rotation_mode="anchor", **style
    )


def _write_counts(axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.4 else "black"
            axes.text(
                column, row, f"{count:,}", ha="center", va="center", color=color, fontsize="small"
            )
