"""What it costs that token stores are checked as they are read; `python tools/benchmark.py --mode=store --config=configs/gpt.py:tiny`.

The same batches of a store of random tokens, in turns: from plain memory maps, with each block checked at its first touch
by a store that has just been opened (the first batches of a run, whose every row touches new blocks), and after that.
Times of batches and sums are those of the processor, the shortest of ten rounds.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm.data.blocks import BLOCK_BYTES
from jaxlm.data.pipeline import TrainBatches
from jaxlm.data.store_writer import write_store
from jaxlm.data.token_store import TokenStore

TOKENS, DOCUMENT = 1 << 24, 512  # 32 MB of ids
BATCHES = 100


class Plain(NamedTuple):
    """A memory map, read as one is."""

    values: np.memmap

    def read(self, low: int, high: int) -> np.ndarray:
        return self.values[low:high]

    def between(self, low: int, high: int) -> tuple[int, np.ndarray]:
        first, last = np.searchsorted(self.values, np.array((low, high), self.values.dtype))
        return first, self.values[first:last]


class Unchecked(TokenStore):
    def _part(self, shard, part):
        if (shard, part) not in self._open:
            self._open[shard, part] = Plain(
                np.load(self._file(shard, part), mmap_mode="r", allow_pickle=False)
            )
        return self._open[shard, part]


def store_cost(
    config: ConfigDict, workdir: Path, time_steps: Callable[[build.Run], float]
) -> dict[str, Any]:
    """time_steps: a run -> seconds of its median step."""
    run = build.make_run(config, workdir / "run")
    step_seconds = time_steps(run)
    ids = np.random.default_rng(0).integers(10, 200, (TOKENS // DOCUMENT, DOCUMENT - 2))
    write_store(workdir / "store", {"train": ids}, run.tokenizer)

    def make(store: TokenStore) -> Callable[[], float]:
        source = TrainBatches(
            {"random": store}, {"random": 1.0}, run.objective, config.seq_len, config.batch_size, 0
        )

        def seconds() -> float:
            began = time.thread_time()
            for k in range(BATCHES):
                source[k]
            return (time.thread_time() - began) / BATCHES

        return seconds

    unchecked, checked = make(Unchecked(workdir / "store")), make(TokenStore(workdir / "store"))
    unchecked()  # brings the files into memory
    rounds = [(unchecked(), make(TokenStore(workdir / "store"))()) for _ in range(10)]
    checked()
    later = [(unchecked(), checked()) for _ in range(10)]
    (bare, first), (bare_later, after) = (np.min(times, axis=0) for times in (rounds, later))
    return {
        "mode": "store",
        "gb_per_second": block_speed(),
        "step_seconds": step_seconds,
        "batch_seconds": {"memory map": bare, "first touch": first, "after": after},
        "share_of_batch": {"first touch": first / bare - 1, "after": after / bare_later - 1},
        "share_of_step": {
            "first touch": (first - bare) / step_seconds,
            "after": (after - bare_later) / step_seconds,
        },
    }


def block_speed(blocks: int = 2000) -> float:
    """GB/s of the sums, of blocks that are not in the cache of the processor."""
    data = np.random.default_rng(0).integers(0, 256, blocks * BLOCK_BYTES, np.uint8)
    began = time.thread_time()
    for start in range(0, len(data), BLOCK_BYTES):
        xxhash.xxh3_64_intdigest(data[start : start + BLOCK_BYTES])
    return len(data) / (time.thread_time() - began) / 1e9
