"""Simple augmentation of text for training: words that are left out, and neighbours that change places.

    the quick brown fox     dropout: the brown fox     swap: the brown quick fox     (arXiv:1901.11196, section 2)

Every draw of an example has its own random numbers, so an epoch sees the text otherwise than the one before, and the same
run again sees the same. There is no bigger file, and nothing is augmented in evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Feature = dict[str, np.ndarray]


@dataclass(frozen=True)
class Augmentation:
    """dropout: the chance of each word to be left out; one word always stays. swap: of each word to change places with
    the next; a word moves once.

    Raises:
      ValueError: for chances outside of 0 to 1, or a dropout of 1.
    """

    dropout: float = 0.0
    swap: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout}: expected 0 <= dropout < 1")
        if not 0 <= self.swap <= 1:
            problems.append(f"swap={self.swap}: expected 0 <= swap <= 1")
        if problems:
            raise ValueError("augmentation:\n  " + "\n  ".join(problems))

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return self.dropout > 0 or self.swap > 0

    def __call__(self, rng: np.random.Generator, text: str) -> str:
        """The text with words dropped and swapped; the white space in front of a word goes with its place."""
        parts = re.split(r"(\S+)", text)  # space, word, space, word, …, space
        words = parts[1::2]
        if len(words) < 2:
            return text
        keep = rng.random(len(words)) >= self.dropout
        if not keep.any():
            keep[rng.integers(len(words))] = True
        chances = rng.random(len(words))
        kept = [(space, word) for space, word, k in zip(parts[::2], words, keep, strict=False) if k]
        spaces, words = [space for space, _ in kept], [word for _, word in kept]
        index = 0
        while index + 1 < len(words):
            if chances[index] < self.swap:
                words[index : index + 2] = words[index + 1], words[index]
                index += 1
            index += 1
        spaces[0] = parts[0]
        return "".join(s + w for s, w in zip(spaces, words, strict=True)) + parts[-1]


class AugmentedFeatures:
    """The features of records, made again from changed texts for every draw.

    `augmented(i, rng)` is a feature that fits wherever features[i] does: as many slots and no more tokens (a text that
    happens to need more, because other pieces fit after a swap, stays as it was). So rows are planned from `features`.

    records: with `fields` and `_replace`. features: one for each record. names: of the texts to change, e.g. ('text',).
    make: what makes the features of a record, and whether it was cut: a task's `features`.
    """

    def __init__(
        self,
        records: Sequence[Any],
        features: Sequence[Feature],
        make: Callable[[Any], tuple[list[Feature], bool]],
        change: Augmentation,
        names: Sequence[str],
    ):
        if len(records) != len(features):
            raise ValueError(
                f"augmentation: found {len(features)} features of {len(records)} records; expected one of each, for a "
                "text that is cut into several cannot change"
            )
        self.records, self.features, self.make = records, features, make
        self.change, self.names = change, tuple(names)

    def __call__(self, index: int, rng: np.random.Generator) -> Feature:
        record, plain = self.records[index], self.features[index]
        (feature,), _ = self.make(record._replace(fields=self._changed(record.fields, rng)))
        return feature if len(feature["tokens"]) <= len(plain["tokens"]) else plain

    def _changed(self, fields: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        texts = {
            name: self.change(rng, fields[name])
            for name in self.names
            if isinstance(fields.get(name), str)
        }
        return {**fields, **texts}
