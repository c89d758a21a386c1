"""Seconds of a collective, from its bytes, its members and the links between them.

Bandwidth-bound algorithms on rings ("How to Scale Your Model", part 3): with V the bytes of the whole array and W the bandwidth of the
links in use, an all-gather or a reduce-scatter takes V / W, an all-reduce twice that, an all-to-all a quarter. Latency is
left out: the arrays of a train step are large.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.planning.chips import GPUS_PER_NODE, Chip

PASSES = {  # how often the whole array passes the links
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-reduce": 2.0,
    "all-to-all": 0.25,
    "ragged-all-to-all": 0.25,
    "collective-broadcast": 1.0,
}


@dataclass(frozen=True)
class Network:
    """The links between the devices of a mesh, in the order of `mesh.devices.flat`."""

    chip: Chip
    devices: Sequence[Any]
    extent: tuple[int, ...] = ()

    @classmethod
    def of(cls, chip: Chip, devices: Sequence[Any]) -> "Network":
        """The network of a mesh's devices, whose coordinates say the shape of its torus."""
        coords = np.array([getattr(d, "coords", (0,)) for d in devices])
        return cls(chip, devices, tuple(coords.max(axis=0) + 1))

    def slice_of(self, device: Any) -> int:
        """Which slice a TPU is in, or which node a GPU."""
        if self.chip.platform == "gpu":
            return device.id // GPUS_PER_NODE
        return getattr(device, "slice_index", 0)

    def crosses_slices(self, group: np.ndarray) -> bool:
        """Whether a group of devices, by their numbers, is in more than one slice."""
        return len({self.slice_of(self.devices[k]) for k in group}) > 1

    def across_slices(self) -> np.ndarray:
        """The chip at the first one's place in each slice, by their numbers: they exchange what their hosts carry."""
        place = self.devices[0].coords
        return np.array([k for k, d in enumerate(self.devices) if d.coords == place])

    def seconds(self, kind: str, whole_bytes: float, group: np.ndarray) -> float:
        """Of one collective: `whole_bytes` is V, for a permutation what one device sends; group: places of its members."""
        members = [self.devices[k] for k in group]
        slices = len({self.slice_of(d) for d in members})
        if len(members) == 1:
            return 0.0
        if kind == "collective-permute":
            inside = self.chip.axis_bandwidth / (2 if self.chip.torus_axes else 1)
            return whole_bytes / (self.chip.dcn_bandwidth if slices > 1 else inside)
        inner = len(members) // slices
        passes, seconds = PASSES[kind], 0.0
        if inner > 1:
            seconds += passes * whole_bytes * (inner - 1) / inner / self.bandwidth(members)
        if slices > 1:  # each chip carries its part of the array over the slower network
            share = whole_bytes / inner
            seconds += passes * share * (slices - 1) / slices / self.chip.dcn_bandwidth
        return seconds

    def bandwidth(self, members: Sequence[Any]) -> float:
        """Bytes/s of the links within a slice that a group has for itself."""
        if not self.chip.torus_axes:
            return self.chip.axis_bandwidth
        coords = np.array([d.coords for d in members])
        axes = [k for k in range(coords.shape[1]) if len(set(coords[:, k])) > 1]
        total = 0.0
        for axis in axes or [0]:
            # Links of a ring are used in both directions; of a line, half as well.
            ring = self.extent[axis] % self.chip.wraps == 0
            total += self.chip.axis_bandwidth * (1.0 if ring else 0.5)
        return total
