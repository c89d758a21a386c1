"""What a checkpoint costs: `python tools/benchmark.py --mode=checkpoints`, of a state of 256 MB, all measured in turns.

How fast its checksums are, on the device and by numpy, beside zlib's crc32 and a plain copy to the host; how long a save
keeps the caller, how much later a step ends that changes the whole state right after it, and how long it writes behind it.
"""

import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.checksums import checksum, checksums
from jaxlm.training.state import new_state

ARRAYS = 8


def checkpoint_cost(
    workdir: Path, rounds: int, measure: Callable[[list[Callable], int], list], megabytes: int = 256
) -> dict[str, Any]:
    """measure: functions that return seconds, rounds -> the seconds of each, taken in turns."""
    shape = (ARRAYS, megabytes * 2**18 // ARRAYS // 1024, 1024)
    params = dict(enumerate(jax.random.normal(jax.random.key(0), shape)))
    params = {f"array_{name}": array for name, array in params.items()}
    state = new_state(jax.tree.map(jnp.copy, params), optax.identity())  # which is donated
    size = sum(x.nbytes for x in params.values())
    store, saved = Checkpoints(workdir, keep_last=1), []

    def save() -> None:
        store.save(len(saved) + 1, state, {}, None)
        saved.append(time.perf_counter())

    def write() -> None:
        save()
        store.wait()

    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)

    def step() -> None:
        nonlocal state
        state = state.replace(params=jax.block_until_ready(add(state.params)))

    def save_and_step() -> None:
        save()
        step()

    def timed(function: Callable[[], Any]) -> Callable[[], float]:
        def seconds() -> float:
            store.wait()
            began = time.perf_counter()
            function()
            return time.perf_counter() - began

        return seconds

    each = lambda function: lambda: [function(x) for x in params.values()]
    functions = {
        "checksums": lambda: checksums(params),
        "numpy": each(checksum),
        "crc32": each(lambda x: zlib.crc32(np.asarray(x).view(np.uint8))),
        "copy": each(lambda x: np.asarray(x).copy()),
        "save": save,
        "write": write,
        "step": step,
        "save_and_step": save_and_step,
    }
    steppers = [timed(function) for function in functions.values()]
    measure(steppers, 1)  # compiles
    medians = dict(zip(functions, map(statistics.median, measure(steppers, rounds)), strict=True))
    store.close()
    speeds = {
        f"{name}_gb_per_second": size / 1e9 / medians[name]
        for name in ("checksums", "numpy", "crc32", "copy")
    }
    return {
        "mode": "checkpoints",
        "bytes": size,
        **speeds,
        "checksums_over_crc32": medians["crc32"] / medians["checksums"],
        "save_blocks_seconds": medians["save"],
        "step_is_later_by_seconds": medians["save_and_step"] - medians["step"],
        "checksums_seconds": medians["checksums"],
        "copy_to_host_seconds": medians["copy"],
        "save_writes_seconds": medians["write"],
    }
