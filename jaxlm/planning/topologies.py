"""Names of machines, and the devices that they have: what a compiler needs to compile for them from anywhere.

v5e-16          16 chips (v5e, v6e: the number is of chips)
v5p-128         64 chips (v4, v5p: the number is of cores, two a chip, as Google names them)
2xv5e-256       two slices of 256, joined by the data centre's network
h100x8, h100x64 GPUs, eight to a node
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.planning.chips import CHIPS, GPUS_PER_NODE, Chip

# A slice's chips along the axes of its torus, by the number in its name.
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}  # fmt: skip
CUBES = {
    8: (2, 2, 1),
    16: (2, 2, 2),
    32: (2, 2, 4),
    64: (2, 4, 4),
    128: (4, 4, 4),
    256: (4, 4, 8),
    512: (4, 8, 8),
    1024: (8, 8, 8),
    2048: (8, 8, 16),
    4096: (8, 16, 16),
}
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v4": CUBES, "v5p": CUBES}
LIBRARY_NAMES = {"v5e": "v5e", "v6e": "v6e", "v4": "v4", "v5p": "v5"}  # what libtpu calls them
H100_DESCRIPTION = Path(__file__).with_name("h100.txtpb")

# Read when jax starts, so to be set before it is imported: no accelerator and no cloud is asked for.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is taken, so several plans may compile at once
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

INSTALL = {
    "libtpu": "to compile for TPUs: pip install 'jaxlm[plan]' (or libtpu of the same date as jax), on Linux",
    "jax_cuda12_plugin": "to compile for GPUs: pip install 'jaxlm[plan]', on Linux",
}


@dataclass(frozen=True)
class Topology:
    """`num_slices` equal slices (or, of GPUs, nodes) of `shape` chips each."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.num_slices


def parse_topology(name: str) -> Topology:
    """What a name like 'v5e-16', '2xv5p-128' or 'h100x8' means.

    Raises:
      ValueError: with the names that there are.
    """
    tpu = re.fullmatch(r"(?:(\d+)x)?(v4|v5e|v5p|v6e)-(\d+)", name)
    gpu = re.fullmatch(r"(h100)x(\d+)", name)
    if tpu and int(tpu[3]) in SHAPES[tpu[2]] and int(tpu[1] or 1) >= 1:
        return Topology(name, CHIPS[tpu[2]], SHAPES[tpu[2]][int(tpu[3])], int(tpu[1] or 1))
    if gpu:
        count = int(gpu[2])
        nodes = max(1, count // GPUS_PER_NODE)
        if count >= 1 and count == nodes * min(count, GPUS_PER_NODE):
            return Topology(name, CHIPS[gpu[1]], (min(count, GPUS_PER_NODE),), nodes)
    known = [f"{chip}-N with N of {', '.join(map(str, sizes))}" for chip, sizes in SHAPES.items()]
    known.append("SxNAME for S slices of one of these")
    known.append(f"h100xN with N up to {GPUS_PER_NODE} or a multiple of it")
    raise ValueError(f"unknown topology {name!r}; known are\n  " + "\n  ".join(known))


def require(library: str) -> None:
    """Raises ModuleNotFoundError with what to install, unless `library` is there."""
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(f"found: no {library}; {INSTALL[library]}")


def topology_devices(topology: Topology) -> np.ndarray:
    """The devices of a topology, without the machine: (chips,), slice after slice.

    Raises:
      ModuleNotFoundError: with what to install.
    """
    from jax.experimental import topologies

    from jaxlm.parallel.compiler_options import lowering_platform

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    chip = topology.chip
    options: dict[str, Any]
    if chip.platform == "tpu":
        require("libtpu")
        options = dict(
            topology_name=f"{LIBRARY_NAMES[chip.name]}:{'x'.join(map(str, topology.shape))}",
            chip_config_name="default" if len(topology.shape) == 2 else "megacore",
            # Chips of one host. A single chip has a host of its own; others come in fours.
            chips_per_host_bounds=(1, 1, 1) if topology.num_chips == 1 else (2, 2, 1),
            num_slices=topology.num_slices,
        )
    else:
        require("jax_cuda12_plugin")
        options = dict(
            target_config=H100_DESCRIPTION.read_text(encoding="utf-8"),
            topology=f"1x{topology.num_slices}x{math.prod(topology.shape)}",
        )
    platform = lowering_platform(chip.platform)
    devices = topologies.get_topology_desc(platform=platform, **options).devices
    return np.asarray(devices)
