"""Runs a module of jaxlm and does something to it at a named point of a save: at an event that Python's audit hooks see.

python -m tests.faults.at_point POINT NTH ACTION MODULE FLAG …

The action comes just before the NTH operation of that kind in this process. So nothing in the code that is tested knows of tests.
"""

import ctypes
import logging
import os
import re
import runpy
import signal
import sys
import time
import warnings

# (the operation, its path in the workdir)
POINTS = {
    "the folder of a step is made": ("os.mkdir", r"checkpoints/\d+\.orbax-checkpoint-tmp$"),
    "the arrays are written": ("os.mkdir", r"params\.orbax-checkpoint-tmp/array_metadatas$"),
    "the arrays are complete": ("os.rename", r"params\.orbax-checkpoint-tmp$"),
    "the manifest is complete": ("os.rename", r"manifest\.orbax-checkpoint-tmp$"),
    "the step gets its name": ("os.rename", r"checkpoints/\d+\.orbax-checkpoint-tmp$"),
    "an old step loses its name": ("os.rename", r"checkpoints/\d+$"),
    "an old step is removed": ("shutil.rmtree", r"checkpoints/deleting$"),
}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """The save is not over before the main thread knows of the signal."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)


def terminate_twice() -> None:
    terminate()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def hang() -> None:
    time.sleep(600)


def hang_with_the_lock() -> None:
    """Python's lock, which ctypes gives back in calls of a CDLL, but not of a PyDLL."""
    ctypes.PyDLL(None).sleep(600)


def fail() -> None:
    """With an error that tells all: what a program is given, and a line of the log and a warning before."""
    said = f"{dict(os.environ)} {sys.argv}"
    logging.getLogger("jaxlm").error("log: %s", said)
    warnings.warn(f"warning: {said}", stacklevel=1)
    raise RuntimeError(f"error: {said}")


ACTIONS = {
    function.__name__: function
    for function in (kill, terminate, terminate_twice, hang, hang_with_the_lock, fail)
}


def main(point: str, nth: str, action: str, module: str, *arguments: str) -> None:
    wanted, path = POINTS[point]
    left = int(nth)

    def hook(event: str, details: tuple) -> None:
        nonlocal left
        if event != wanted or not re.search(path, str(details[0])):
            return
        if event == "shutil.rmtree" and not os.path.isdir(details[0]):
            return
        left -= 1
        if left == 0:
            ACTIONS[action]()

    sys.addaudithook(hook)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
