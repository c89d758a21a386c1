"""How a run ends: the exit statuses that scripts, job queues and people act on, and the errors that carry them.

Numbers are those of sysexits.h where it has the meaning. From PEER_LOST on, the same command is to be run again: it goes on
from the newest checkpoint.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.private import keep_private, redact

DONE = 0
FAILED = 1  # any other error, with its traceback
DAMAGED = 65  # EX_DATAERR: what checkpoints or stores hold is not what was written
DIVERGED = 70  # EX_SOFTWARE: too many steps in a row without a finite loss and gradient
CORRUPTED = 71  # EX_OSERR: the same step gave two results, or copies of one array differ: not this machine again
LOCKED = 73  # EX_CANTCREAT: another run has the workdir
NOT_SAVED = 74  # EX_IOERR: a checkpoint could not be written
PEER_LOST = 75  # EX_TEMPFAIL: another process of the run is gone
STOPPED = 76  # a signal asked for the end: the step was finished and saved
HUNG = 77  # no step for too long: all stacks were written

MEANINGS = {
    DONE: "the run is complete",
    FAILED: "an error, which is printed",
    DAMAGED: "checkpoints or stores are damaged",
    DIVERGED: "loss, gradient or parameters were not finite",
    CORRUPTED: "this machine computes wrong numbers",
    LOCKED: "another run has the workdir",
    NOT_SAVED: "a checkpoint could not be written",
    PEER_LOST: "another process of the run is gone",
    STOPPED: "stopped by a signal, and saved",
    HUNG: "no step for too long",
}


class RunError(RuntimeError):
    """An error whose message says it all, so no traceback is shown; `status` is what the process ends with."""

    status = FAILED


class Damaged(RunError):
    status = DAMAGED


class Diverged(RunError, FloatingPointError):
    """bad_steps: a record of each of the steps in a row that led here: {"step": …, metric: its value}."""

    status = DIVERGED

    def __init__(self, message: str, bad_steps: Sequence[Mapping[str, Any]]):
        super().__init__(message)
        self.bad_steps = bad_steps


class Corrupted(RunError):
    status = CORRUPTED


class Locked(RunError):
    status = LOCKED


class NotSaved(RunError):
    status = NOT_SAVED


class Stopped(RunError):
    status = STOPPED


def with_status(main: Callable[..., Any]) -> Callable[..., Any]:
    """`main` of a program; a RunError becomes its message, without a traceback, and its status. The process keeps to itself
    what is its own (`private`)."""

    @functools.wraps(main)
    def run(*arguments: Any) -> Any:
        keep_private()
        try:
            return main(*arguments)
        except RunError as error:
            print(redact(str(error)), file=sys.stderr, flush=True)
            sys.exit(error.status)
        except SystemExit as error:
            sys.exit(redact(error.code) if isinstance(error.code, str) else error.code)

    return run
