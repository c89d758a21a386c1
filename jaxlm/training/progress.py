"""What a person sees of a run that goes on: a bar where a line can be written anew, lines where it cannot."""

import logging
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from tqdm import tqdm

log = logging.getLogger("jaxlm")
SHOWN = 6  # numbers of an evaluation; all of them are in metrics.jsonl


class Progress:
    """Steps of a run, on stderr: a bar in a terminal or a notebook, else (files, Slurm, CI) a line of the log at each of `logged`.

    Evaluations are lines in both. last: the step that the run ends with. shown: False for none of it.
    """

    def __init__(self, step: int, last: int, shown: bool = True):
        self.step, self.last, self.shown = step, last, shown
        self.bar = tqdm(
            total=last,
            initial=step,
            unit="step",
            disable=not (shown and rewrites_lines()),
            mininterval=0.5,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def did_step(self, step: int) -> None:
        """Counts one more step, the `step`-th."""
        self.step = step
        self.bar.update()

    def logged(self, values: Mapping[str, float]) -> None:
        """values: of a training line: loss (nats), tokens_per_second, mfu, step_seconds."""
        says = (
            f"loss {values.get('loss', float('nan')):.4f}, {values['tokens_per_second']:,.0f} tokens/s, "
            f"MFU {values['mfu']:.1%}"
        )
        if not self.bar.disable:
            self.bar.set_postfix_str(says)
        elif self.shown:
            left = timedelta(seconds=round((self.last - self.step) * values["step_seconds"]))
            log.info("step %s of %s: %s, %s left", self.step, self.last, says, left)

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """values: of an evaluation; the first few numbers are shown."""
        if not self.shown:
            return
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        says = ", ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:SHOWN])
        line = f"step {self.step} of {self.last}, held out: {says}"
        if self.bar.disable:
            log.info(line)
        else:
            self.bar.write(line, file=sys.stderr)


def rewrites_lines() -> bool:
    """Whether stderr is a terminal or a notebook's output."""
    ipython = sys.modules.get("IPython")  # programs that only start notebooks import ipykernel, too
    return sys.stderr.isatty() or (ipython is not None and ipython.get_ipython() is not None)
