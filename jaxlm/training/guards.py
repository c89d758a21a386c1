"""Steps that went bad: counted, left out of the means, and the end of a run that only makes them."""

from collections.abc import Mapping
from typing import Any

from jaxlm.exits import Diverged

# What a step without a finite loss and gradient still says.
STAY = ("skipped", "learning_rate", "param_norm")


class BadSteps:
    """Sees the metrics of every step, on the host.

    limit: after this many steps in a row without a finite loss and gradient a run cannot recover by itself.
    """

    def __init__(self, limit: int = 20):
        self.limit, self.in_a_row = limit, 0

    def see(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics that count: of a bad step its sums are no numbers, and would make the mean of a log window none.

        Raises:
          Diverged: at `limit` bad steps in a row.
        """
        if not metrics.get("skipped", (0, 1))[0]:
            self.in_a_row = 0
            return dict(metrics)
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise Diverged(
                f"the loss or gradient was not finite in {self.in_a_row} steps in a row, up to step {step}: "
                "lower optimizer.learning_rate, raise warmup_steps, or look at the data of these steps"
            )
        return {name: value for name, value in metrics.items() if name in STAY}
