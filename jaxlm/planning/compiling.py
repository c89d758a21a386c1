"""The real train step, compiled for a machine that is not here; or how much memory it lacks there."""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.files import write_whole
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel.compiler_options import compiler_options
from jaxlm.planning.chips import Chip
from jaxlm.planning.topologies import Topology, topology_devices
from jaxlm.program import Program, make_program

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)i?B?"
# What two generations of the TPU compiler say of a program that does not fit.
TOO_LARGE = (
    re.compile(rf"\({SIZE}\) exceeds available HBM \({SIZE}\)"),
    re.compile(rf"Used {SIZE} of {SIZE} hbm"),
)
# Autotuning needs the card; without it XLA takes its defaults.
AHEAD_OF_TIME = {"tpu": {}, "gpu": {"xla_gpu_autotune_level": "0"}}


@dataclass(frozen=True)
class Outcome:
    """fits: whether the program fits the chip's memory. hbm_bytes: what it takes, or would. text: the optimised module, or ''.

    temp_bytes, argument_bytes, …: what the compiler says of each kind; 0 where it gave up. unreadable: why there is no text although
    it fits.
    """

    fits: bool
    hbm_bytes: float
    usable_bytes: float
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    temp_bytes: int = 0
    code_bytes: int = 0
    text: str = ""
    unreadable: str = ""
    seconds: float = 0.0


def lower(program: Program) -> jax.stages.Lowered:
    """The train step lowered; jax's own error of a missing cuDNN does not say what to do."""
    try:
        return program.lower_train_step()
    except RuntimeError as error:
        if "cuDNN not found" not in str(error):
            raise
        raise ModuleNotFoundError(
            "found: no cuDNN, whose version jax asks for while it traces cuDNN's attention\n"
            "expected: its library; no card is needed\n"
            "change: pip install nvidia-cudnn-cu12, or plan with --config.attention_kernel=triton"
        ) from error


def plan_program(config: ConfigDict, topology: Topology) -> Program:
    """The program of a pretraining config on a topology's devices; nothing is allocated and no text is read.

    Raises:
      ValueError: a config of fine-tuning, or one that the mesh does not fit.
    """
    if "task" in config:
        raise ValueError(
            "plans are of pretraining, and this config is for python -m jaxlm.finetune"
        )
    mesh = meshes.make_mesh(**config.mesh, devices=topology_devices(topology))
    tokenizer = stand_in_tokenizer(config.model.vocab_size, config.tokenizer.num_sentinels)
    return make_program(config, mesh, tokenizer)


def stand_in_tokenizer(vocab_size: int, num_sentinels: int = 0) -> Any:
    """What an objective asks of a tokenizer, at the config's size: a plan needs shapes and no words."""
    names = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
    sentinels = tuple(range(len(names), len(names) + num_sentinels))
    return SimpleNamespace(
        vocab_size=vocab_size,
        special_ids=frozenset(range(len(names) + num_sentinels)),
        sentinel_ids=sentinels,
        is_word_start=np.ones(vocab_size, bool),
        num_bytes=np.ones(vocab_size, np.int32),
        **{f"{name}_id": index for index, name in enumerate(names)},
    )


def compile_program(program: Program, chip: Chip, cache: Path | None = None) -> Outcome:
    """Compiles the train step for its mesh's devices, or takes what an earlier compilation of the same program left in `cache`.

    Raises:
      JaxRuntimeError: of the compiler, for anything but a lack of memory.
      ModuleNotFoundError: with what to install, if a plan for GPUs lacks cuDNN.
    """
    began = time.perf_counter()
    lowered = lower(program)
    options = (
        compiler_options(program.mesh, program.config.compiler_flags) | AHEAD_OF_TIME[chip.platform]
    )
    path = cache and cache / f"{program_key(lowered, program, options)}.json.gz"
    if path and path.exists():
        kept = Outcome(**json.loads(gzip.decompress(path.read_bytes())))
        if not kept.unreadable:
            return kept
    with tempfile.TemporaryDirectory() as dump:
        dumping = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options | dumping)
        except jax.errors.JaxRuntimeError as error:
            needed, usable = read_too_large(str(error))
            outcome = Outcome(False, needed, usable)
        else:
            outcome = measure(compiled, chip, Path(dump))
    outcome = replace(outcome, seconds=time.perf_counter() - began)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept_bytes = gzip.compress(json.dumps(asdict(outcome)).encode())
        write_whole(path, lambda file: file.write(kept_bytes))
    return outcome


def program_key(lowered: Any, program: Program, options: Mapping[str, Any]) -> str:
    """Equal for programs that the same compiler makes the same of. Line numbers do not count, so those in a plan may be older."""
    devices = [
        (d.device_kind, getattr(d, "coords", d.id), getattr(d, "slice_index", 0))
        for d in program.mesh.devices.flat
    ]
    versions = [
        importlib.metadata.version(name) if importlib.util.find_spec(module) else ""
        for name, module in (("jaxlib", "jaxlib"), ("libtpu", "libtpu"))
    ]
    parts = (lowered.as_text(), devices, versions, sorted(options.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def measure(compiled: Any, chip: Chip, dump: Path) -> Outcome:
    """What the compiler says of a program that it could make. dump: the folder where it wrote its own text of it."""
    memory = compiled.memory_analysis()
    kinds = dict(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
    )
    hbm_bytes = sum(kinds.values()) - 2 * kinds["alias_bytes"]
    fits = hbm_bytes <= chip.usable_bytes
    try:
        text, unreadable = compiled.as_text(), ""
    except jax.errors.JaxRuntimeError as error:
        # Of jaxlib, about what a newer compiler made: libtpu 0.0.52's programs for v5p, for one. It can print them itself.
        text, unreadable = dumped_text(dump), str(error).splitlines()[0]
        unreadable = "" if text else unreadable
    return Outcome(fits, hbm_bytes, chip.usable_bytes, **kinds, text=text, unreadable=unreadable)


def dumped_text(dump: Path) -> str:
    """The text of the largest program that the TPU's compiler has written into `dump` after its last pass; '' if there is none."""
    files = sorted(dump.glob("*.after_codegen.txt"), key=lambda file: file.stat().st_size)
    return files[-1].read_text(encoding="utf-8") if files else ""


def read_too_large(message: str) -> tuple[float, float]:
    """(bytes that it needs, bytes that there are) of a compiler's complaint.

    Raises:
      RuntimeError: with the message, if it is about anything else.
    """
    if "RESOURCE_EXHAUSTED" in message:
        for pattern in TOO_LARGE:
            if found := pattern.search(message):
                needed, unit, usable, usable_unit = found.groups()
                return float(needed) * UNITS[unit], float(usable) * UNITS[usable_unit]
    raise RuntimeError(f"the compiler refused the program:\n{message}")
