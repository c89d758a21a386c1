"""Steps that went bad: counted, left out of the means, and the end of a run that only makes them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.exits import Diverged
from jaxlm.parallel import offload
from jaxlm.parallel.mesh import path_names

PyTree = Any

# What a step without a finite loss and gradient still says.
STAY = ("skipped", "spikes", "learning_rate", "param_norm")


class BadSteps:
    """Sees the metrics of every step, on the host.

    limit: after this many steps in a row without a finite loss and gradient a run cannot recover by itself.
    row: those of them that came last, where a run goes on in their middle: as `self.row` was when it was saved.
    """

    def __init__(self, limit: int = 20, row: Iterable[Mapping[str, Any]] = ()):
        self.limit = limit
        self.row = [dict(record) for record in row]  # {"step": …, metric: its value} of each

    def see(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics that count: of a bad step its sums are no numbers, and would make the mean of a log window none.

        Raises:
          Diverged: at `limit` bad steps in a row, or at once if the parameters themselves are not finite: every later step
            would be bad, and a checkpoint of them would take the place of a good one.
        """
        skipped = metrics.get("skipped", (0, 1))[0] > 0
        lost = not math.isfinite(metrics.get("param_norm", (0, 1))[0])
        if not (skipped or lost):
            self.row.clear()
            return dict(metrics)
        self.row.append({"step": step} | {name: _mean(pair) for name, pair in metrics.items()})
        if lost:
            raise Diverged(
                f"the parameters are not finite after step {step}: lower optimizer.learning_rate or raise warmup_steps",
                tuple(self.row),
            )
        if len(self.row) >= self.limit:
            raise Diverged(
                f"the loss or gradient was not finite in {len(self.row)} steps in a row, up to step {step}: lower "
                "optimizer.learning_rate, raise warmup_steps, or look at the data of these steps",
                tuple(self.row),
            )
        return {name: value for name, value in metrics.items() if name in STAY}


def _mean(pair: tuple[Any, Any]) -> float | str:
    """A metric of one step as JSON has it, which knows no NaN and no infinity: those are words."""
    total, weight = map(float, pair)
    mean = total / weight if weight else math.nan
    return mean if math.isfinite(mean) else str(mean)


def finite_problems(tree: PyTree) -> list[str]:
    """A line for each array of `tree` that holds NaN or an infinity; sharded arrays are looked at where they lie."""
    leaves = {
        "/".join(path_names(path)): _on_device(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    }
    finite = jax.device_get(jax.jit(_are_finite)(leaves))
    return [f"{name} is not finite" for name in leaves if not finite[name]]


def _on_device(x: jax.Array) -> jax.Array:
    """Of an array that waits in the host's memory a copy that can be computed with."""
    waits = x.sharding.memory_kind == offload.HOST
    return jax.device_put(x, offload.on_device(x.sharding)) if waits else x


def _are_finite(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in arrays.items()}
