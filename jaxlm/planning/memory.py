"""Bytes of one device by kind, from the shardings of the state and what the compiler says of the rest."""

from typing import Any

import jax
import numpy as np

from jaxlm.planning.compiling import Outcome
from jaxlm.program import Program

PyTree = Any


def device_bytes(tree: PyTree) -> int:
    """Bytes that one device holds of a tree of ShapeDtypeStructs with shardings; what waits in the host's memory is not its."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if "host" not in (x.sharding.memory_kind or "")
    )


def state_bytes(program: Program) -> dict[str, int]:
    """Bytes of one device for what lives from step to step, and for the batch."""
    state = program.state_shape
    kinds = {
        "parameters": device_bytes((state.params, state.frozen)),
        "optimizer": device_bytes((state.opt_state, state.plateau)),
        "averaged parameters": device_bytes(state.ema),
        "batch": device_bytes(program.batch_shape),
    }
    return {kind: size for kind, size in kinds.items() if size}


def bytes_by_kind(program: Program, outcome: Outcome) -> dict[str, float]:
    """Bytes of one device by kind; they add up to `outcome.hbm_bytes`.

    gradients and temporaries: everything that lives within a step. padding: what tiles of 8 x 128 and the like add to
    the arrays that are given. If the program did not fit, what is known is the state, and the rest is 'everything else'.
    """
    kinds: dict[str, float] = dict(state_bytes(program))
    if not outcome.argument_bytes:
        return kinds | {"everything else": outcome.hbm_bytes - sum(kinds.values())}
    kinds["padding of arguments"] = outcome.argument_bytes - sum(kinds.values())
    kinds["gradients and temporaries"] = outcome.temp_bytes
    kinds["results"] = outcome.output_bytes - outcome.alias_bytes
    kinds["code"] = outcome.code_bytes
    return {kind: size for kind, size in kinds.items() if size}
