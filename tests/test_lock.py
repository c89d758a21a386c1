"""A workdir's lock, where the kernel keeps it and where its owner has to renew it."""

import errno
import fcntl
import json
import os
import threading
import time

import pytest

from jaxlm import lock
from jaxlm.exits import Locked


def without_kernel_locks(monkeypatch):
    """A disk as some network disks are: flock is refused."""

    def refuse(*arguments):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)


def leave_behind(workdir):
    """What a killed run leaves on a disk that knows no locks."""
    owner = dict(host="elsewhere", pid=7, since="2026-01-01 00:00:00 UTC", id="gone", beats=12)
    (workdir / lock.NAME).write_text(json.dumps(owner))


def check_excludes(workdir, held=lock.held):
    """Of two runs one has the workdir, and the other one says which; afterwards it is free."""
    with held(workdir):
        with pytest.raises(Locked, match=f"process {os.getpid()} on .* take another --workdir"):
            with held(workdir):
                pass
    with held(workdir):
        pass


def test_of_two_runs_one_has_the_workdir(tmp_path):
    check_excludes(tmp_path / "new")


def test_the_same_holds_on_a_disk_without_locks(tmp_path, monkeypatch):
    without_kernel_locks(monkeypatch)
    check_excludes(tmp_path)
    assert not (tmp_path / lock.NAME).exists()


def test_the_law_fails_for_a_lock_that_keeps_nobody_out(tmp_path):
    import contextlib

    with pytest.raises(BaseException, match="DID NOT RAISE"):
        check_excludes(tmp_path, held=contextlib.nullcontext)


def test_a_lock_that_is_not_renewed_is_taken_over(tmp_path, monkeypatch, caplog):
    without_kernel_locks(monkeypatch)
    leave_behind(tmp_path)
    began = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - began >= lock.STALE_BEATS * lock.BEAT_SECONDS
        assert "took over the lock of a run that is gone" in caplog.text
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_beat_that_fails_is_not_the_last(tmp_path, monkeypatch, caplog):
    without_kernel_locks(monkeypatch)
    write, written = lock.write_text, []

    def fail_once(path, text):
        written.append(text)
        if len(written) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(path, text)

    monkeypatch.setattr(lock, "write_text", fail_once)
    with lock.held(tmp_path):
        wait_for(lambda: len(written) > 3)
        assert json.loads((tmp_path / lock.NAME).read_text())["beats"] >= 3
    assert "is not renewed" in caplog.text
    assert not (tmp_path / lock.NAME).exists()


def wait_for(is_so, seconds=20.0):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_of_two_that_take_a_lock_over_at_once_one_has_it(tmp_path, monkeypatch):
    without_kernel_locks(monkeypatch)
    leave_behind(tmp_path)
    outcomes, done = [], threading.Barrier(2)

    def take():
        try:
            with lock.held(tmp_path):
                outcomes.append("held")
                done.wait(30)
        except Locked:
            outcomes.append("locked")
            done.wait(30)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "locked"]


def test_a_killed_owners_kernel_lock_says_nothing_wrong(tmp_path):
    """Its file is still there, but nobody holds it."""
    leave_behind(tmp_path)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
