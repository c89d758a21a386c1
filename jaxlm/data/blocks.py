"""Arrays in .npy files that are checked where they are read, when they are read.

    file     header 0 1 2 3 …  │                   │                   │
    blocks   ─────── 0 ─────── │ ─────── 1 ─────── │ ─────── 2 ─────── │ ── 3 ──     64 KiB each, the last one shorter
    sums     xxh3_64 of each

A block is compared with its sum when a process first reads from it. So a file costs nothing until it is read, however
large it is, and one that has changed on its disk is an error where its numbers would have been used.
"""

import io
from pathlib import Path

import numpy as np
import xxhash

from jaxlm.exits import Damaged

BLOCK_BYTES = 1 << 16
HEADER_BYTES = 128  # of a 1-D array, as np.save writes it
MEND = (
    "Bring the file back from a copy, or delete the store and prepare it again (what lies in a cache is a copy of a "
    "bucket's file: delete it there). `jaxlm-tool fsck` lists all that is damaged"
)


def file_bytes(dtype: np.dtype, length: int) -> int:
    """The bytes of the .npy file of a 1-D array."""
    return HEADER_BYTES + length * dtype.itemsize


def num_blocks(num_bytes: int) -> int:
    """Blocks that so many bytes have; the last may be shorter."""
    return -(-num_bytes // BLOCK_BYTES)


def block_sums(path: Path) -> np.ndarray:
    """xxh3_64 of each block of a file: uint64 (blocks,)."""
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
        return np.array([xxhash.xxh3_64_intdigest(block) for block in blocks], np.uint64)


class CheckedArray:
    """A 1-D array in a local .npy file, mapped into memory.

    dtype, length: what the file must hold; its header decides nothing. sums: of `block_sums`; None checks no block.

    Raises:
      Damaged: if the file is no such array, and when what is read is not what was written.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int, sums: np.ndarray | None):
        self.path = path
        size, expected = path.stat().st_size, file_bytes(dtype, length)
        if size != expected:
            raise Damaged(f"{path}: found {size:,} bytes, expected {expected:,}. {MEND}")
        self._bytes = np.memmap(path, np.uint8, "r").view(np.ndarray)
        self._sums = sums
        self._unchecked = bytearray(b"\0" if sums is None else b"\1") * num_blocks(size)
        self._check(0, HEADER_BYTES)
        self._check_header(dtype, length)
        self._values = self._bytes[HEADER_BYTES:].view(dtype)

    def __len__(self) -> int:
        return len(self._values)

    def read(self, low: int, high: int) -> np.ndarray:
        """The elements [low, high), (high - low,), not copied."""
        width = self._values.itemsize
        self._check(HEADER_BYTES + low * width, HEADER_BYTES + high * width)
        return self._values[low:high]

    def between(self, low: int, high: int) -> tuple[int, np.ndarray]:
        """(the index of the first, all) of the elements of an ascending array that are in [low, high).

        A search jumps through blocks that nobody has checked. What it finds is checked, with an element on either side:
        an ascending array has no other place where low and high fit.
        """
        values, size = self._values, len(self._values)
        first, last = np.searchsorted(values, np.array((low, high), values.dtype)).tolist()
        self.read(max(first - 1, 0), min(last + 1, size))
        at = values.item
        before = (first == 0 or at(first - 1) < low) and (last == 0 or at(last - 1) < high)
        after = (first == size or at(first) >= low) and (last == size or at(last) >= high)
        if not (first <= last and before and after):
            self.read(0, size)  # names the block that led astray
            raise Damaged(f"{self.path}: its numbers do not ascend. {MEND}")
        return first, values[first:last]

    def _check(self, start: int, stop: int) -> None:
        """Compares the blocks of the file's bytes [start, stop) that were not compared before."""
        for block in range(start // BLOCK_BYTES, num_blocks(stop)):
            if self._unchecked[block]:
                first = block * BLOCK_BYTES
                held = self._bytes[first : first + BLOCK_BYTES]
                if xxhash.xxh3_64_intdigest(held) != self._sums[block]:
                    raise Damaged(
                        f"{self.path}: bytes {first:,} to {first + len(held):,} are not those that were written. {MEND}"
                    )
                self._unchecked[block] = 0

    def _check_header(self, dtype: np.dtype, length: int) -> None:
        header = io.BytesIO(self._bytes[:HEADER_BYTES].tobytes())
        try:
            version = np.lib.format.read_magic(header)
            shape, _, found = np.lib.format.read_array_header_1_0(header)
        except ValueError as error:
            raise Damaged(f"{self.path}: its header is no .npy file's ({error}). {MEND}") from error
        if (version, shape, found) != ((1, 0), (length,), dtype):
            raise Damaged(
                f"{self.path}: found {found} {shape}, the manifest says {dtype} {(length,)}. {MEND}"
            )
