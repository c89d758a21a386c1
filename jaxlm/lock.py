"""One run at a time has a workdir.

On a local disk the lock is flock's, on the open file `.lock`: the kernel frees it when the process dies, however that happens. A disk
that knows no such locks, and a bucket, have a file instead that its owner writes again and again. Who finds it there waits
until it has changed, and then is locked out, or until it has not for long enough, and then takes it over.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxlm.exits import LOCKED, Locked
from jaxlm.files import is_remote, write_text
from jaxlm.parallel import processes

log = logging.getLogger("jaxlm")

NAME = ".lock"
BEAT_SECONDS = 10.0  # how often a lock is renewed where the kernel does not keep it
STALE_BEATS = 4  # without a renewal: its owner is gone
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir`, which is made if it is not there. Of several processes, process 0 does it for all.

    Raises:
      Locked: another run has it; says where that runs.
    """
    if not processes.is_main():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if is_remote(workdir) or not stack.enter_context(_kernel_lock(workdir)):
            stack.enter_context(_Beating(workdir))
        yield


def _owner(**more: object) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return json.dumps(dict(host=socket.gethostname(), pid=os.getpid(), since=since, **more)) + "\n"


def _locked(workdir: Path, text: str) -> Locked:
    owner = json.loads(text) if text.strip() else dict(host="?", pid="?", since="a moment ago")
    return Locked(
        f"{workdir} has another run: process {owner['pid']} on {owner['host']}, since {owner['since']}; wait for its end, "
        f"stop it (kill {owner['pid']}), or take another --workdir"
    )


@contextlib.contextmanager
def _kernel_lock(workdir: Path) -> Iterator[bool]:
    """Whether the disk knows locks; then it is held in the block."""
    with open(workdir / NAME, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _locked(workdir, file.read()) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            yield False
            return
        file.truncate(0)
        file.write(_owner())
        file.flush()
        yield True


class _Beating:
    """A lock that its owner renews. Its file is left behind at a kill, and removed at any other end."""

    def __init__(self, workdir: Path):
        self.workdir, self.path, self.id = workdir, workdir / NAME, uuid.uuid4().hex
        self.over, self.beats = threading.Event(), 0
        self.thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> None:
        self._wait_for_owner()
        self._beat()
        time.sleep(BEAT_SECONDS / 10)  # of two that took it at once, the one that wrote last has it
        if self.id not in (found := self._read()):
            raise _locked(self.workdir, found)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()  # a beat under way would bring the file back
        if self.id in self._read():
            self.path.unlink()

    def _read(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def _beat(self) -> None:
        self.beats += 1
        write_text(self.path, _owner(id=self.id, beats=self.beats))

    def _wait_for_owner(self) -> None:
        """Until there is none, or it has not beaten for long. No clock is compared with another host's."""
        first = found = self._read()
        if first:
            log.info("%s has the lock of another run: is it alive?", self.workdir)
        end = time.monotonic() + STALE_BEATS * BEAT_SECONDS
        while found and time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 10)
            found = self._read()
            if found and found != first:
                raise _locked(self.workdir, found)
        if found:
            log.warning("took over the lock of a run that is gone: %s", found.strip())

    def _keep(self) -> None:
        while not self.over.wait(BEAT_SECONDS):
            try:
                found = self._read()
                if found and self.id not in found:  # this process was asleep for too long
                    os.write(2, f"{_locked(self.workdir, found)}\n".encode())
                    os._exit(LOCKED)
                self._beat()
            except (
                Exception
            ) as error:  # a bucket's may be of any type, and the next beat may come through
                log.warning(
                    "the lock of %s is not renewed, and will be tried again: %s",
                    self.workdir,
                    error,
                )
