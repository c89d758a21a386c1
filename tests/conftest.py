"""What every test stands on: eight simulated CPU devices, strict rank promotion, no network.

The environment is set before anything imports jax, and subprocesses inherit it.
"""

import os
import socket
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

from jaxlm.compiled import forget_old_programs, machine_key

ROOT = Path(__file__).resolve().parents[1]


jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs from the cache give the same bits as fresh ones, and a damaged entry is compiled again.
if os.environ.get("JAXLM_TEST_CACHE", "1") != "0":
    programs = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxlm-tests"
    programs /= f"xla-{machine_key()}"
    forget_old_programs(programs, days=14)
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class NetworkUse(RuntimeError):
    """A test tried to leave this machine."""


def _is_local(sock: socket.socket, address: object) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return True  # unix sockets
    host = str(address[0]) if isinstance(address, tuple) else str(address)
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _guard(name: str):
    original = getattr(socket.socket, name)

    def connect(self, address):
        if not _is_local(self, address):
            raise NetworkUse(
                f"found: a connection to {address}; expected: none outside this machine; "
                "change: tests run without network, so make or ship the data"
            )
        return original(self, address)

    return connect


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connections leave neither this process nor, through it, this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guard(name))
        yield


# Whole files of laws that must also hold on Colab's package versions, and there on every change: they
# are where jax, orbax and grain have changed most, and take a minute.
CORE_FILES = (
    "training/test_checkpoints.py",
    "training/test_loop.py",
    "data/test_pipeline.py",
    "parallel/test_mesh.py",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.as_posix().endswith(CORE_FILES):
            item.add_marker(pytest.mark.core)
            item.add_marker(pytest.mark.smoke)
