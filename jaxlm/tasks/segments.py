"""Several sequences as one feature, each of them a segment of its own: they share a batch and do not see each other.

tokens             [CLS] a a [SEP] [CLS] b [SEP]
segments             1   1 1   1     2   2   2
example_positions    ^               ^
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.tasks.base import Feature, Laid


def make_segments(parts: Sequence[Laid], **keys: Any) -> Feature:
    """A feature with a slot for each part, read where the part's layout says; keys: what else the task says, (m, ...)."""
    lengths = [len(part.tokens) for part in parts]
    starts = np.cumsum([0, *lengths[:-1]])
    return {
        "tokens": np.concatenate([part.tokens for part in parts]),
        "token_types": np.concatenate([part.token_types for part in parts]),
        "segments": np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), lengths),
        "example_positions": (starts + [part.pool_position for part in parts]).astype(np.int32),
        **{key: np.asarray(value) for key, value in keys.items()},
    }


def check_usable(task: Any, record: Any) -> None:
    """Raises ValueError for a record of which no feature can be made, be it for prediction only."""
    if why := task.problem(record, training=False):
        raise ValueError(why)
