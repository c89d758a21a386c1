"""Examples of a token store by index arithmetic: nothing is packed ahead, nothing is stored."""

from typing import Any

import numpy as np


class Examples:
    """Windows over the tokens of a store; example i is a function of i alone.

        tokens        . . [eos] [bos]  a   b  [eos] [bos]  c ...
        segment_ids   1 1   1     2    2   2    2     3    3       documents count from 1
        positions     0 1   2     0    1   2    3     0    1       from each document's first token

    Example i reads tokens [i * stride, i * stride + length), less at the end of the store: the
    short tail is an example, too, so every token after the first `length - stride` is read as a
    new one exactly once. With `within_document` the same holds inside each document, and an
    example has one segment; this keeps one int64 per document in memory.

    store: a TokenStore. length, stride: raw tokens, 0 < stride <= length.
    sentences: examples say where sentences start.
    """

    def __init__(
        self,
        store: Any,
        length: int,
        stride: int,
        within_document: bool = False,
        sentences: bool = True,
    ):
        if not 0 < stride <= length:
            raise ValueError(
                f"found length {length} and stride {stride}; expected 0 < stride <= length; "
                "change seq_len, which an objective turns into both"
            )
        self.store, self.length, self.stride = store, length, stride
        self.within_document, self.sentences = within_document, sentences
        self._ends: np.ndarray | None = None  # examples up to the end of each document

    def __len__(self) -> int:
        if self.within_document:
            ends = self._example_ends()
            return int(ends[-1]) if len(ends) else 0
        return self._count(self.store.num_tokens)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """tokens, segment_ids, positions: int32 (n,), n <= length; sentence_starts: bool (n,), if
        asked for."""
        start, stop = self.span(i)
        size = stop - start
        first = np.append(self.store.documents_in(start, stop), stop) - start
        first = first if first[0] == 0 else np.append(0, first)  # of each document, and the end
        lengths = np.diff(first)
        index = np.arange(size, dtype=np.int32)
        example = {
            "tokens": self.store.tokens(start, stop),
            "segment_ids": np.arange(1, len(first), dtype=np.int32).repeat(lengths),
            "positions": index - first[:-1].astype(np.int32).repeat(lengths),
        }
        if self.sentences:
            example["sentence_starts"] = np.zeros(size, bool)
            example["sentence_starts"][self.store.sentence_starts(start, stop) - start] = True
        return example

    def span(self, i: int) -> tuple[int, int]:
        """Tokens [start, stop) of the store that example i reads."""
        if not 0 <= i < len(self):
            raise IndexError(f"found example {i}; expected 0 <= i < {len(self)}")
        begin, end, first = 0, self.store.num_tokens, 0
        if self.within_document:
            document = self._document(i)
            begin, end = self.store.document_span(document)
            first = self._first_of(document)
        start = int(begin) + (i - first) * self.stride
        return start, min(start + self.length, int(end))

    def same_document(self, i: int) -> tuple[int, int]:
        """Examples [first, last) that come from the document of example i (within_document)."""
        document = self._document(i)
        return self._first_of(document), int(self._example_ends()[document])

    def _count(self, num_tokens: int) -> int:
        return max(0, -(-(num_tokens - (self.length - self.stride)) // self.stride))

    def _document(self, i: int) -> int:
        return int(np.searchsorted(self._example_ends(), i, side="right"))

    def _first_of(self, document: int) -> int:
        return int(self._example_ends()[document - 1]) if document else 0

    def _example_ends(self) -> np.ndarray:
        """Running sum of `_count` over the documents, int64; in place, as there may be millions."""
        if self._ends is None:
            starts = self.store.document_starts()
            ends = np.empty(len(starts), np.int64)
            np.subtract(starts[1:], starts[:-1], out=ends[:-1], casting="unsafe")
            ends[-1:] = self.store.num_tokens - starts[-1:].astype(np.int64)
            ends += 2 * self.stride - 1 - self.length  # _count, rounded up
            ends //= self.stride
            np.maximum(ends, 0, out=ends)
            self._ends = np.cumsum(ends, out=ends)
        return self._ends

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ends": None}  # cheaper to count again than to send


def permute(index: int, size: int, key: int) -> int:
    """Where a permutation of range(size), chosen by `key`, puts `index`; in O(1) time and memory.

    A Feistel network over the next even number of bits is a bijection whatever its round function;
    walking on from values >= size (at most 3 of 4) makes it one of range(size).

    index: 0 <= index < size. key: 64 bits. Source: Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains", methods 2 and 3.
    """
    if not 0 <= index < size:
        raise IndexError(f"found index {index}; expected 0 <= index < {size}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, key = (1 << half) - 1, _mix(key)
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key ^ (turn << 48 | right)) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(x: int) -> int:
    """A 64-bit integer hash: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
