"""The ledger: every second has one cause, over all restarts, and steps that were done twice are lost once."""

import json

import pytest

from jaxlm.training import goodput
from jaxlm.training.goodput import Ledger, account, read_lives, report


class Time:
    """A clock that is set by hand, for both of the functions that the ledger asks."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)
        monkeypatch.setattr(goodput.time, "perf_counter", lambda: self.now)

    def pass_by(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Time(monkeypatch)


def run(clock, path, steps, bad=()):
    """A life of 2 s of start, 5 s of compiling the first step, 1 s a step, 0.5 s of evaluation in the midst."""
    ledger = Ledger(path)
    clock.pass_by(2)
    ledger.switch("compile")
    for step in steps:
        clock.pass_by(5 if ledger.life["steps"] == 0 else 1)
        ledger.did(step, useful=step not in bad)
        if step % 5 == 0:
            with ledger.spend("evaluation"):
                clock.pass_by(0.5)
        ledger.write()
    return ledger


def test_every_second_has_one_cause(tmp_path, clock):
    ledger = run(clock, tmp_path / "goodput.jsonl", range(1, 11))
    assert ledger.totals() == {"start": 2, "compile": 5, "step": 9, "evaluation": 1}


def test_inner_work_is_not_charged_to_the_outer_one(clock):
    ledger = Ledger()
    with ledger.spend("outer"):
        clock.pass_by(1)
        with ledger.spend("inner"):
            clock.pass_by(10)
        clock.pass_by(2)
    assert ledger.totals() == {"start": 0, "outer": 3, "inner": 10}


def check_account(lives):
    """A run that is killed after step 10, comes back 30 s later from step 5, and ends at step 12; step 11 was bad."""
    found = account(lives)
    assert found["wall"] == pytest.approx(sum(s for cause, s in found.items() if cause != "wall"))
    assert found["down"] == pytest.approx(30)
    mean_step = (9 + 6) / (10 + 7)
    assert found["again"] == pytest.approx(5 * mean_step)
    assert found["bad"] == pytest.approx(1 * mean_step)
    assert found["useful"] == pytest.approx(11 * mean_step)
    assert found["compile"] == 10 and found["start"] == 4 and found["evaluation"] == 1.5


def killed_and_resumed(clock, path):
    run(clock, path, range(1, 11))  # killed: never closed
    with path.open("a") as file:
        file.write('{"life": 0, "cut o')
    clock.pass_by(30)
    ledger = run(clock, path, range(6, 13), bad=[11])
    return ledger.close()


def test_steps_done_again_after_a_kill_are_lost(tmp_path, clock):
    said = killed_and_resumed(clock, tmp_path / "goodput.jsonl")
    lives = read_lives(tmp_path / "goodput.jsonl")
    check_account(lives)
    assert [life["life"] for life in lives] == [0, 1]
    assert said == report(lives)
    assert said.startswith(
        "goodput 16.0% of 60 s in 2 starts; lost: down 49.6%, compile 16.5%, again 7.3%"
    )


def test_the_accounts_law_fails_if_what_was_done_again_counts(tmp_path, clock):
    killed_and_resumed(clock, tmp_path / "goodput.jsonl")
    first, second = read_lives(tmp_path / "goodput.jsonl")
    with pytest.raises(AssertionError):
        check_account([first, second | {"again": 0}])


def test_a_restart_leaves_one_line_of_each_earlier_life(tmp_path, clock):
    path = tmp_path / "goodput.jsonl"
    run(clock, path, range(1, 100)).close()
    assert len(path.read_text().splitlines()) > 10
    Ledger(path)
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["newest"] == 99
