"""Where the time of a run goes, over all its restarts: useful steps, and what is not, by cause.

`goodput.jsonl` has lines of the lives of a run: a life is what one start of its processes did. The last line of a life counts:

    {"life": 1, "began": 1790000000.0, "ended": 1790000900.0, "newest": 300, "steps": 180, "bad": 1, "again": 20,
     "seconds": {"start": 4.1, "restore": 0.8, "compile": 9.5, "step": 850.2, "input": 3.3, "saving": 2.0, …}}

newest: the last step that has run. steps: how many ran. bad: of these, how many were not applied. again: how many the run had
done before it was killed, or went back.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.files import Appender, write_text

WRITE_SECONDS = 1.0  # at most so often


class Ledger:
    """Charges every second of this process's life to one cause.

    path: of goodput.jsonl; None: nothing is written or read.
    """

    def __init__(self, path: Path | None = None):
        self.earlier = read_lives(path) if path and path.exists() else []
        now = time.time()
        self.life: dict[str, Any] = dict(life=len(self.earlier), began=now, ended=now, newest=0)
        self.life |= dict(steps=0, bad=0, again=0, seconds={})
        self._newest = max((life["newest"] for life in self.earlier), default=0)
        self._seconds: Counter[str] = Counter()
        self._cause, self._since = "start", time.perf_counter()
        self._file: Appender | None = None
        if path:  # a line for each life, and none that was cut off by a kill
            write_text(path, "".join(map(_line, self.earlier)))
            self._file = Appender(path)

    def switch(self, cause: str) -> str:
        """From now on time is charged to `cause`. Returns what it was charged to."""
        now, before = time.perf_counter(), self._cause
        self._seconds[before] += now - self._since
        self._cause, self._since = cause, now
        return before

    @contextlib.contextmanager
    def spend(self, cause: str) -> Iterator[None]:
        """Charges the block to `cause`, but for what is charged to others in it."""
        before = self.switch(cause)
        try:
            yield
        finally:
            self.switch(before)

    def totals(self) -> dict[str, float]:
        """Seconds by cause, of this life."""
        self.switch(self._cause)
        return dict(self._seconds)

    def did(self, step: int, *, useful: bool) -> None:
        """Step `step` has run; the first one of a life was compiled. useful: it was applied."""
        if self._cause == "compile":
            self.switch("step")
        life = self.life
        life["steps"] += 1
        life["bad"] += not useful
        life["again"] += step <= self._newest
        self._newest = max(self._newest, step)

    def write(self, *, now: bool = False) -> None:
        """The life so far as a line, if the last one is old, or at once."""
        if self._file is None or not (now or time.time() > self.life["ended"] + WRITE_SECONDS):
            return
        seconds = {cause: round(spent, 3) for cause, spent in self.totals().items()}
        self.life |= dict(ended=time.time(), newest=self._newest, seconds=seconds)
        self._file.write(_line(self.life).encode())

    def close(self) -> str:
        """Writes the last line of this life; returns the run's `report`."""
        if self._file is None:
            return ""
        self.write(now=True)
        self._file.close()
        return report([*self.earlier, self.life])


def _line(life: Mapping[str, Any]) -> str:
    return json.dumps(life) + "\n"


def read_lives(path: Path) -> list[dict[str, Any]]:
    """The last line of each life, in order."""
    with path.open(encoding="utf-8") as lines:
        lives = (json.loads(line) for line in lines if line.endswith("\n"))
        return list({life["life"]: life for life in lives}.values())


def account(lives: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of all lives of a run by cause, from the first one's begin to the last one's end: what the steps took is parted into
    'useful', 'bad' and 'again', by their numbers; 'down' is when no process ran. They sum to 'wall'."""
    spent = sum((Counter(life["seconds"]) for life in lives), Counter())
    count = {name: sum(life[name] for life in lives) for name in ("steps", "bad", "again")}
    all_steps = spent.pop("step", 0.0)
    parts = {name: all_steps * count[name] / max(count["steps"], 1) for name in ("bad", "again")}
    wall = max(lives[-1]["ended"] - lives[0]["began"], 1e-3)
    useful = all_steps - sum(parts.values())
    down = wall - all_steps - sum(spent.values())
    return {"wall": wall, "useful": useful, **spent, **parts, "down": down}


def report(lives: Sequence[Mapping[str, Any]]) -> str:
    """'goodput 91.2% of 3600 s; compile 4.0%, …': the share of useful steps, and of what took at least 0.1%."""
    shares = account(lives)
    wall, useful = shares.pop("wall"), shares.pop("useful")
    lost = sorted(shares.items(), key=lambda item: -item[1])
    named = ", ".join(f"{cause} {t / wall:.1%}" for cause, t in lost if t >= 0.001 * wall)
    starts = f"{len(lives)} start{'s' * (len(lives) > 1)}"
    return f"goodput {useful / wall:.1%} of {wall:,.0f} s in {starts}; lost: {named}"
