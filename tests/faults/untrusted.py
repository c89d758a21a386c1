"""Files that somebody changed, and the readers that meet them; run as a program, the child of test_untrusted.py.

    python -m tests.faults.untrusted FOLDER SECONDS KIND:SEED …

reads one mutated file for each KIND:SEED (-1: as it is) and prints how it ended, a line each, at once:

    refused    a ValueError, FileNotFoundError or error of jaxlm.exits, with a message
    counted    it was read, and its bad rows were counted
    loaded     it was read, and what was read could be used
    …          anything else is a fault: the error's name, MemoryError among them for a reader that wants over 2 GiB

A reader that crashes, or takes more than SECONDS of processor time, ends the program.
"""

import gzip
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.faults.bombs import BOMBS, make_gzip_bomb
from tests.faults.data_files import DATA_KINDS, JSONL, Kind, write
from tests.faults.model_files import MODEL_KINDS, make_safetensors
from tests.faults.mutations import mutate

MEMORY = 2 << 30
KINDS = MODEL_KINDS | DATA_KINDS

# Readers that believe what they read, for the test of the test.


def read_believing_lengths(path: Path) -> int:
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header = bytearray(length)
    header[:] = blob[8 : 8 + length]
    json.loads(header)
    return 0


def read_until_found(path: Path) -> int:
    stream = io.BytesIO(path.read_bytes())
    while b"}" not in stream.read(1 << 16):
        pass
    return 0


def read_at_once(path: Path) -> int:
    return len(gzip.decompress(path.read_bytes()))


def read_by_address(path: Path) -> int:
    import ctypes

    if len(path.read_bytes()) != len(JSONL):
        ctypes.string_at(8)
    return 0


WRONG: dict[str, Callable[[], Kind]] = {
    "believes lengths": lambda: Kind(make_safetensors, read_believing_lengths),
    "reads until it finds": lambda: Kind(write("a.txt", "}"), read_until_found),
    "unpacks at once": lambda: Kind(make_gzip_bomb, read_at_once),
    "follows addresses": lambda: Kind(write("d.jsonl", JSONL), read_by_address),
}


# ---------------------------------------------------------------- the child


def read_one(kind: Kind, folder: Path, seed: int, seconds: float) -> str:
    from jaxlm.exits import RunError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path, rng = kind.make(folder), random.Random(seed)
    blob = path.read_bytes()
    if kind.unpack and rng.random() < 0.5:
        path.write_bytes(kind.pack(mutate(kind.unpack(blob), rng)))
    elif seed >= 0:
        path.write_bytes(mutate(blob, rng))
    limit_memory()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # nobody handles it, so it ends the process
    try:
        return "counted" if kind.read(path) else "loaded"
    except (ValueError, FileNotFoundError, RunError) as error:
        if isinstance(error.__cause__, MemoryError):
            return f"MemoryError, said as {error}"[:300]
        return "refused" if str(error).strip() else f"{type(error).__name__} without a message"
    except BaseException as error:  # PyO3's panics are no Exceptions
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def limit_memory() -> None:
    """To so much more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main(folder: Path, seconds: float, plan: list[str]) -> None:
    import jax

    logging.disable(logging.CRITICAL)
    jax.block_until_ready(jax.random.key(0))  # what its devices want of memory is not the readers'
    kinds = {name: make() for name, make in (KINDS | BOMBS | WRONG).items()}
    for name in KINDS.keys() & {item.rpartition(":")[0] for item in plan}:
        (folder / "sound").mkdir()
        bad = kinds[name].read(kinds[name].make(folder / "sound"))
        assert bad == 0, f"the sound {name} has {bad} bad rows"
        shutil.rmtree(folder / "sound")
    for item in plan:
        name, _, seed = item.rpartition(":")
        outcome = read_one(kinds[name], folder / "read", int(seed), seconds)
        print(json.dumps([item, outcome]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
