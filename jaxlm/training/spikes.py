"""The guard against spikes: a step whose gradient norm stands far above those before it is left out.

It judges by the gradient's norm and not by the loss: the norm is known before the update, and its sudden growth is what loss
spikes are taken to come from (arXiv:2312.16903). The window is rolling, as in OLMo-core's SkipStepOptimizer, and holds what
was skipped, too: where norms rise for good, half a window of steps is left out, and not all that follow. It judges by the
median and not by a mean and deviations: the spikes in the window do not move it.
"""

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Spikes:
    """Attributes:
    norms: float32 (N,), the last N finite gradient norms, in a ring.
    seen: int32, how many finite ones there have been.
    skipped: int32, how many steps were left out because their norm was a spike.
    """

    norms: jax.Array
    seen: jax.Array
    skipped: jax.Array


def new_spikes(window: int) -> Spikes:
    """Before the first step. window: N."""
    zero = jnp.zeros((), jnp.int32)
    return Spikes(jnp.zeros(window, jnp.float32), zero, zero)


def is_spike(spikes: Spikes, norm: jax.Array, factor: float) -> jax.Array:
    """bool (): whether `norm` is over `factor` times the median of the window; never before the window is full."""
    is_full = spikes.seen >= spikes.norms.size
    return is_full & jnp.isfinite(norm) & (norm > factor * jnp.median(spikes.norms))


def see(spikes: Spikes, norm: jax.Array, spike: jax.Array) -> Spikes:
    """With this step's norm () in the window, in the place of the oldest; one that is not finite stays outside."""
    finite = jnp.isfinite(norm)
    place = spikes.seen % spikes.norms.size
    norms = spikes.norms.at[place].set(jnp.where(finite, norm, spikes.norms[place]))
    return Spikes(norms, spikes.seen + finite, spikes.skipped + spike)
