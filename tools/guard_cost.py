"""What the guards of a run cost in each step; `python tools/benchmark.py --mode=guards --config=configs/gpt.py:tiny`.

On the host: all that the loop does besides launching a step, fetching a batch and reading metrics, called many times over.
On the device: the bytes that XLA counts for the step with its branch around the update, and with the spike guard, beside a
step that has neither.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from ml_collections import ConfigDict

from jaxlm import build
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.guards import BadSteps
from jaxlm.training.session import Session

CALLS = 10_000
SPIKE_FACTOR = 10.0


def guard_cost(
    config: ConfigDict, workdir: Path, time_steps: Callable[[build.Run], float]
) -> dict[str, Any]:
    """time_steps: a run -> seconds of its median step."""
    run = build.make_run(config, workdir)
    step_seconds, host_seconds = time_steps(run), host_cost(run, workdir)
    spikes = config.copy_and_resolve_references()
    spikes.guards.spike_factor = SPIKE_FACTOR
    with_guards = step_bytes(run)
    with mock.patch("jaxlm.training.step.jax.lax.cond", lambda good, update, skip, x: update(x)):
        bare = step_bytes(build.make_run(config, workdir))
    with_spikes = step_bytes(build.make_run(spikes, workdir))
    return {
        "mode": "guards",
        "step_seconds": step_seconds,
        "host_seconds": host_seconds,
        "host_share": host_seconds / step_seconds,
        "bytes_bare": bare,
        "bytes_share": with_guards / bare - 1,
        "bytes_share_with_spikes": with_spikes / bare - 1,
    }


def step_bytes(run: build.Run) -> float:
    """Bytes that the compiled train step reads and writes, by XLA's count."""
    return run.lower_train_step().compile().cost_analysis()["bytes accessed"]


def host_cost(run: build.Run, workdir: Path) -> float:
    """Seconds a step that the guards take on the host."""
    session, bad_steps, store = Session(), BadSteps(), Checkpoints(workdir)
    batch = run.put_batch(run.train_batches[0])
    _, metrics = run.train_step(run.init_state(), batch)
    metrics = jax.device_get(metrics)
    began = time.perf_counter()
    for step in range(CALLS):
        with session.ledger.spend("input"):
            pass
        bad_steps.see(step, metrics)
        session.did_step(step, useful=not bad_steps.row)
        store.check()
        session.stop.is_due()
    seconds = time.perf_counter() - began
    store.close()
    return seconds / CALLS
