"""How a run ends: the exit statuses that scripts, job queues and people act on, and the errors that carry them.

Numbers are those of sysexits.h where it has the meaning. From PEER_LOST on, the same command is to be run again: it goes on
from the newest checkpoint.
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.private import keep_private, redact

DONE = 0
FAILED = 1  # any other error
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
    """A file is not what was written."""

    status = DAMAGED


class Diverged(RunError, FloatingPointError):
    """bad_steps: a record of each of the steps in a row that led here: {"step": …, metric: its value}."""

    status = DIVERGED

    def __init__(self, message: str, bad_steps: Sequence[Mapping[str, Any]]):
        super().__init__(message)
        self.bad_steps = bad_steps


class Corrupted(RunError):
    """The same step gave two results, or copies of one array differ."""

    status = CORRUPTED


class Locked(RunError):
    """Another run has the workdir."""

    status = LOCKED


class NotSaved(RunError):
    """A checkpoint could not be written."""

    status = NOT_SAVED


class Stopped(RunError):
    """A signal asked for the end: the step was finished and saved."""

    status = STOPPED


# Where errors are raised that are written for people, and not for those who change the code.
OURS = (Path(__file__).parent, *(Path(__file__).parents[1] / name for name in ("configs", "tools")))
OUT_OF_MEMORY = (
    "out of memory: {error}\n"
    "Take less at a time (--config.batch_size, or --config.accumulation_steps=N for the same batch in N parts; --config.remat=full; "
    "a shorter seq_len), or share it out (--config.mesh.fsdp=N over N devices). `jaxlm-tool plan` says what fills the memory."
)
NO_DEVICES = (
    "jax finds no device, with JAX_PLATFORMS={platforms!r}: {error}\n"
    "Install jax for this machine (pip install 'jaxlm[tpu]' or 'jaxlm[cuda12]'), end the process that has the device, or unset "
    "JAX_PLATFORMS to take what there is. `jaxlm-tool doctor` looks for the cause."
)


def message_of(error: BaseException) -> str | None:
    """What is said of an error instead of its traceback; None if only the traceback tells what happened.

    A message of its own have: ends of a run; what a `raise` of ours says about what was asked for; what the system says
    about files and connections; memory and devices that are not there. All else is a fault of a program, and so is
    everything where JAXLM_TRACEBACK is set.
    """
    if isinstance(error, RunError):
        return str(error)
    if os.environ.get("JAXLM_TRACEBACK"):
        return None
    first_line = str(error).split("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, (RuntimeError, ValueError)) and "RESOURCE_EXHAUSTED" in first_line:
        return OUT_OF_MEMORY.format(error=first_line)
    if frames and frames[-1].filename.endswith("jax/_src/xla_bridge.py"):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return NO_DEVICES.format(error=first_line or "it is not installed", platforms=platforms)
    if isinstance(error, OSError) or (
        isinstance(error, (ValueError, ImportError)) and _is_ours(frames)
    ):
        return str(error)
    return None


def _is_ours(frames: traceback.StackSummary) -> bool:
    """Whether a `raise` in our own files made the error: what a call in them failed with is no message."""
    path, line = Path(frames[-1].filename), frames[-1].line or ""
    return line.startswith("raise ") and any(path.is_relative_to(folder) for folder in OURS)


def with_status(main: Callable[..., Any]) -> Callable[..., Any]:
    """`main` of a program; an error that has a message becomes it (`message_of`), and its status. The process keeps to
    itself what is its own (`private`)."""

    @functools.wraps(main)
    def run(*arguments: Any) -> Any:
        keep_private()
        try:
            return main(*arguments)
        except SystemExit as error:
            sys.exit(redact(error.code) if isinstance(error.code, str) else error.code)
        except Exception as error:
            if (message := message_of(error)) is None:
                raise
            print(redact(message), file=sys.stderr, flush=True)
            sys.exit(error.status if isinstance(error, RunError) else FAILED)

    return run
