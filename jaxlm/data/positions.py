"""Which batch a step trains on: the one of its own number, until a rewind leaves some out.

A run whose 5th and 6th step are bad, and which leaves 3 batches out, goes back to where 3 steps were finished:

    finished steps   0 1 2 3 4 5      then   3 4 5 6 …
    batch            0 1 2 3 4 5             6 7 8 9 …

The batch of a step is arithmetic of its number and the list of all rewinds, so it is the same in every process and after
every restart; batch k itself stays what it is.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.files import write_text

FILE = "rewinds.json"


class Rewind(NamedTuple):
    """From the step after `step` finished ones on, batches go on from number `batch`: those that were left out end there.

    bad_steps: the first and the last of the steps in a row that led to it, counted from 1.
    """

    step: int
    batch: int
    bad_steps: tuple[int, int]


def position(step: int, rewinds: Sequence[Rewind]) -> int:
    """The number of the batch that is trained on after `step` finished steps.

    A later rewind is what holds from its step on, also for steps that an earlier one moved.
    """
    for rewind in reversed(rewinds):
        if rewind.step <= step:
            return rewind.batch + step - rewind.step
    return step


def plan_rewind(
    bad_steps: tuple[int, int], skip: int, rewinds: Sequence[Rewind], oldest: int
) -> Rewind:
    """Leaves out the `skip` batches that end with that of the last bad step.

    So where it begins does not depend on how often checkpoints are made. More are left out only if the run's start, the oldest
    checkpoint, or batches that an earlier rewind left out, are among them.

    bad_steps: the first and the last one in a row, from 1. oldest: the step of the oldest checkpoint. One that was saved among
      the bad steps is gone back to only if there is no other: they left its state as it was, too.
    """
    first, last = bad_steps
    step = max(min(last - skip, first - 1), oldest)
    batch = max(position(step, rewinds) + skip, position(last, rewinds))
    return Rewind(step, batch, bad_steps)


def read_rewinds(workdir: Path) -> list[Rewind]:
    """All rewinds of a run so far, oldest first."""
    path = workdir / FILE
    if not path.is_file():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [Rewind(e["step"], e["batch"], tuple(e["bad_steps"])) for e in entries]


def write_rewinds(workdir: Path, rewinds: Sequence[Rewind]) -> None:
    """Writes all rewinds of a run into its folder."""
    write_text(workdir / FILE, json.dumps(as_json(rewinds), indent=1) + "\n")


def as_json(rewinds: Sequence[Rewind]) -> list[dict[str, Any]]:
    """Rewinds as `read_rewinds` reads them."""
    return [{**rewind._asdict(), "bad_steps": list(rewind.bad_steps)} for rewind in rewinds]


class StepBatches:
    """`batches` by the step that trains on them: what is read ahead of a run.

    batches: gives batch k as `batches[k]`. num_steps: `len`.
    """

    def __init__(self, batches: Any, rewinds: Sequence[Rewind], num_steps: int):
        self.batches, self.rewinds, self.num_steps = batches, tuple(rewinds), num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Any:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"found step {step}; expected 0 <= step < {self.num_steps}")
        return self.batches[position(step, self.rewinds)]
