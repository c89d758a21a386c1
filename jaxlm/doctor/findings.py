"""What a check says, and what it is given."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxlm.parallel.launchers import Place

OK, WARN, FAIL = "ok", "warn", "fail"
GB = 1e9
SCRATCH = ".doctor"  # what a check leaves nothing of
Said = Iterator[tuple[str, ...]]  # of a check: (verdict, found) or (verdict, found, mend)


class Finding(NamedTuple):
    """check: its name. verdict: OK, WARN or FAIL. mend: what to do, '' for OK."""

    check: str
    verdict: str
    found: str
    mend: str = ""


class NoDevices(Exception):
    """(what was found, the mend)."""


@dataclasses.dataclass(frozen=True)
class Patient:
    """What is examined: always this machine and its devices; workdir and config if they are given."""

    workdir: Path | None = None
    config: ConfigDict | None = None
    place: Place | None = None
