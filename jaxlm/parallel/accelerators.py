"""Accelerators that the machine has and jax does not see: a run would take the CPU, a hundred times slower."""

import glob
import os

import jax

from jaxlm.parallel.launchers import TPU_FILES

# What the kernel shows of accelerators, and the extra that brings jax for them.
FILES = (("NVIDIA GPUs", ("/dev/nvidia[0-9]*",), "cuda12"), ("TPU chips", TPU_FILES, "tpu"))


def unseen_accelerators() -> list[tuple[str, str]]:
    """(what is found, what to do) of each; none where JAX_PLATFORMS asks for the CPU."""
    if jax.default_backend() != "cpu" or "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return []
    return [
        (f"this machine has {what}, and jax does not see them", f"pip install 'jaxlm[{extra}]'")
        for what, files, extra in FILES
        if any(map(glob.glob, files))
    ]
