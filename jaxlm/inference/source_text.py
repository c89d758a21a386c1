"""What the encoder of an encoder-decoder reads of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.inference.fill_mask import MASK


def hidden_spellings(tokenizer: Any) -> dict[str, int]:
    """What stands for a hidden part of a text, and its id: <extra_id_0> … (T5), and as a tokenizer spells it or as [MASK]
    the mask (BART)."""
    spelled = {tokenizer.token(i): i for i in tokenizer.sentinel_ids}
    return spelled | dict.fromkeys((MASK, tokenizer.token(tokenizer.mask_id)), tokenizer.mask_id)


def split_at_hidden(tokenizer: Any, text: str) -> tuple[list[str], list[int]]:
    """The text around its hidden parts, and their ids: one part more than there are ids.

    Where a token brings the space before it along, a hidden one does, too, so the space is dropped.

        The <extra_id_0> sat.   ->   'The', ' sat.'        (of bytes or characters: 'The ', ' sat.')
    """
    spelled = hidden_spellings(tokenizer)
    pattern = "|".join(map(re.escape, spelled))
    parts, ids = re.split(pattern, text), [spelled[name] for name in re.findall(pattern, text)]
    if len(tokenizer.encode("a a")) < 3:
        parts[:-1] = [part.rstrip(" ") for part in parts[:-1]]
    return parts, ids


def encode_source(tokenizer: Any, text: str, prefix: Sequence[int] = ()) -> np.ndarray:
    """prefix text eos as ids (n,) int32, with those of hidden parts wherever the text says so."""
    parts, hidden = split_at_hidden(tokenizer, text)
    ids: list[Any] = [prefix, tokenizer.encode(parts[0])]
    for id, part in zip(hidden, parts[1:], strict=True):
        ids += [[id], tokenizer.encode(part)]
    return np.concatenate([*ids, [tokenizer.eos_id]]).astype(np.int32)
