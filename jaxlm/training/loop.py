"""The training loop: the same for every objective and task, one step ahead of what it reads."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from tqdm import tqdm

from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.guards import BadSteps
from jaxlm.training.metrics import MetricSums, MetricWriter
from jaxlm.training.profile import Profile, annotate_step
from jaxlm.training.state import TrainState


@dataclass(frozen=True)
class Intervals:
    """How often, in steps: log, evaluate, checkpoint. 0 means at the end of the run only."""

    log: int
    evaluate: int
    checkpoint: int

    @staticmethod
    def due(step: int, every: int, last: int) -> bool:
        return step == last or (every > 0 and step % every == 0)


@dataclass(frozen=True)
class Work:
    """The size of a step, from which the loop derives tokens/s and MFU."""

    tokens_per_step: float
    flops_per_step: float
    peak_flops: float


@dataclass
class Clock:
    """Wall time of the steps since the last log line; evaluation and saving are not charged to them."""

    started: float = field(default_factory=time.perf_counter)
    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0

    def restart(self) -> None:
        self.since, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def report(self, work: Work) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.since, 1e-9)
        steps = max(self.steps, 1)
        return {
            "tokens_per_second": steps * work.tokens_per_step / seconds,
            "step_seconds": seconds / steps,
            "mfu": steps * work.flops_per_step / seconds / work.peak_flops,
            "input_wait": self.waited / seconds,
            "seconds": time.perf_counter() - self.started,
        }


def fit(
    state: TrainState,
    *,
    train_step: Callable,
    batches: Iterator,
    num_train_steps: int,
    intervals: Intervals,
    work: Work,
    evaluate: Callable[[TrainState, int], dict[str, float]] | None = None,
    on_evaluation: Callable[[TrainState, dict[str, float]], TrainState] | None = None,
    callbacks: Sequence[Callable[[TrainState, int], None]] = (),
    should_stop: Callable[[], bool] = lambda: False,
    checkpoints: Checkpoints | None = None,
    writer: MetricWriter | None = None,
    describe: Callable[[int], dict[str, Any]] = lambda step: {},
    manifest: Callable[[int], dict[str, Any]] = lambda step: {},
    window: MetricSums | None = None,
    progress: bool = True,
    profile: Profile | None = None,
    bad_steps: BadSteps | None = None,
) -> TrainState:
    """Trains from `state.step` to `num_train_steps` and returns the last state.

    While a step runs, the next batch is fetched and the metrics of the step *before* are read, so the
    device never waits for the host and no more than two steps are in flight.

    Args:
      state: the state to start from; it is donated.
      train_step: jitted (state, batch) -> (state, metrics as (total, weight) pairs).
      batches: device batches from step `state.step` on.
      evaluate: (state, step) -> metrics of the held-out text, before the checkpoint of the same step.
      on_evaluation: (state, metrics) -> state, e.g. reduce-on-plateau.
      callbacks: called as (state, step) after each evaluation, e.g. to write samples.
      should_stop: asked after each evaluation; True saves a checkpoint and ends the run.
      describe: step -> further fields of a training log line.
      manifest: step -> what a checkpoint's manifest says besides the metric window.
      window: metric sums since the last log line, from the checkpoint that a run resumes.
      profile: the steps to trace; the device is idle around them, so that the trace has them whole and alone.
      bad_steps: sees the metrics of every step, and ends a run that only makes NaN.
    """
    step = int(state.step)
    reader = _Reader(window or MetricSums(), intervals, work, writer, describe, num_train_steps)
    reader.bad_steps = bad_steps or BadSteps()
    bar = tqdm(
        total=num_train_steps, initial=step, unit="step", disable=not progress, mininterval=0.5
    )
    reader.bar = bar
    batch = next(batches) if step < num_train_steps else None
    reader.clock.restart()
    while step < num_train_steps:
        if profile and profile.is_due(step + 1):
            reader.pause(profile.start)
        with annotate_step(step + 1):
            state, metrics = train_step(state, batch)
        step += 1
        if step < num_train_steps:
            asked = time.perf_counter()
            batch = next(batches)
            reader.clock.waited += time.perf_counter() - asked
        reader.push(step, metrics)
        if profile and profile.is_over(step, num_train_steps):
            reader.pause(profile.stop)

        evaluating = evaluate and intervals.due(step, intervals.evaluate, num_train_steps)
        saving = checkpoints and intervals.due(step, intervals.checkpoint, num_train_steps)
        if not (evaluating or saving):
            continue
        reader.flush()
        paused = time.perf_counter()
        values, stopping = None, False
        if evaluating:
            values = evaluate(state, step)
            if writer:
                writer.write(step, "eval", values)
            if on_evaluation:
                state = on_evaluation(state, values)
            for callback in callbacks:
                callback(state, step)
            stopping = should_stop()
        if checkpoints and (saving or stopping):
            if writer:
                writer.flush()
            # A copy: the manifest is written in the background, while the sums go on.
            content = manifest(step) | {"window": reader.window.copy()}
            checkpoints.save(step, state, content, values)
        reader.clock.since += time.perf_counter() - paused
        if stopping:
            break
    reader.flush()
    bar.close()
    if checkpoints:
        checkpoints.wait()
    return state


class _Reader:
    """Reads each step's metrics one step late, shows them to the guard against bad steps, and logs them."""

    def __init__(self, window, intervals, work, writer, describe, last):
        self.window, self.intervals, self.work = window, intervals, work
        self.writer, self.describe, self.last = writer, describe, last
        self.clock, self.pending, self.bad_steps = Clock(), None, BadSteps()
        self.bar: Any = None

    def push(self, step: int, metrics) -> None:
        self.flush()
        self.pending = (step, metrics)

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        metrics = jax.device_get(metrics)
        self.window.add(self.bad_steps.see(step, metrics))
        self.clock.steps += 1
        self.bar.update()
        if Intervals.due(step, self.intervals.log, self.last):
            self._log(step)

    def pause(self, action: Callable[[], None]) -> None:
        """Does something between two steps, when all that was launched has run; its time is not the steps'."""
        self.flush()
        paused = time.perf_counter()
        action()
        self.clock.since += time.perf_counter() - paused

    def _log(self, step: int) -> None:
        values = self.window.means() | self.clock.report(self.work) | self.describe(step)
        if self.writer:
            self.writer.write(step, "train", values)
        self.bar.set_postfix_str(
            f"loss {values.get('loss', float('nan')):.4f}, {values['tokens_per_second']:,.0f} tokens/s, "
            f"MFU {values['mfu']:.1%}"
        )
        self.window.sums.clear()
        self.clock.restart()
