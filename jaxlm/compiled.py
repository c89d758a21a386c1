"""Compiled programs are kept, so that a restarted run computes at once instead of compiling first."""

import hashlib
import os
import platform
import time
from pathlib import Path

import jax
import jaxlib

from jaxlm.files import as_path, cache_folder, is_remote

KEPT_SECONDS = 0.1  # programs that took less to compile are not worth a file
KEPT_DAYS = 30  # on a local disk


def keep_compiled_programs(workdir: str = "") -> Path | None:
    """Has jax keep what it compiles and read it back; returns where, or None.

    In this host's cache folder; for a workdir on a bucket in `workdir/compiled`, from where a machine that has just been
    made takes them, too. Of several processes the first writes and all read. What jax itself is told comes first:
    JAX_COMPILATION_CACHE_DIR=FOLDER (or gs://…), and JAX_ENABLE_COMPILATION_CACHE=false for none. Call it before anything
    is compiled.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return as_path(jax.config.jax_compilation_cache_dir)
    root = as_path(workdir) if is_remote(workdir) else cache_folder()
    folder = root / "compiled" / machine_key()
    if is_remote(folder):
        # XLA's own caches, of what it has measured on a GPU, know no buckets.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    else:
        forget_old_programs(folder, KEPT_DAYS)
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_SECONDS)
    return folder


def machine_key() -> str:
    """Equal where compiled programs may be shared.

    XLA's CPU programs are machine code, and jax's own key names the platform, not the instructions that the processor
    has: on another one they would end the process, or compute other bits.
    """
    cpu = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        wanted = ("flags", "Features", "model name")
        lines = {line for line in info.read_text().splitlines() if line.startswith(wanted)}
        cpu += "".join(sorted(lines))
    versions = f"{jax.__version__} {jaxlib.__version__} {cpu}"
    return hashlib.sha256(versions.encode()).hexdigest()[:16]


def forget_old_programs(folder: Path, days: float) -> None:
    """The cache has no limit of its own, and every change of a model leaves programs behind."""
    for entry in folder.glob("*"):
        try:
            if entry.is_file() and time.time() - entry.stat().st_mtime > days * 86400:
                entry.unlink()
        except FileNotFoundError:  # another process was faster
            pass
