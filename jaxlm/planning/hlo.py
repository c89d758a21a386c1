"""The compiler's text of an optimised module, read: computations, loops, sources, collectives.

Only what a plan needs is understood. Text and not an API, because estimates of the TPU compiler are nowhere else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1, "token": 0,
}  # fmt: skip
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def arrays_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each array in a shape's text."""
    return [
        (dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in ARRAY.findall(shape)
        if dtype in BYTES
    ]


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. shape, operands and attributes are text; `names` are the operands' names."""

    name: str
    opcode: str
    shape: str
    operands: str
    attributes: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the instructions that it reads."""
        return tuple(re.findall(r"%([\w.\-]+)", self.operands))

    @cached_property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of each array in the result."""
        return arrays_of(self.shape)

    @property
    def num_bytes(self) -> float:
        """Bytes of its results."""
        return sum(BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays)

    @property
    def estimated_cycles(self) -> float | None:
        """The compiler's own estimate; None where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return float(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """What jax calls it, with the scopes that it is in; '' if nothing."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def frame(self) -> int | None:
        """The number of its stack frame in the module's table; None without one."""
        found = re.search(r"stack_frame_id=(\d+)", self.attributes)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def channel(self) -> int | None:
        """The channel that a collective goes over; None without one."""
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return int(found[1]) if found else None

    def called(self, *keys: str) -> list[str]:
        """Names of the computations that it calls under one of these attributes ('body', 'calls', …)."""
        names = []
        for key in keys:
            for one, many in re.findall(
                rf"\b{key}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.attributes
            ):
                names += [one] if one else re.findall(r"%([\w.\-]+)", many)
        return names

    @property
    def rendezvous(self) -> str:
        """The name under which what a TPU hands to its host for another slice meets what comes back; '' of all else."""
        found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.attributes)
        return found[1] if found and self.transfer_type else ""

    @property
    def transfer_type(self) -> str:
        """'ALL_REDUCE', 'ONE_TO_ONE', …: what hosts of several slices do with what they are handed; '' for nothing."""
        found = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', self.attributes)
        return found[1] if found else ""

    @property
    def collective(self) -> str:
        """Which of COLLECTIVES it is or starts; '' for none."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else ""


@dataclass
class Module:
    """computations: name -> its instructions in the order in which they run. frames: id -> (file, line, function)."""

    computations: dict[str, list[Instruction]]
    entry: str
    frames: dict[int, list[tuple[str, int, str]]] = field(default_factory=dict)

    def by_name(self, computation: str) -> dict[str, Instruction]:
        """The instructions of a computation."""
        return {i.name: i for i in self.computations[computation]}

    def trip_count(self, loop: Instruction) -> int:
        """How often a while runs: as the compiler says, or from its condition `i < constant` (counted from 0).

        Raises:
          ValueError: if neither tells.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        (condition,) = loop.called("condition")
        lines = self.computations[condition]
        with_inside = {line.name: [line, *self.inside(line)] for line in lines}
        constants = {
            i.name: int(i.operands)
            for some in with_inside.values()
            for i in some
            if i.opcode == "constant" and i.operands.isdigit()
        }
        for line in lines:
            for compare in with_inside[line.name]:
                if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
                    continue
                limits = [constants[n] for n in (*compare.names, *line.names) if n in constants]
                if limits:
                    return limits[0]
        raise ValueError(f"the trip count of {loop.name} is not in its condition {condition}")

    def longest_branch(self, conditional: Instruction) -> str:
        """The branch that a step is taken to run: here it is the update, which is skipped only after a NaN."""
        branches = conditional.called(
            "branch_computations", "true_computation", "false_computation"
        )
        return max(branches, key=lambda name: len(self.computations[name]))

    def walk(self, computation: str = "", times: float = 1.0) -> Iterator[Step]:
        """Every instruction that runs by itself (not those inside a fusion), with how often it does."""
        name = computation or self.entry
        for index, instruction in enumerate(self.computations[name]):
            yield Step(instruction, times, name, index)
            match instruction.opcode:
                case "while":
                    (body,) = instruction.called("body")
                    yield from self.walk(body, times * self.trip_count(instruction))
                case "conditional":
                    yield from self.walk(self.longest_branch(instruction), times)
                case "call" | "async-start":
                    for called in instruction.called("to_apply", "calls"):
                        yield from self.walk(called, times)

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """All instructions of a fusion, those of nested ones included."""
        for name in instruction.called("calls"):
            for inner in self.computations.get(name, ()):
                yield inner
                if inner.opcode == "fusion":
                    yield from self.inside(inner)

    def source(self, instruction: Instruction, package: str = "/jaxlm/") -> str:
        """'jaxlm/models/attention.py:70' of the innermost frame in `package`; else the operation's name."""
        for file, line, _ in self.frames.get(instruction.frame or 0, []):
            if package in file:
                return f"{package.strip('/')}/{file.rpartition(package)[2]}:{line}"
        for file, line, _ in self.frames.get(instruction.frame or 0, []):
            return f"{file.rpartition('site-packages/')[2]}:{line}"
        return instruction.op_name or instruction.name


@dataclass(frozen=True)
class Step:
    """An instruction that runs `times` times, at place `index` of its computation."""

    instruction: Instruction
    times: float
    computation: str
    index: int


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", None
    for line in whole_lines(text):
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head and not line.startswith(" "):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None and (instruction := parse_instruction(line)):
            lines.append(instruction)
    return Module(computations, entry, parse_frames(text))


def whole_lines(text: str) -> Iterator[str]:
    """Lines of the text; an attribute that was written over several (a kernel's metadata) is put back into one."""
    held: list[str] = []
    for line in text.splitlines():
        if line.endswith("kernel_metadata={") or (held and not line.startswith("}}")):
            held.append(line)
        elif held:
            yield "".join([*held, line])
            held = []
        else:
            yield line


def parse_instruction(line: str) -> Instruction | None:
    """The instruction that a line of HLO text is; None if it is none."""
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    close = closing(rest, opening)
    return Instruction(head[1], rest[:opening], shape, rest[opening + 1 : close], rest[close + 1 :])


def closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[start : start + 80]!r}")


def parse_frames(text: str) -> dict[int, list[tuple[str, int, str]]]:
    """Frame id -> its (file, line, function), innermost first, from the tables before the first computation."""
    head = text[: text.find("\n\n%") if "\n\n%" in text else len(text)]
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    for line in head.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif found := re.match(r"(\d+) (.*)", line):
            table[int(found[1])] = found[2]
    if "StackFrames" not in tables:
        return {}
    numbers = lambda line: {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", line)}
    files, functions = tables["FileNames"], tables["FunctionNames"]
    places = {}
    for key, line in tables["FileLocations"].items():
        at = numbers(line)
        file, function = files[at["file_name_id"]], functions[at["function_name_id"]]
        places[key] = (json.loads(file), at["line"], json.loads(function))
    frames: dict[int, list[tuple[str, int, str]]] = {}
    for key, line in tables["StackFrames"].items():
        at = numbers(line)
        # Parents are counted from 1 upwards where 1 is nobody, so frame 3 has parent "3" for frame 2.
        parent = at.get("parent_frame_id", 1) - 1
        frames[key] = [places[at["file_location_id"]], *frames.get(parent, [])]
    return frames


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """The groups of a collective, (groups, members): places in the mesh's flat list of devices.

    Three spellings: {{0,1},{2,3}}; [2,2]<=[4] or [2,2]<=[2,2]T(1,0); mesh['a'=2,'b'=2] {'a'}. Permutations have
    source_target_pairs, whose pairs are the groups.
    """
    if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return np.array(
            [[int(n) for n in pair.split(",")] for pair in re.findall(r"[\d,]+(?=\})", found[1])]
        )
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, dims = (tuple(int(n) for n in found[k].split(",")) for k in (1, 2))
        places = np.arange(math.prod(dims)).reshape(dims)
        if found[3]:
            places = places.transpose([int(n) for n in found[3].split(",")])
        return places.reshape(shape)
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\]\s*(?:device_ids=\(([\d,]*)\)\s*)?\{([^}]*)\}", attributes
    ):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        over = re.findall(r"'([^']+)'", found[3])
        ids = (
            np.arange(math.prod(sizes.values()))
            if not found[2]
            else np.array([int(n) for n in found[2].split(",")])
        )
        places = ids.reshape(tuple(sizes.values()))
        axes = list(sizes)
        order = [k for k, a in enumerate(axes) if a not in over] + [axes.index(a) for a in over]
        members = math.prod(sizes[a] for a in over)
        return places.transpose(order).reshape(-1, members)
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array(
            [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
        )
    return np.arange(num_devices)[None]
