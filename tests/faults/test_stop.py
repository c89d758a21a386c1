"""A signal: the step is finished and saved, the exit status says so, and the run goes on as if nothing had been."""

import json
import os
import random
import re
import signal
import subprocess
import time

import pytest

from jaxlm import exits
from jaxlm.training.checkpoints import find_step
from jaxlm.training.metrics import read_metrics
from jaxlm.training.stored import read_manifest
from tests import tiny
from tests.faults.runs import (
    at_point,
    check_same_run,
    count_lines,
    end,
    start,
    unfinished,
    wait_for,
    write_config,
)

SECONDS = 30  # from the signal to the end


def check_stopped(workdir, status, said, seconds):
    """The documented status, in time; the newest checkpoint is of the last step that ran, and nothing is half-written."""
    assert status == exits.STOPPED, (status, said[-3000:])
    assert seconds < SECONDS
    (step,) = re.findall(r"stopped by SIG\w+ after step (\d+) of \d+, which is saved", said)
    assert find_step(workdir).name == step
    assert json.loads((workdir / "goodput.jsonl").read_text().splitlines()[-1])["newest"] == int(
        step
    )
    assert "Traceback" not in said
    assert not unfinished(workdir)


def stop_after(command, workdir, lines, number):
    """(status, what it said, seconds from the signal to the end) of a run that gets a signal after some log lines."""
    child = start(command)
    wait_for(child, lambda: count_lines(workdir) >= lines, f"{lines} lines")
    child.send_signal(number)
    began = time.monotonic()
    return *end(child), time.monotonic() - began


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_a_run_stopped_by_signals_ends_as_the_unbroken_one(tmp_path, unbroken, seed):
    """SIGTERM twice, SIGINT, and SIGTERM in the midst of a save."""
    config, whole = unbroken
    command, workdir = tiny.pretrain_command(config, tmp_path / "run"), tmp_path / "run"
    rng = random.Random(seed)
    numbers = [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
    for lines, number in zip(sorted(rng.sample(range(1, 18), 3)), numbers, strict=True):
        check_stopped(workdir, *stop_after(command, workdir, lines, number))
    began = time.monotonic()
    status, said = end(start(at_point(command, "the arrays are complete", 1, "terminate")))
    check_stopped(workdir, status, said, time.monotonic() - began)
    tiny.run(command)
    check_same_run(workdir, whole)


@pytest.mark.parametrize(
    "wrong",
    [
        (exits.DONE, "stopped by SIGTERM after step 60 of 60, which is saved", 1.0),
        (exits.STOPPED, "stopped by SIGTERM after step 59 of 60, which is saved", 1.0),
        (exits.STOPPED, "stopped by SIGTERM after step 60 of 60, which is saved", 31.0),
    ],
)
def test_the_law_of_a_stop_fails_for_another_status_an_older_step_and_a_late_end(unbroken, wrong):
    _, whole = unbroken
    check_stopped(
        whole, exits.STOPPED, "stopped by SIGTERM after step 60 of 60, which is saved", 1.0
    )
    with pytest.raises(AssertionError):
        check_stopped(whole, *wrong)


def test_the_second_signal_ends_the_process_at_once_and_loses_no_checkpoint(tmp_path, unbroken):
    """It comes while the stop waits for a save that does not end."""
    config, whole = unbroken
    command, workdir = tiny.pretrain_command(config, tmp_path / "run"), tmp_path / "run"
    status, said = end(start(at_point(command, "the arrays are complete", 2, "terminate_twice")))
    assert status == 128 + signal.SIGTERM, (status, said)
    assert find_step(workdir).name == "5"
    tiny.run(command)
    check_same_run(workdir, whole)
    assert not unfinished(workdir)


def test_a_signal_in_an_evaluation_leaves_it_and_the_resumed_run_makes_it(tmp_path, unbroken):
    """The line of step 6 is written just before the evaluation at that step, whose program is compiled then."""
    config, _ = unbroken
    flags = ("num_train_steps=8", "log_every_steps=6", "eval.batch_size=1", "eval.num_batches=50")
    flags = tuple(f"--config.{flag}" for flag in flags)
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    command = tiny.pretrain_command(config, workdir, *flags)
    check_stopped(workdir, *stop_after(command, workdir, 1, signal.SIGTERM))
    step = find_step(workdir)
    assert step.name == "6" and read_manifest(step)["evaluation_left"]
    assert [line["split"] for line in read_metrics(workdir)] == ["train"]
    tiny.run(command)
    tiny.run(tiny.pretrain_command(config, whole, *flags))
    check_same_run(workdir, whole)


def test_a_signal_before_the_first_step_ends_the_process_with_nothing_half_made(tmp_path):
    """While text is prepared and the step is compiled there is nothing to save."""
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g\n" * 20_000)
    config = write_config(
        tmp_path, "configs/gpt.py:tiny", text, tokenizer__kind="bpe", tokenizer__vocab_size=264
    )
    workdir = tmp_path / "run"
    child = start(tiny.pretrain_command(config, workdir))
    wait_for(child, lambda: (workdir / "config.json").exists(), "config.json")
    child.send_signal(signal.SIGTERM)
    status, said = end(child, timeout=SECONDS)
    assert status == exits.STOPPED, said
    assert "nothing new to save" in said and "Traceback" not in said
    assert not list((workdir).rglob("*.partial*")), said


def test_a_workdir_has_one_run(tmp_path, unbroken):
    """The second one is told where the first one runs; when that is killed, its lock is gone with it."""
    config, _ = unbroken
    command, workdir = tiny.pretrain_command(config, tmp_path / "run"), tmp_path / "run"
    first = start([*command, "--config.num_train_steps=100000"])
    wait_for(first, lambda: count_lines(workdir) > 0, "a line")
    status, said = end(start(command))
    assert status == exits.LOCKED, said
    assert f"process {first.pid} on " in said and "Traceback" not in said
    assert first.poll() is None
    first.kill()
    end(first)
    tiny.run([*command, "--config.num_train_steps=4"])
    assert {line["step"] for line in read_metrics(workdir)} >= {4}


def group_of(leader):
    """The processes of a group besides its leader, but for those that are over."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [pid for pid, group, stat in rows if int(group) == leader != int(pid) and stat[0] != "Z"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_data_workers_live_as_long_as_their_run(tmp_path, unbroken, number):
    """A signal to all processes, as a terminal sends it, stops the run well; a kill of the run alone leaves none of them."""
    config, _ = unbroken
    workdir, flags = (
        tmp_path / "run",
        ["--config.data.num_workers=2", "--config.num_train_steps=9999"],
    )
    child = start(tiny.pretrain_command(config, workdir, *flags), start_new_session=True)
    wait_for(child, lambda: count_lines(workdir) > 2, "3 lines")
    assert len(group_of(child.pid)) >= 2
    began = time.monotonic()
    if number == signal.SIGTERM:
        os.killpg(child.pid, number)
        check_stopped(workdir, *end(child), time.monotonic() - began)
    else:
        child.kill()
        child.wait()
    while group_of(child.pid):
        assert time.monotonic() < began + SECONDS
        time.sleep(0.1)
