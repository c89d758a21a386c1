"""What an objective knows of a tokenizer: a few ids and tables, small enough to send to a worker."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTables:
    """Ids and per-id tables of a tokenizer, without the tokenizer itself (which need not pickle).

    sentinels: int32 (K,), the ids that stand for hidden spans, the first span's first; K may be 0.
    special, word_start: bool (V,). ordinary: int32 (V - specials,), every id that stands for text.
    num_bytes: int32 (V,), the UTF-8 bytes that an id stands for.
    """

    pad_id: int
    bos_id: int
    eos_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    sentinels: np.ndarray
    special: np.ndarray
    ordinary: np.ndarray
    word_start: np.ndarray
    num_bytes: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenTables":
        """Reads the tables of any object with the attributes of `jaxlm.tokenizers`' tokenizers."""
        special = np.zeros(tokenizer.vocab_size, bool)
        special[sorted(tokenizer.special_ids)] = True
        return cls(
            **{f"{name}_id": int(getattr(tokenizer, f"{name}_id")) for name in _NAMED},
            sentinels=np.asarray(tokenizer.sentinel_ids, np.int32),
            special=special,
            ordinary=np.flatnonzero(~special).astype(np.int32),
            word_start=np.asarray(tokenizer.is_word_start, bool),
            num_bytes=np.asarray(tokenizer.num_bytes, np.int32),
        )


_NAMED = ("pad", "bos", "eos", "cls", "sep", "mask")


def padded(values: np.ndarray, length: int, fill: float = 0) -> np.ndarray:
    """`values` (n,) followed by `fill` up to (length,), same dtype. Raises if n > length."""
    if len(values) > length:
        raise ValueError(f"found {len(values)} values; expected at most {length}")
    if len(values) == length:
        return values
    out = np.empty(length, values.dtype)
    out[: len(values)] = values
    out[len(values) :] = fill
    return out


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """The place of each token in its segment, from 0; int32 (n,) for int (n,) in which segments are stretches."""
    index = np.arange(len(segment_ids), dtype=np.int32)
    first = np.zeros(len(segment_ids), np.int32)
    first[1:] = index[1:] * (segment_ids[1:] != segment_ids[:-1])
    return index - np.maximum.accumulate(first)
