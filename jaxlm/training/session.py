"""One process's life of a run, around its steps: when it is to stop, whether it still moves, where its time goes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxlm.training.goodput import Ledger
from jaxlm.training.stopping import EvaluationLeft, Stop
from jaxlm.training.watchdog import Watchdog


@dataclass
class Session:
    """What the loop tells of itself, and asks.

    leaves_evaluation: whether a stop may come before an evaluation, or in its midst; it is then made where the run goes
      on. Not where checkpoints compete by it for being the best: one that is saved without it never could.
    """

    stop: Stop = field(default_factory=Stop)
    watchdog: Watchdog = field(default_factory=Watchdog)
    ledger: Ledger = field(default_factory=Ledger)
    leaves_evaluation: bool = True

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around the steps, of which the first is compiled; after it a signal waits for the end of a step."""
        with self.watchdog.watching(), self.stop.around_steps():
            self.ledger.switch("compile")
            try:
                yield
            finally:
                self.ledger.switch("end")

    def did_step(self, step: int, *, useful: bool) -> None:
        """A step has run on the devices. useful: it was applied."""
        self.stop.defer()
        self.watchdog.did_step()
        self.ledger.did(step, useful=useful)

    def did_batch(self) -> None:
        """A batch of an evaluation is read; all processes read the same ones in the same order.

        Raises:
          EvaluationLeft: the run is to stop here.
        """
        self.watchdog.beat()
        self.leave_if(self.stop.is_due())

    def leave_if(self, stopping: bool) -> None:
        """Raises EvaluationLeft, if a stop may leave this evaluation for later."""
        if stopping and self.leaves_evaluation:
            raise EvaluationLeft

    @contextlib.contextmanager
    def spend(self, cause: str) -> Iterator[None]:
        """Work between two steps: its time is charged to `cause`, and it has the watchdog's longer limit."""
        with self.ledger.spend(cause), self.watchdog.patient():
            yield
