"""All processes stop after the same unit of work, whoever is ahead when the signal comes."""

import random
import threading
import time

import pytest

from jaxlm.parallel import processes
from jaxlm.training.stopping import Stop

COUNT, AHEAD, UNITS = 4, 2, 300


class Lockstep:
    """What collectives do to processes: none begins a unit before all are done with the one AHEAD units earlier."""

    def __init__(self):
        self.done, self.moved = [0] * COUNT, threading.Condition()

    def do(self, index, unit):
        with self.moved:
            assert self.moved.wait_for(lambda: min(self.done) >= unit - AHEAD, timeout=30), "stuck"
            self.done[index] = unit
            self.moved.notify_all()

    def gone(self, index):
        with self.moved:
            self.done[index] = UNITS + AHEAD
            self.moved.notify_all()


def stopped_after(make_stop, seed, monkeypatch):
    """The unit after which each of COUNT processes, which are threads here, stops; all hear of the signal at some time."""
    rng, lockstep, stops = random.Random(seed), Lockstep(), [make_stop() for _ in range(COUNT)]
    meeting, said = threading.Barrier(COUNT), [""] * COUNT

    def gather(name, text):
        said[int(threading.current_thread().name)] = text
        meeting.wait(30)
        return said

    monkeypatch.setattr(processes, "gather", gather)
    delays = [[rng.random() * 2e-4 for _ in range(UNITS)] for _ in range(COUNT)]
    after = [0] * COUNT

    def work(index):
        for unit in range(1, UNITS + 1):
            lockstep.do(index, unit)
            time.sleep(delays[index][unit - 1])
            after[index] = unit
            if stops[index].is_due():
                break
        lockstep.gone(index)

    def hear(index, seconds):
        time.sleep(seconds)
        stops[index].agree("SIGTERM")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(COUNT)]
    when = rng.random() * 0.03
    for i in range(COUNT):
        late = when + rng.random() * 3e-3
        threads.append(threading.Thread(target=hear, args=(i, late), name=str(i)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return after


def check_all_stop_together(make_stop, monkeypatch, seeds=range(20)):
    for seed in seeds:
        after = stopped_after(make_stop, seed, monkeypatch)
        assert len(set(after)) == 1, f"seed {seed}: after {after}"


def test_all_processes_stop_after_the_same_unit(monkeypatch):
    check_all_stop_together(Stop, monkeypatch)


class Hasty(Stop):
    """Stops as soon as it has heard."""

    def agree(self, name):
        self._last = self._done + 1


def test_the_law_fails_if_each_stops_when_it_hears(monkeypatch):
    with pytest.raises(AssertionError, match="after"):
        check_all_stop_together(Hasty, monkeypatch)


def test_alone_it_stops_after_the_unit_that_runs():
    stop = Stop()
    assert not stop.is_due() and not stop.asked
    stop.agree("SIGINT")
    assert stop.is_due() and stop.is_due() and stop.asked == "SIGINT"
