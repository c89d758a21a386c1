"""What a training run takes on machines that are not here: the real step, compiled ahead of time, and what follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxlm.files import cache_folder, write_text
from jaxlm.planning import cost, hlo
from jaxlm.planning.compiling import compile_program, plan_program
from jaxlm.planning.kernels import Sparsity
from jaxlm.planning.report import draw, make_report
from jaxlm.planning.topologies import parse_topology


def make_plan(config: ConfigDict, topology: str, *, cache: Path | None = None) -> dict[str, Any]:
    """The plan of a pretraining config on a topology ('v5e-16', '2xv5e-256', 'h100x8').

    cache: folder in which compiled programs are kept, so that the same one is not compiled twice.

    Returns plan.json's content: at least fits, hbm_bytes, temp_bytes, bytes_by_kind, model_flops, warnings, and if the program
    fits also estimated_step_seconds, estimated_mfu, tokens_per_second_per_chip and collectives; see `planning.report`.

    Raises:
      ValueError: an unknown topology, or a config that the mesh does not fit.
      ModuleNotFoundError: with what to install to compile for such machines.
    """
    machine = parse_topology(topology)
    program = plan_program(config, machine)
    outcome = compile_program(program, machine.chip, cache)
    module = hlo.parse(outcome.text) if outcome.text else None
    sparsity = Sparsity(config.family == "gpt", program.model.config.num_experts)
    costs = cost.estimate(module, program.mesh, machine.chip, sparsity) if module else None
    return make_report(program, machine, outcome, module, costs)


def default_cache() -> Path:
    """The folder where plans keep what was compiled."""
    return cache_folder() / "plans"


def write_plan(plan: dict[str, Any], output: Path) -> None:
    """plan.json, memory.png and time.png in a folder."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "plan.json", json.dumps(plan, indent=1) + "\n")
    draw(plan, output)
