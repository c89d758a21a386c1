"""A run that hangs says where, and ends with a status of its own; a slow one is left alone."""

import signal
import time

import pytest

from jaxlm import exits
from tests import tiny
from tests.faults.runs import at_point, check_same_run, end, start

LIMIT = 4  # seconds without a sign of life; four times as many for a save


def hang(config, workdir, action):
    """(status, what it said, seconds) of a run whose disk hangs in its second save."""
    command = tiny.pretrain_command(config, workdir, f"--config.guards.watchdog_seconds={LIMIT}")
    began = time.monotonic()
    status, said = end(start(at_point(command, "the arrays are complete", 2, action)))
    return status, said, time.monotonic() - began


def check_hung(status, said, workdir):
    """The status, and the stacks of all threads, where they are looked for: of the one that hangs and of the one that waits."""
    assert status == exits.HUNG, (status, said[-3000:])
    assert f"exit status {exits.HUNG}" in said
    for stacks in (said, (workdir / "stacks-0.txt").read_text()):
        assert "in hang" in stacks and "in _between_steps" in stacks


def test_a_save_that_hangs_ends_the_run_with_all_stacks(tmp_path, unbroken):
    config, whole = unbroken
    workdir = tmp_path / "run"
    status, said, _ = hang(config, workdir, "hang")
    check_hung(status, said, workdir)
    tiny.run(tiny.pretrain_command(config, workdir))
    check_same_run(workdir, whole)


def test_code_that_hangs_with_pythons_lock_is_ended_all_the_same(tmp_path, unbroken):
    """No Python runs any more: the kernel's alarm ends the process, after the stacks are written."""
    config, _ = unbroken
    status, said, _ = hang(config, tmp_path / "run", "hang_with_the_lock")
    assert status == -signal.SIGALRM, (status, said[-3000:])
    assert "in hang_with_the_lock" in said and "in _between_steps" in said


def test_the_law_of_a_hang_fails_for_a_run_that_ends_well(unbroken):
    _, whole = unbroken
    with pytest.raises(AssertionError):
        check_hung(exits.DONE, "", whole)
