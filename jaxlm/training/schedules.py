"""Learning rate schedules, and the scale that falls when the held-out loss stops falling.

    lr |      ______________            constant, WSD's stable part
       |     /    `.        \\           linear, cosine, inverse square root
       |    /       `- .     \\          WSD's cooldown
       |   /             ` -  \\
       +--+-------------------+---> step
          warmup_steps        num_train_steps

Step counts from 0. Warm-up gives lr (step + 1) / warmup_steps, so no step has a rate of 0; the decay starts at
`warmup_steps` from the full rate and arrives at `final_ratio` of it at `num_train_steps`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# What is left of the learning rate after a share `done` (0 to 1) of a decay; from 1 down to 0.
DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
    "one_minus_sqrt": lambda done: 1 - jnp.sqrt(done),  # arXiv:2405.18392, section 3
}


def _decay(shape: str, start: int, stop: int, final_ratio: float) -> Schedule:
    def factor(step):
        done = jnp.clip((step - start) / max(stop - start, 1), 0, 1)
        return final_ratio + (1 - final_ratio) * DECAYS[shape](done)

    return factor


def _constant(warmup_steps: int, num_train_steps: int) -> Schedule:
    return lambda step: jnp.float32(1)


def _linear(warmup_steps: int, num_train_steps: int, *, final_ratio: float) -> Schedule:
    return _decay("linear", warmup_steps, num_train_steps, final_ratio)


def _cosine(warmup_steps: int, num_train_steps: int, *, final_ratio: float) -> Schedule:
    """arXiv:1608.03983, equation 5, without restarts."""
    return _decay("cosine", warmup_steps, num_train_steps, final_ratio)


def _inverse_sqrt(warmup_steps: int, num_train_steps: int) -> Schedule:
    """sqrt(warmup_steps / step) (arXiv:1706.03762, section 5.3): it does not depend on the run's length."""
    start = max(warmup_steps, 1)
    return lambda step: jnp.sqrt(start / jnp.maximum(step, start))


def _wsd(
    warmup_steps: int,
    num_train_steps: int,
    *,
    final_ratio: float,
    cooldown_fraction: float,
    cooldown_shape: str,
) -> Schedule:
    """Warm-up, stable, decay (arXiv:2404.06395, section 4): the last `cooldown_fraction` of all steps decays."""
    start = num_train_steps - round(cooldown_fraction * num_train_steps)
    return _decay(cooldown_shape, max(start, warmup_steps), num_train_steps, final_ratio)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
}


def make_schedule(
    name: str, *, learning_rate: float, warmup_steps: int, num_train_steps: int, **options: Any
) -> Schedule:
    """A function from the step (int, may be traced) to the learning rate (float32 scalar).

    Args:
      name: a key of SCHEDULES.
      learning_rate: the largest one, reached at the end of warm-up.
      warmup_steps: length of the linear warm-up; 0 is none.
      num_train_steps: where the decay ends.
      **options: linear and cosine take final_ratio (of the learning rate); wsd takes final_ratio,
        cooldown_fraction (of all steps, 0 to 1) and cooldown_shape (a key of DECAYS); the others none.

    Raises:
      ValueError: listing everything that is wrong with the arguments.
    """
    problems = option_problems("schedule", name, SCHEDULES, options)
    if not 0 <= options.get("final_ratio", 0) <= 1:
        problems.append(f"final_ratio {options['final_ratio']}: must be from 0 to 1")
    if not 0 <= options.get("cooldown_fraction", 0) <= 1:
        problems.append(f"cooldown_fraction {options['cooldown_fraction']}: must be from 0 to 1")
    if (shape := options.get("cooldown_shape", "linear")) not in DECAYS:
        problems.append(f"cooldown_shape {shape!r}: use one of {', '.join(DECAYS)}")
    if warmup_steps < 0:
        problems.append(f"warmup_steps {warmup_steps}: must be 0 or more")
    if problems:
        raise ValueError(f"schedule {name!r}:\n" + "\n".join(f"  - {p}" for p in problems))
    factor = SCHEDULES[name](warmup_steps, num_train_steps, **options)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1) / max(warmup_steps, 1), 1)
        return learning_rate * jnp.where(step < warmup_steps, warmup, factor(step))

    return schedule


def option_problems(what: str, name: str, table: dict[str, Callable], options: dict) -> list[str]:
    """Why `table[name]` cannot be called with the keyword arguments `options`; [] if it can.

    Its keyword-only arguments are exactly the options that it takes, and each of them must be given.
    """
    if name not in table:
        return [f"unknown {what}: use one of {', '.join(table)}"]
    parameters = inspect.signature(table[name]).parameters.values()
    takes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    problems = [
        f"{option} is missing: give it a value" for option in takes if option not in options
    ]
    listed = ", ".join(takes) or "no options"
    return problems + [
        f"{option}={value!r} is not an option: take it away ({name} takes {listed})"
        for option, value in options.items()
        if option not in takes
    ]


@dataclass(frozen=True)
class Plateau:
    """Reduce on plateau: a factor on the learning rate that falls when a metric has stopped falling.

    Attributes:
      patience: that many evaluations in a row without an improvement reduce the scale.
      factor: what the scale is multiplied with then, between 0 and 1.
      rtol: an evaluation improves if it is below (1 - rtol) times the best one.
      min_scale: the scale falls no further.
    """

    patience: int
    factor: float
    rtol: float
    min_scale: float

    def init(self) -> optax.contrib.ReduceLROnPlateauState:
        """The state before the first evaluation: a tuple of scalars, `scale` = 1 among them."""
        return self._transform().init(jnp.float32(0))

    def update(self, state, value: jax.typing.ArrayLike) -> optax.contrib.ReduceLROnPlateauState:
        """The state after an evaluation that gave `value`; NaN is no improvement."""
        _, state = self._transform().update((), state, value=jnp.asarray(value, jnp.float32))
        return state

    def _transform(self):
        return optax.contrib.reduce_on_plateau(
            factor=self.factor, patience=self.patience, rtol=self.rtol, min_scale=self.min_scale
        )
