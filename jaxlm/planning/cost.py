"""Seconds of a train step by operation: the TPU compiler's own estimates, kernels by their FLOPs, collectives by their bytes.

An estimate, and nothing in it is fitted to a config. The constants below are all there are besides the data sheets.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jax.sharding import Mesh

from jaxlm.planning import hlo
from jaxlm.planning.chips import Chip
from jaxlm.planning.kernels import Sparsity, kernel_work
from jaxlm.planning.network import Network

# Each pair is (optimistic, pessimistic).
# The share of the matrix units' peak that a kernel of attention reaches, with its head size filled up to their width. (One that
# only multiplies is as others that do: whole Mixtrals were measured at half of a v5p's peak with megablox, a third of it
# computed again: https://github.com/AI-Hypercomputer/maxtext/issues/1256.)
KERNEL_EFFICIENCY = (0.65, 0.45)
# Optimistic, an operation takes what its FLOPs or its bytes take at these shares of the data sheet. Pessimistic, it takes as
# long as the TPU's compiler estimates, which is right for large matmuls and two to five times too slow for what only moves
# memory; of a GPU, whose compiler estimates nothing, the second number of each.
MATMUL_EFFICIENCY = (0.9, 0.55)
MEMORY_EFFICIENCY = (0.9, 0.7)
# How much of the work that is scheduled beside a collective hides it.
OVERLAP = (1.0, 0.75)

# What hosts of several slices do, as the collective that it is.
TRANSFERS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}

FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "copy-done slice-done async-start async-update async-done opt-barrier iota".split()
)


@dataclass(frozen=True)
class Operation:
    """What one instruction costs in a step: seconds are (optimistic, pessimistic), of all its `times` together.

    kind: 'compute', 'kernel' or a collective. hidden: seconds that run beside other work, already taken off.
    """

    name: str
    kind: str
    source: str
    times: float
    seconds: tuple[float, float]
    num_bytes: float = 0.0
    flops: float = 0.0
    axes: tuple[str, ...] = ()
    hidden: tuple[float, float] = (0.0, 0.0)
    is_slow: bool = False  # a collective between slices


@dataclass
class Cost:
    """What a step costs one device, by operation."""

    operations: list[Operation] = field(default_factory=list)

    @cached_property
    def seconds(self) -> tuple[float, float]:
        """(least, most) seconds of a step."""
        low, high = (sum(o.seconds[k] for o in self.operations) for k in (0, 1))
        return low, high

    @property
    def estimate(self) -> float:
        """Seconds of a step: the geometric mean of both ends, which are factors apart."""
        return math.sqrt(math.prod(self.seconds))

    def middle(self, seconds: tuple[float, float]) -> float:
        """What of `estimate` an operation is that takes between these; those of all operations add up to it."""
        return self.estimate * sum(seconds) / sum(self.seconds) if sum(seconds) else 0.0

    def by_source(self) -> list[tuple[str, str, float]]:
        """(source, kind, seconds), the costliest first."""
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for operation in self.operations:
            sums[operation.source, operation.kind] += self.middle(operation.seconds)
        return sorted(((*key, value) for key, value in sums.items()), key=lambda row: -row[2])


def estimate(module: hlo.Module, mesh: Mesh, chip: Chip, sparsity: Sparsity) -> Cost:
    """What the step of an optimised module costs on one device of the mesh."""
    network = Network.of(chip, list(mesh.devices.flat))
    reader = _Reader(module, mesh, chip, network, sparsity)
    return Cost(reader.computation(module.entry, 1.0)[0])


@dataclass
class _Reader:
    module: hlo.Module
    mesh: Mesh
    chip: Chip
    network: Network
    sparsity: Sparsity

    @cached_property
    def shapes(self) -> dict[str, str]:
        return {i.name: i.shape for lines in self.module.computations.values() for i in lines}

    def computation(self, name: str, times: float) -> tuple[list[Operation], np.ndarray]:
        """Operations of a computation that runs `times` times, and the seconds (2,) of all of them."""
        lines = self.module.computations[name]
        operations: list[Operation] = []
        work = np.zeros((len(lines), 2))  # seconds of one run that can hide a collective
        pending: dict[str, tuple[int, hlo.Instruction]] = {}
        sent: dict[str, tuple[int, hlo.Instruction]] = {}  # by its rendezvous
        received: dict[str, str] = {}  # what waits for it -> its rendezvous
        fused: dict[int, list[int]] = defaultdict(
            list
        )  # channel -> the fusions that a collective is in
        waiting: list[tuple[hlo.Instruction, list[int]]] = []
        for index, line in enumerate(lines):
            inner: list[Operation] = []
            match line.opcode:
                case "while":
                    (body,) = line.called("body")
                    inner, _ = self.computation(body, times * self.module.trip_count(line))
                case "conditional":
                    inner, _ = self.computation(self.module.longest_branch(line), times)
                case "call":
                    inner, _ = self.computation(line.called("to_apply")[0], times)
                case "async-start":
                    for called in line.called("calls"):
                        for one in self.module.computations[called]:
                            if one.collective:
                                pending[line.name] = (index, one)
                case _ if line.collective:
                    if line.opcode.endswith("-start"):
                        pending[line.name] = (index, line)
                    else:
                        waiting.append((line, []))
                case _ if line.opcode.endswith("-done") and line.names and line.names[0] in pending:
                    start, collective = pending.pop(line.names[0])
                    waiting.append((collective, list(range(start + 1, index))))
                # Between slices: the hosts do it, while the program goes on to where the result is received.
                case "send" if line.rendezvous:
                    sent[line.rendezvous] = (index, line)
                case "recv" if line.rendezvous:
                    received[line.name] = line.rendezvous
                case "recv-done" if line.names and line.names[0] in received:
                    start, transfer = sent.pop(received.pop(line.names[0]))
                    waiting.append((transfer, list(range(start + 1, index))))
                case "fusion" if channels := self.channels(line):
                    inner = self.compute(line, times)
                    for channel in channels:
                        fused[channel].append(index)
                case _:
                    inner = self.compute(line, times)
            operations += inner
            work[index] += np.sum([o.seconds for o in inner] or [(0.0, 0.0)], axis=0) / times
        for places in fused.values():
            waiting.append((self.fused_collective(lines[places[0]]), places))
        for collective, beside in waiting:
            operations.append(self.collective(collective, times, work, beside))
        return operations, np.sum([o.seconds for o in operations] or [(0, 0)], axis=0)

    # --- collectives --------------------------------------------------------------------------------------------------

    def channels(self, line: hlo.Instruction) -> list[int]:
        return sorted(
            {i.channel for i in self.module.inside(line) if i.collective and i.channel is not None}
        )

    def fused_collective(self, line: hlo.Instruction) -> hlo.Instruction:
        """The collective in a fusion. TPUs spell a reduce-scatter as an all-reduce and a slice of it, fused."""
        inside = list(self.module.inside(line))
        found = next(i for i in inside if i.collective)
        is_scatter = found.opcode == "all-reduce" and "all-reduce-scatter" in line.attributes
        return replace(found, opcode="reduce-scatter", shape=line.shape) if is_scatter else found

    def collective(
        self, line: hlo.Instruction, times: float, work: np.ndarray, beside: list[int]
    ) -> Operation:
        """What a collective adds to the step; `work` beside it hides it, and hides nothing else then."""
        if line.rendezvous:
            kind, group = TRANSFERS[line.transfer_type], self.network.across_slices()
            sent = hlo.BYTES[line.arrays[0][0]] * math.prod(line.arrays[0][1])
            whole = sent * (len(group) if kind in ("all-gather", "all-to-all") else 1)
        else:
            kind = line.collective
            groups = hlo.replica_groups(line.attributes, self.mesh.size)
            group, whole = groups[0], whole_bytes(line, groups.shape[1])
        seconds = self.network.seconds(kind, whole, group)
        hidden = [0.0, 0.0]
        for k in (0, 1):
            for index in beside:
                take = float(min(seconds - hidden[k], work[index, k] * OVERLAP[k]))
                work[index, k] -= take / OVERLAP[k]
                hidden[k] += take
        return Operation(
            name=line.name,
            kind=kind,
            source=self.module.source(line),
            times=times,
            seconds=(times * (seconds - hidden[0]), times * (seconds - hidden[1])),
            num_bytes=times * whole,
            axes=self.axes(group),
            hidden=(times * hidden[0], times * hidden[1]),
            is_slow=self.network.crosses_slices(group),
        )

    def axes(self, group: np.ndarray) -> tuple[str, ...]:
        """The mesh axes along which a group's members lie."""
        places = np.array(np.unravel_index(group, self.mesh.devices.shape))
        return tuple(
            name
            for name, row in zip(self.mesh.axis_names, places, strict=True)
            if len(set(row)) > 1
        )

    # --- work of the device itself ------------------------------------------------------------------------------------

    def compute(self, line: hlo.Instruction, times: float) -> list[Operation]:
        if line.opcode in FREE or line.opcode.endswith(("-start", "-done")):
            return []
        made = Operation(line.name, "compute", self.module.source(line), times, (0.0, 0.0))
        traffic = self.traffic(line)
        if line.opcode == "custom-call":
            work = kernel_work(
                line,
                lambda name: hlo.arrays_of(self.shapes.get(name, "")),
                sparsity=self.sparsity,
                mxu_width=self.chip.mxu_width,
            )
            if work:
                traffic = work.num_bytes or traffic
                traffic_seconds = traffic / self.chip.hbm_bandwidth
                seconds = tuple(
                    times * max(work.padded_flops / self.chip.peak_flops / share, traffic_seconds)
                    for share in (MATMUL_EFFICIENCY if work.is_matmul else KERNEL_EFFICIENCY)
                )
                kernel = replace(made, kind="kernel", seconds=seconds)
                return [replace(kernel, num_bytes=times * traffic, flops=times * work.flops)]
            if self.chip.platform == "tpu":
                return []
        flops = matmul_flops(line, self.module, self.shapes)
        bounds = [
            max(
                flops / self.chip.peak_flops / MATMUL_EFFICIENCY[k],
                traffic / self.chip.hbm_bandwidth / MEMORY_EFFICIENCY[k],
            )
            for k in (0, 1)
        ]
        if (cycles := line.estimated_cycles) is not None:
            estimated = cycles / self.chip.clock
            bounds = [min(bounds[0], estimated), estimated]
        seconds = (times * bounds[0], times * bounds[1])
        return [replace(made, seconds=seconds, num_bytes=times * traffic, flops=times * flops)]

    def traffic(self, line: hlo.Instruction) -> float:
        """HBM bytes that an instruction reads and writes; of an array that is only sliced, the slice."""
        fused = line.called("calls") if line.opcode == "fusion" else []
        if not fused:
            reads = sum(hbm_bytes(self.shapes.get(name, "")) for name in line.names)
            return reads + hbm_bytes(line.shape)
        inner = self.module.computations[fused[0]]
        users: dict[str, list[hlo.Instruction]] = defaultdict(list)
        for one in inner:
            for name in one.names:
                users[name].append(one)
        total = 0.0
        for one in inner:
            if one.opcode != "parameter":
                continue
            outer = line.names[int(one.operands)] if int(one.operands) < len(line.names) else ""
            full, used = hbm_bytes(self.shapes.get(outer, one.shape)), users[one.name]
            if used and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in used):
                full = min(full, sum(u.num_bytes for u in used))
            elif used and all(
                u.opcode == "dynamic-update-slice" and u.names[0] == one.name for u in used
            ):
                full = 0.0
            total += full
        return total + sum(self.written(name, inner) for name in results(inner, line))

    def written(self, one: hlo.Instruction, inner: list[hlo.Instruction]) -> float:
        """HBM bytes that a result of a fusion writes: of an array that is updated in place, the update."""
        by_name = {i.name: i for i in inner}
        while one.opcode == "bitcast" and one.names[0] in by_name:
            one = by_name[one.names[0]]
        if one.opcode == "dynamic-update-slice":
            return hbm_bytes(self.shapes.get(one.names[1], "")) if hbm_bytes(one.shape) else 0.0
        return hbm_bytes(one.shape)


def results(inner: list[hlo.Instruction], line: hlo.Instruction) -> list[hlo.Instruction]:
    """The instructions of a fused computation whose values leave it."""
    root = inner[-1]
    if root.opcode != "tuple":
        return [replace(root, shape=line.shape)]
    by_name = {i.name: i for i in inner}
    return [by_name[name] for name in root.names if name in by_name]


def whole_bytes(line: hlo.Instruction, size: int) -> float:
    """Bytes of the whole array of a collective of `size` members; of a permutation, what one sends.

    Of an all-gather the result is the whole, of a reduce-scatter the operand; one that starts has both as its result.
    """
    kind, parts = line.collective, [hlo.BYTES[d] * math.prod(s) for d, s in line.arrays if s]
    if line.opcode.endswith("-start") and line.shape.startswith("("):
        if kind in ("all-gather", "reduce-scatter"):
            return sum(parts) * size / (size + 1)
        if kind != "all-reduce":  # which gives its results alone
            parts = [sum(parts) / 2]
    return sum(parts) * (size if kind == "reduce-scatter" or kind.endswith("all-to-all") else 1)


def hbm_bytes(shape: str) -> float:
    """Bytes of the arrays of a shape that lie in device memory (space 0), not in the core's own."""
    total = 0.0
    for dtype, sizes, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if dtype in hlo.BYTES and not re.search(r"S\([1-9]\)", layout):
            total += hlo.BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def matmul_flops(line: hlo.Instruction, module: hlo.Module, shapes: Mapping[str, str]) -> float:
    """FLOPs of the matmuls of an instruction: one itself, a fusion with some in it, or a call of cuBLAS.

    B matmuls of (M, K) and (K, N) have operands and result of BMK, BKN and BMN entries, whatever their layout, and
    2 BMKN = 2 sqrt(BMK x BKN x BMN / B) FLOPs.
    """
    if line.opcode == "fusion":
        return sum(matmul_flops(i, module, shapes) for i in module.inside(line) if is_matmul(i))
    if not is_matmul(line):
        return 0.0
    operands = [hlo.arrays_of(shapes.get(name, "")) for name in line.names[:2]]
    if len(operands) < 2 or not all(operands) or not line.arrays:
        return 0.0
    sizes = [math.prod(arrays[0][1]) for arrays in (*operands, line.arrays)]
    return 2.0 * math.sqrt(math.prod(sizes) / num_matmuls(line, operands[0][0][1]))


def is_matmul(line: hlo.Instruction) -> bool:
    """Whether an instruction multiplies matrices."""
    gemm = line.opcode == "custom-call" and ("gemm" in line.target or "matmul" in line.target)
    return gemm or line.opcode in ("dot", "convolution")


def num_matmuls(line: hlo.Instruction, left: tuple[int, ...]) -> int:
    """B: of a dot the product of its batch axes, of a TPU's convolution of its dilated ones."""
    if found := re.search(r"lhs_dilate=([\dx]+)", line.attributes):
        return math.prod(int(n) for n in found[1].split("x"))
    found = re.search(r'lhs_batch_dim(?:s=\{|ensions":\[)([\d,"]*)', line.attributes)
    return math.prod(left[int(n)] for n in re.findall(r"\d+", found[1])) if found else 1
