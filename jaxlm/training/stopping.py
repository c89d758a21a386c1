"""SIGTERM and SIGINT: the step is finished and saved; the second signal ends the process at once.

    with stopping.signals() as stop:        in the main thread, after the processes have joined
        …                                   a signal ends what goes on here: nothing is lost
        with stop.around_steps():
            stop.defer()                    from the first finished step on a signal waits for …
            while not stop.is_due():        … the end of a unit of work, the same one in all processes
                …

Python runs a signal's handler between two instructions of the main thread, which may be in XLA's compiler for minutes. So a
thread of its own learns of signals at once, through the descriptor that Python's C handler writes to.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from jaxlm.exits import STOPPED, Stopped
from jaxlm.parallel import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 0.1  # timeout(1) and some schedulers signal a process, and at once its group
UNWIND_SECONDS = 5.0  # for temporary files to be removed, where there is nothing to save
KEY = "stop"


class EvaluationLeft(Exception):
    """A stop was asked for in the midst of an evaluation."""


class Stop:
    """When to stop. A unit of work is a step or a batch of an evaluation: all processes do the same ones in the same order.

    Of several processes one or more get the signal. Each has a thread that hears of it, says how many units its own
    process has done, and holds back the next `is_due` until all have said theirs. The run stops after one unit more
    than the largest of these numbers, which nobody can have passed. A look at each unit costs a lock, and no message.
    """

    def __init__(self, numbers: int = -1) -> None:
        """numbers: a descriptor to write those of signals to; see `signals`."""
        self.asked = ""  # 'SIGTERM', or '' as long as nobody has
        self.is_interrupted = False  # what went on has been ended, there being nothing to save
        self._numbers, self._handled, self._read = numbers, 0, 0
        self._done, self._last = 0, float("inf")
        self._deferring = self._leaving = False
        self._lock = threading.Lock()

    def is_due(self) -> bool:
        """Whether to stop now. To be asked once after each unit of work."""
        with self._lock:
            self._done += 1
            return self._done >= self._last

    @contextlib.contextmanager
    def around_steps(self) -> Iterator[None]:
        """The steps of a run; after them a stop waits for nothing more."""
        try:
            yield
        finally:
            self._deferring = False

    def defer(self) -> None:
        """From here on a stop waits for the end of a unit: there is something to save."""
        if not self._deferring:
            self._deferring = True
            if self._leaving:
                self._interrupt()

    def _interrupt(self) -> None:
        self.is_interrupted = True
        raise KeyboardInterrupt  # which no `except Exception` takes for an error of what it is about

    def handle(self, number: int, frame: object) -> None:
        """The handler of a signal, in the main thread. It takes no lock: the main thread may hold it."""
        self._handled += 1
        if self._handled > self._read:  # an event loop has put its own descriptor in place of ours
            os.write(self._numbers, bytes([number]))
        if not self._deferring:
            self._interrupt()

    def watch(self, numbers: int) -> None:
        """Reads the numbers of signals from a descriptor, as they come."""
        first = float("inf")
        while number := os.read(numbers, 1):
            if number[0] not in SIGNALS:
                continue
            self._read += 1
            now = time.monotonic()
            if now < first + ECHO_SECONDS < float("inf"):
                continue
            if first < now:
                os._exit(128 + number[0])
            first = now
            threading.Thread(target=self._ask, args=(number[0],), daemon=True).start()
        os.close(numbers)

    def _ask(self, number: int) -> None:
        self._leaving = True  # before the look: `defer` sets and looks the other way round
        if not self._deferring:
            time.sleep(UNWIND_SECONDS)
            os._exit(STOPPED)
        self._leaving = False
        name = signal.Signals(number).name
        if processes.count() > 1:
            processes.say_once(KEY, name)
        else:
            self.agree(name)

    def listen(self) -> None:
        """Waits for any of several processes to be asked."""
        if name := processes.hear(KEY):
            self.agree(name)

    def agree(self, name: str) -> None:
        """Finds the unit to stop after, with all other processes; they have to call it, too. name: of the signal."""
        with self._lock:
            self.asked = name
            self._last = max(map(int, processes.gather(KEY, str(self._done)))) + 1


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """A `Stop` that SIGTERM and SIGINT ask for. In the main thread; after XLA's own handlers are there, which it replaces.

    Raises:
      Stopped: a signal came while there was nothing to save.
    """
    read, write = os.pipe()
    stop = Stop(write)
    os.set_blocking(write, False)
    handlers = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=stop.watch, args=(read,), daemon=True).start()
    if processes.count() > 1:
        threading.Thread(target=stop.listen, daemon=True).start()
    try:
        yield stop
    except (KeyboardInterrupt, Exception) as error:
        # C++ that calls Python, as SentencePiece's training does, makes an error of its own of an interrupt.
        if not (stop.is_interrupted or isinstance(error, KeyboardInterrupt)):
            raise
        raise Stopped(
            "stopped by a signal, with nothing new to save; the same command goes on from the newest checkpoint"
        ) from None
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write)  # ends the thread that reads
