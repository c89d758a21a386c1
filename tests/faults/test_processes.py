"""Several processes: a signal to one of them stops all after one step; when one is killed, the others end, and nothing is lost."""

import random
import signal
import time

import pytest

from jaxlm import exits
from jaxlm.training.checkpoints import find_step
from tests import tiny
from tests.faults.runs import check_same_run, unfinished, write_config
from tests.faults.test_stop import check_stopped
from tests.parallel.test_processes import XLA_ABORT, finish, start, wait_for

HEARTBEAT = 20  # seconds
SECONDS = 60  # from the death of one to the end of the others


@pytest.fixture(scope="module")
def config(tmp_path_factory, store):
    return write_config(
        tmp_path_factory.mktemp("config"),
        "configs/gpt.py:tiny",
        store,
        num_train_steps=40,
        log_every_steps=2,
        eval_every_steps=10,
        checkpoint_every_steps=8,
        mesh__fsdp=2,
        eval__prompts=(),
    )


@pytest.mark.parametrize("told", [[1], pytest.param([0, 1], marks=pytest.mark.slow)])
def test_a_signal_to_one_or_all_processes_stops_all_after_one_step(config, tmp_path, told):
    """No process waits for another that has stopped before it, and process 0 says what was saved."""
    workdir = tmp_path / "run"
    command = tiny.pretrain_command(config, workdir, "--config.num_train_steps=4000")
    children = start(command, 2)
    wait_for(workdir, children, lines=6)
    for i in told:
        children[i].send_signal(signal.SIGTERM)
    began = time.monotonic()
    results = finish(children, timeout=SECONDS)
    seconds = time.monotonic() - began
    (_, said, status), (_, other, second) = results
    check_stopped(workdir, status, said, seconds)
    assert second == exits.STOPPED, other
    assert "Traceback" not in other


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The workdir of the run of four processes that nothing happens to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    for _, said, status in finish(start(tiny.pretrain_command(config, workdir), 4)):
        assert status == 0, said[-3000:]
    return workdir


def check_others_end(children, victim, began):
    """All but the victim end in time with the status for it; XLA's own, if it was faster."""
    survivors = [child for i, child in enumerate(children) if i != victim]
    for _, said, status in finish(survivors, timeout=SECONDS + 30):
        assert status in (exits.PEER_LOST, XLA_ABORT), (status, said[-3000:])
        assert status == XLA_ABORT or "another process has ended" in said
    assert time.monotonic() - began < SECONDS
    children[victim].communicate()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_one_of_four_is_killed_and_the_restarted_run_is_the_unbroken_one(
    config, whole, tmp_path, seed
):
    """Two kills of a run: of process 0, which keeps the list of the living, and of another one."""
    workdir = tmp_path / "run"
    command, rng = tiny.pretrain_command(config, workdir), random.Random(seed)
    for victim, lines in ((rng.randint(1, 3), rng.randint(5, 9)), (0, rng.randint(10, 14))):
        children = start(command, 4, heartbeat=HEARTBEAT)
        wait_for(workdir, children, lines)
        children[victim].send_signal(signal.SIGKILL)
        check_others_end(children, victim, time.monotonic())
        assert 0 < int(find_step(workdir).name) < 40, (seed, victim, lines)
    for _, said, status in finish(start(command, 4)):
        assert status == 0, said[-3000:]
    check_same_run(workdir, whole)
    assert not unfinished(workdir)
