"""The train step: one pure function of (state, batch), for every model, objective and optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.training import spikes
from jaxlm.training.optimizers import clip_scale, ema_update, global_norm
from jaxlm.training.partition import join
from jaxlm.training.state import TrainState

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


def make_train_step(
    model: Any,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    *,
    seed: int,
    accumulation_steps: int = 1,
    grad_clip_norm: float = 0.0,
    ema_decay: float = 0.0,
    spike_factor: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A function (state, batch) -> (state, metrics), to be jitted with the state donated.

    The loss of a batch is the sum of its totals over the sum of its weights, so it does not depend on
    how rows are spread over devices or micro-batches. A step whose loss or gradient is not finite leaves
    everything but `step` and `skipped` as it was, and so does a spike of the gradient, where the state has
    `spikes`; it is counted there. `state.frozen` passes through untouched.

    Args:
      model: a Linen module, `apply({'params': p}, batch, deterministic, rngs) -> outputs`.
      loss: (outputs, batch) -> ((total, weight), metrics).
      optimizer: gives the direction of the update; the learning rate is applied here.
      schedule: step -> learning rate.
      seed: of the dropout keys, which are `fold_in(seed, step)`.
      accumulation_steps: micro-batches per step; must divide the batch's rows.
      grad_clip_norm: largest global gradient norm; 0 does not clip.
      ema_decay: decay of the averaged parameters; 0 keeps none.
      spike_factor: over how many times the median of the last gradient norms a norm is a spike.

    Returns:
      metrics of the step: name -> (total, weight), to be summed over steps and divided once.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def total_loss(params, batch, key):
            variables = {"params": join(params, state.frozen)}
            outputs = model.apply(variables, batch, deterministic=False, rngs={"dropout": key})
            (total, weight), metrics = loss(outputs, batch)
            return total, (weight, metrics)

        grads, weight, metrics = _sum_gradients(
            total_loss, state.params, batch, key, accumulation_steps
        )
        scale = 1.0 / jnp.maximum(weight, 1e-9)
        grad_norm = global_norm(grads) * scale
        scale *= clip_scale(grad_norm, grad_clip_norm)

        learning_rate = schedule(state.step)
        if state.plateau is not None:
            learning_rate = learning_rate * state.plateau.scale

        def update(state: TrainState) -> TrainState:
            # Scaled here, where XLA fuses it into the moments, and not outside, where it would write all gradients once more.
            scaled = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
            directions, opt_state = optimizer.update(scaled, state.opt_state, state.params)
            updates = jax.tree.map(lambda d: -learning_rate * d, directions)
            params = optax.apply_updates(state.params, updates)
            ema = ema_update(state.ema, params, ema_decay, state.step) if ema_decay else state.ema
            return state.replace(params=params, opt_state=opt_state, ema=ema)

        def skip(state: TrainState) -> TrainState:
            return state.replace(skipped=state.skipped + 1)

        # A branch and not a select: a select made XLA:CPU copy all parameters and moments, and took twice as long.
        good = finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"][0])
        if state.spikes is not None:
            spike = finite & spikes.is_spike(state.spikes, grad_norm, spike_factor)
            good = finite & ~spike
        new_state = jax.lax.cond(good, update, skip, state.replace(frozen=None, spikes=None))
        new_state = new_state.replace(step=state.step + 1, frozen=state.frozen)
        scalars = {
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "param_norm": global_norm(new_state.params),
            "skipped": 1.0 - finite,
        }
        if state.spikes is not None:
            seen = spikes.see(state.spikes, grad_norm, spike)
            new_state = new_state.replace(skipped=state.skipped + ~finite, spikes=seen)
            scalars["spikes"] = spike
        metrics |= {name: (jnp.float32(value), jnp.float32(1)) for name, value in scalars.items()}
        return new_state, metrics

    return train_step


def with_state_on_device(step: Callable, shardings: PyTree) -> Callable:
    """`step` of a state whose `opt_state` comes from other memory: these shardings are where it is computed with.

    Where it goes afterwards the jitted function's `out_shardings` say.
    """

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return step(state.replace(opt_state=jax.device_put(state.opt_state, shardings)), batch)

    return run


def _sum_gradients(total_loss, params, batch, key, accumulation_steps):
    """Gradient of the summed loss, the summed weight and the summed metrics over all micro-batches."""
    value_and_grad = jax.value_and_grad(total_loss, has_aux=True)
    if accumulation_steps == 1:
        (_, (weight, metrics)), grads = value_and_grad(params, batch, key)
        return grads, weight, metrics

    def split(x):
        # (B//A, A) then swap, not (A, B//A): each device keeps its own rows and nothing is moved.
        rows = x.shape[0]
        if rows % accumulation_steps:
            raise ValueError(
                f"batch_size {rows} is not divisible by accumulation_steps {accumulation_steps}"
            )
        parts = x.reshape(rows // accumulation_steps, accumulation_steps, *x.shape[1:])
        return parts.swapaxes(0, 1)

    micro_batches = jax.tree.map(split, dict(batch))
    keys = jax.random.split(key, accumulation_steps)

    def accumulate(sums, inputs):
        (_, (weight, metrics)), grads = value_and_grad(params, *inputs)
        return jax.tree.map(jnp.add, sums, (grads, weight, metrics)), None

    first = jax.tree.map(lambda x: x[0], (micro_batches, keys))
    shapes = jax.eval_shape(lambda b, k: value_and_grad(params, b, k), *first)
    (_, (weight, metrics)), grads = shapes
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, weight, metrics))
    sums, _ = jax.lax.scan(accumulate, zeros, (micro_batches, keys))
    return sums


def make_eval_step(model, loss: Callable) -> Callable[[PyTree, Batch], Metrics]:
    """A function (params, batch) -> metrics, without dropout; to be jitted. params: all (`partition.join`)."""

    def eval_step(params: PyTree, batch: Batch) -> Metrics:
        outputs = model.apply({"params": params}, batch, deterministic=True)
        _, metrics = loss(outputs, batch)
        return metrics

    return eval_step
