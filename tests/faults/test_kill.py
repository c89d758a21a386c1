"""A run that is killed, whenever and wherever, and started again, is bit by bit the run that was never killed."""

import random
import shutil
import signal

import pytest

from tests import tiny
from tests.faults.at_point import POINTS
from tests.faults.runs import (
    at_point,
    check_same_run,
    count_lines,
    end,
    start,
    unfinished,
    wait_for,
)

KILLS = 5
LINES = 25  # of a whole run
MARK = "left behind"


def kill_after(command, workdir, lines):
    """Starts the command and kills it, without warning, once it has logged that many lines."""
    child = start(command)
    wait_for(child, lambda: count_lines(workdir) >= lines, f"{lines} lines")
    child.send_signal(signal.SIGKILL)
    status, said = end(child)
    assert status == -signal.SIGKILL, (status, said)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_a_run_killed_at_random_times_ends_as_the_unbroken_one(tmp_path, unbroken, seed):
    config, whole = unbroken
    command, workdir = tiny.pretrain_command(config, tmp_path / "run"), tmp_path / "run"
    for lines in sorted(random.Random(seed).sample(range(1, LINES - 1), KILLS)):
        kill_after(command, workdir, lines)
    tiny.run(command)
    check_same_run(workdir, whole)
    assert not unfinished(workdir)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_a_run_killed_at_every_point_of_a_save_ends_as_the_unbroken_one(tmp_path, unbroken, seed):
    """At each point once, in the first or the second save of a start that has it."""
    config, whole = unbroken
    command, workdir = tiny.pretrain_command(config, tmp_path / "run"), tmp_path / "run"
    rng = random.Random(seed)
    for point in rng.sample(list(POINTS), len(POINTS)):
        status, said = end(start(at_point(command, point, rng.choice((1, 2)), "kill")))
        assert status == -signal.SIGKILL, (point, status, said[-2000:])
        assert not list(workdir.rglob(MARK)), (
            f"temporaries of the start before are there at: {point}"
        )
        for path in unfinished(workdir):
            (path / MARK).touch()
    tiny.run(command)
    check_same_run(workdir, whole)
    assert not unfinished(workdir)


def test_the_law_of_a_killed_run_fails_if_its_random_numbers_begin_anew(tmp_path, unbroken):
    """A resume with another seed is another run: the law sees it."""
    config, whole = unbroken
    shutil.copytree(whole, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        if int(step.name) == 60:
            shutil.rmtree(step)
    tiny.run(
        tiny.pretrain_command(config, tmp_path / "run", "--config.seed=1", "--allow_config_change")
    )
    with pytest.raises(AssertionError):
        check_same_run(tmp_path / "run", whole)
