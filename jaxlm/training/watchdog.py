"""A run that does not move any more says where it hangs, and ends, so that it can be started again."""

import contextlib
import faulthandler
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxlm.exits import HUNG
from jaxlm.files import write_text
from jaxlm.parallel import processes

log = logging.getLogger("jaxlm")

PATIENCE = (
    4.0  # times the limit: for the first step, which is compiled, an evaluation, a checkpoint
)
LOOKS = 20  # per limit, but at least one in LOOK_SECONDS
LOOK_SECONDS = 1.0
OTHERS_SECONDS = (
    3.0  # for the other processes of the run, which wait for this one, to say where they hang
)


class Watchdog:
    """Ends the process with status HUNG and all stacks, if it has not beaten for `seconds`; 0: it never does.

    A thread looks, and winds up the kernel's alarm. If hung C code holds Python's lock, the thread cannot run: then the alarm
    goes off half a limit later, faulthandler's handler, which needs no lock, writes the stacks to standard error, and the
    signal ends the process (a shell's status 142).

    workdir: gets `stacks-PROCESS.txt`.
    """

    def __init__(self, seconds: float = 0.0, workdir: Path | None = None):
        self.seconds, self.workdir = seconds, workdir
        self._beat, self._patience = 0.0, PATIENCE

    def beat(self) -> None:
        """Says that the run has moved."""
        self._beat = time.monotonic()

    def did_step(self) -> None:
        """A step is over, and so is what the first one has more time for."""
        self._beat, self._patience = time.monotonic(), 1.0

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Around what may take longer than a step."""
        before, self._beat, self._patience = self._patience, time.monotonic(), PATIENCE
        try:
            yield
        finally:
            self._beat, self._patience = time.monotonic(), before

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the steps, of which the first has more time."""
        if not self.seconds:
            yield
            return
        over = threading.Event()
        faulthandler.register(signal.SIGALRM, chain=True)
        self._beat, self._patience = time.monotonic(), PATIENCE
        thread = threading.Thread(target=self._look, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)

    def _look(self, over: threading.Event) -> None:
        left = self.seconds * PATIENCE
        while left > 0:
            signal.setitimer(signal.ITIMER_REAL, left + self.seconds / 2)
            if over.wait(min(self.seconds / LOOKS, LOOK_SECONDS)):
                return
            silent = time.monotonic() - self._beat
            left = self.seconds * self._patience - silent
        self._end(silent)

    def _end(self, silent: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        number = processes.index()
        text = (
            f"process {number}: no step, no batch of an evaluation and no checkpoint for {silent:.0f} s (guards.watchdog_seconds "
            f"{self.seconds:g}); where it hangs: below, most recent call first; exit status {HUNG}\n{stacks}"
        )
        os.write(2, text.encode())  # at once: sys.stderr may be locked by a thread that hangs
        if self.workdir is not None:
            saving = threading.Thread(
                target=write_text, args=(self.workdir / f"stacks-{number}.txt", text), daemon=True
            )
            saving.start()
            saving.join(10)  # the disk may be what hangs
        if processes.count() > 1:
            time.sleep(OTHERS_SECONDS)
        os._exit(HUNG)
