"""The training loop: the same for every objective and task, one step ahead of what it reads."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.goodput import Ledger
from jaxlm.training.guards import BadSteps
from jaxlm.training.metrics import MetricSums, MetricWriter
from jaxlm.training.profile import Profile, annotate_step
from jaxlm.training.progress import Progress
from jaxlm.training.session import Session
from jaxlm.training.state import TrainState
from jaxlm.training.stopping import EvaluationLeft

Metrics = dict[str, float]


@dataclass(frozen=True)
class Intervals:
    """How often, in steps: log, evaluate, checkpoint. 0 means at the end of the run only."""

    log: int
    evaluate: int
    checkpoint: int

    @staticmethod
    def due(step: int, every: int, last: int) -> bool:
        """Whether what is done `every` steps, and after the last, is done after this one. 0: only after the last."""
        return step == last or (every > 0 and step % every == 0)


@dataclass(frozen=True)
class Work:
    """The size of a step, from which the loop derives tokens/s and MFU."""

    tokens_per_step: float
    flops_per_step: float
    peak_flops: float


@dataclass
class Resumed:
    """What was open when a checkpoint was saved, and goes on where the run is resumed.

    window: metric sums since the last log line. bad_steps: records of the bad steps in a row.
    evaluation_left: the evaluation of this step is still to be made: the run was stopped before it or in its midst.
    """

    window: MetricSums = field(default_factory=MetricSums)
    bad_steps: list[Any] = field(default_factory=list)
    evaluation_left: bool = False

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "Resumed":
        """From a checkpoint's manifest; the older ones have the window alone."""
        row, left = manifest.get("bad_steps", []), manifest.get("evaluation_left", False)
        return cls(MetricSums(manifest["window"]), row, left)


@dataclass(kw_only=True)
class Loop:
    """Trains to `num_train_steps`.

    While a step runs, the next batch is fetched and the metrics of the step *before* are read, so the
    device never waits for the host and no more than two steps are in flight.

    Attributes:
      train_step: jitted (state, batch) -> (state, metrics as (total, weight) pairs); the state is donated.
      evaluate: (state, step) -> (state, metrics of the held-out text), before the checkpoint of the same step. The state
        is the one given, but for what follows from the metrics, as reduce-on-plateau.
      is_over: asked after each evaluation; True saves a checkpoint and ends the run.
      describe: step -> further fields of a training log line.
      manifest: step -> what a checkpoint's manifest says besides what is open (`Resumed`).
      resumed: what was open at the checkpoint that the run goes on from.
      profile: the steps to trace; the device is idle around them, so that the trace has them whole and alone.
      bad_steps: sees the metrics of every step, and ends a run that only makes NaN.
      session: when to stop early, the watchdog, and where the time goes.
    """

    train_step: Callable
    num_train_steps: int
    intervals: Intervals
    work: Work
    evaluate: Callable[[TrainState, int], tuple[TrainState, Metrics]] | None = None
    is_over: Callable[[], bool] = lambda: False
    checkpoints: Checkpoints | None = None
    writer: MetricWriter | None = None
    describe: Callable[[int], dict[str, Any]] = lambda step: {}
    manifest: Callable[[int], dict[str, Any]] = lambda step: {}
    resumed: Resumed = field(default_factory=Resumed)
    progress: bool = True
    profile: Profile | None = None
    bad_steps: BadSteps = field(default_factory=BadSteps)
    session: Session = field(default_factory=Session)

    def fit(self, state: TrainState, batches: Iterator) -> TrainState:
        """Trains from `state.step` on and returns the last state. batches: on the devices, from that step on."""
        step, last, spend = int(state.step), self.num_train_steps, self.session.ledger.spend
        shown = Progress(step, last, self.progress)
        with self.session.running(), shown:
            reader = _Reader(self, shown)
            if self.resumed.evaluation_left:
                state, _ = self._evaluate(state, step, shown)
            batch = next(batches) if step < last else None
            over = False
            while step < last and not over:
                if self.profile and self.profile.is_due(step + 1):
                    reader.pause(self.profile.start)
                with annotate_step(step + 1):
                    state, metrics = self.train_step(state, batch)
                step += 1
                if step < last:
                    with spend("input"):
                        batch = next(batches)
                reader.push(step, metrics)
                if self.profile and self.profile.is_over(step, last):
                    reader.pause(self.profile.stop)
                if self.checkpoints:
                    self.checkpoints.check()
                state, over = self._between_steps(state, step, reader)
            reader.flush()
            if self.checkpoints:
                with spend("saving"):
                    self.checkpoints.wait()
        return state

    def _between_steps(
        self, state: TrainState, step: int, reader: "_Reader"
    ) -> tuple[TrainState, bool]:
        """Evaluates and saves where it is time; and whether the run ends here."""
        due = lambda every: Intervals.due(step, every, self.num_train_steps)
        evaluating = bool(self.evaluate) and due(self.intervals.evaluate)
        stopping = self.session.stop.is_due()
        if not (evaluating or stopping or due(self.intervals.checkpoint)):
            return state, False
        reader.flush()
        values, left = None, False
        if evaluating:
            try:
                self.session.leave_if(stopping)
                state, values = self._evaluate(state, step, reader.shown)
            except EvaluationLeft:
                left = stopping = True
            stopping = stopping or self.is_over() or self.session.stop.is_due()
        if self.checkpoints and (stopping or due(self.intervals.checkpoint)):
            open_now = {
                # A copy: the manifest is written in the background, while the sums go on.
                "window": reader.window.copy(),
                "bad_steps": list(self.bad_steps.row),
                "evaluation_left": left,
            }
            with self.session.spend("saving"):
                if self.writer:
                    self.writer.flush()
                self.checkpoints.save(step, state, self.manifest(step) | open_now, values)
        return state, stopping

    def _evaluate(
        self, state: TrainState, step: int, shown: Progress
    ) -> tuple[TrainState, Metrics]:
        assert self.evaluate is not None
        with self.session.spend("evaluation"):
            state, values = self.evaluate(state, step)
        if self.writer:
            self.writer.write(step, "eval", values)
        shown.evaluated(values)
        return state, values


class _Reader:
    """Reads each step's metrics one step late, shows them to the guard against bad steps, and logs them."""

    def __init__(self, loop: Loop, shown: Progress):
        self.loop, self.shown, self.window = loop, shown, loop.resumed.window
        self.clock = _Clock(loop.session.ledger)
        self.pending: tuple[int, Any] | None = None
        self.is_first = True

    def push(self, step: int, metrics) -> None:
        self.flush()
        self.pending = (step, metrics)

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        metrics = jax.device_get(metrics)
        self.window.add(self.loop.bad_steps.see(step, metrics))
        self.loop.session.did_step(step, useful=not self.loop.bad_steps.row)
        self.clock.steps += 1
        self.shown.did_step(step)
        if Intervals.due(step, self.loop.intervals.log, self.loop.num_train_steps):
            self._log(step)
        elif self.is_first:
            self.clock.restart()  # what the first step took was the compiler's
        self.is_first = False

    def pause(self, action: Callable[[], None]) -> None:
        """Does something between two steps, when all that was launched has run; its time is not the steps'."""
        self.flush()
        with self.loop.session.spend("profile"):
            action()

    def _log(self, step: int) -> None:
        speed = self.clock.report(self.loop.work)
        values = self.window.means() | speed | self.loop.describe(step)
        if self.loop.writer:
            self.loop.writer.write(step, "train", values)
        self.shown.logged(values)
        self.window.sums.clear()
        self.clock.restart()
        self.loop.session.ledger.write()


class _Clock:
    """Wall time of the steps since the last log line; evaluation, saving and the like are not charged to them."""

    CHARGED = ("compile", "step", "input")

    def __init__(self, ledger: Ledger):
        self.ledger, self.started = ledger, time.perf_counter()
        self.restart()

    def restart(self) -> None:
        self.since, self.steps = self.ledger.totals(), 0

    def report(self, work: Work) -> Metrics:
        now = self.ledger.totals()
        spent = {cause: now.get(cause, 0) - self.since.get(cause, 0) for cause in self.CHARGED}
        seconds, steps = max(sum(spent.values()), 1e-9), max(self.steps, 1)
        return {
            "tokens_per_second": steps * work.tokens_per_step / seconds,
            "step_seconds": seconds / steps,
            "mfu": steps * work.flops_per_step / seconds / work.peak_flops,
            "input_wait": spent["input"] / seconds,
            "seconds": time.perf_counter() - self.started,
        }
