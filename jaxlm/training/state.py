"""Everything that a training run carries from one step to the next, as one pytree."""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from jaxlm.training.spikes import Spikes, new_spikes

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds.

    Attributes:
      step: int32, the number of finished optimizer steps; the data position is this number and nothing else.
      params: trainable parameters, plain arrays.
      opt_state: the optimizer's state.
      ema: an exponential moving average of `params`, or None.
      plateau: state of reduce-on-plateau, or None.
      frozen: parameters that do not train (see `partition`), outside gradients and optimizer, or None. What the model
        is called with is `partition.join(params, frozen)`.
      skipped: int32, how many steps were not applied because their loss or gradient was not finite.
      spikes: what the guard against spikes of the gradient has seen, or None.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree = None
    plateau: PyTree = None
    frozen: PyTree = None
    skipped: Any = 0
    spikes: Spikes | None = None


def new_state(
    params: PyTree,
    optimizer,
    *,
    ema: bool = False,
    plateau=None,
    frozen: PyTree | None = None,
    spike_window: int = 0,
) -> TrainState:
    """The state before the first step. Call it under jit: nothing is placed on a device by hand.

    spike_window: steps that the guard against spikes looks back on; 0 is without it.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        plateau=plateau.init() if plateau else None,
        frozen=frozen or None,
        skipped=jnp.zeros((), jnp.int32),
        spikes=new_spikes(spike_window) if spike_window else None,
    )
