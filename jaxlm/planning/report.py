"""A plan as a dict (plan.json), as a table for people, and as pictures."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxlm.planning import hlo
from jaxlm.planning.chips import GIB
from jaxlm.planning.compiling import Outcome
from jaxlm.planning.cost import Cost
from jaxlm.planning.memory import bytes_by_kind
from jaxlm.planning.topologies import Topology
from jaxlm.planning.warn import find_warnings
from jaxlm.program import Program, step_flops

TOP = 10


def describe(program: Program, topology: Topology) -> dict[str, Any]:
    """What is planned: everything that is known before the compiler is asked."""
    config, chip = program.config, topology.chip
    return {
        "topology": topology.name,
        "chip": chip.name,
        "num_chips": topology.num_chips,
        "num_slices": topology.num_slices,
        "mesh": {name: size for name, size in program.mesh.shape.items() if size > 1},
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
        "accumulation_steps": config.accumulation_steps,
        "tokens_per_chip": program.step_tokens / topology.num_chips,
        "remat": config.remat,
        "attention_kernel": program.model.config.attention_kernel,
        "dtype": program.model.config.dtype,
        "num_params": program.num_params,
        "model_flops": program.step_flops,
        "model_flops_causal": causal_flops(program),
    }


def causal_flops(program: Program) -> float:
    """Model FLOPs with attention's scores counted only where a decoder needs them."""
    return step_flops(program.config, program.model.config, program.objective, causal_half=True)


def make_report(
    program: Program,
    topology: Topology,
    outcome: Outcome,
    module: hlo.Module | None,
    cost: Cost | None,
) -> dict[str, Any]:
    """The whole plan. Times are an estimate: (optimistic, pessimistic), and their geometric mean where there is one number."""
    plan = describe(program, topology) | {
        "fits": outcome.fits,
        "hbm_bytes": outcome.hbm_bytes,
        "usable_bytes": outcome.usable_bytes,
        "temp_bytes": outcome.temp_bytes,
        "bytes_by_kind": bytes_by_kind(program, outcome),
        "compile_seconds": round(outcome.seconds, 1),
    }
    if module is not None and cost is not None:
        plan |= times(program, topology, cost)
    plan["warnings"] = find_warnings(program, topology.chip, outcome, module, cost)
    return plan


def times(program: Program, topology: Topology, cost: Cost) -> dict[str, Any]:
    """The estimates of a step: seconds, tokens a second, MFU, each with its range, and what takes the time."""
    chip, chips = topology.chip, topology.num_chips
    (low, high), mean = cost.seconds, cost.estimate
    mfu = lambda seconds: program.step_flops / seconds / chips / chip.peak_flops
    speed = lambda seconds: program.step_tokens / seconds / chips
    by_kind: dict[str, float] = defaultdict(float)
    for operation in cost.operations:
        by_kind[operation.kind] += cost.middle(operation.seconds)
    return {
        "is_estimate": True,
        "estimated_step_seconds": mean,
        "estimated_step_seconds_range": [low, high],
        "estimated_mfu": mfu(mean),
        "estimated_mfu_range": [mfu(high), mfu(low)],
        "estimated_mfu_causal": causal_flops(program) / mean / chips / chip.peak_flops,
        "tokens_per_second_per_chip": speed(mean),
        "tokens_per_second_per_chip_range": [speed(high), speed(low)],
        "seconds_by_kind": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "roofline": roofline(program, topology, cost),
        "top_operations": [
            {"source": source, "kind": kind, "seconds": seconds, "share": seconds / mean}
            for source, kind, seconds in cost.by_source()[:TOP]
        ],
        "collectives": collectives(cost),
    }


def roofline(program: Program, topology: Topology, cost: Cost) -> dict[str, Any]:
    """Seconds that a step cannot be shorter than, by resource: model FLOPs at peak, HBM traffic, the links between chips
    (everything hidden), the network between slices; and which of them is the longest."""
    chip = topology.chip
    total = lambda slow: sum(
        o.seconds[0] + o.hidden[0]
        for o in cost.operations
        if o.kind in hlo.COLLECTIVES and o.is_slow == slow
    )
    bounds = {
        "compute": program.step_flops / topology.num_chips / chip.peak_flops,
        "hbm": sum(o.num_bytes for o in cost.operations if o.kind not in hlo.COLLECTIVES)
        / chip.hbm_bandwidth,
        "ici": total(False),
        "dcn": total(True),
    }
    return bounds | {"bound": max(bounds, key=lambda name: bounds[name])}


def collectives(cost: Cost) -> list[dict[str, Any]]:
    """Collectives summed by kind and mesh axes: bytes and counts of a step on one device, seconds, what hides them."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for o in cost.operations:
        if o.kind not in hlo.COLLECTIVES or not o.axes:
            continue
        key = (o.kind, "+".join(o.axes))
        row = rows.setdefault(
            key,
            dict(
                kind=key[0],
                axes=key[1],
                count=0.0,
                bytes=0.0,
                exposed_seconds=0.0,
                hidden_seconds=0.0,
            ),
        )
        row["count"] += o.times
        row["bytes"] += o.num_bytes
        row["exposed_seconds"] += cost.middle(o.seconds)
        row["hidden_seconds"] += cost.middle(o.hidden)
        row["between_slices"] = o.is_slow
    return sorted(rows.values(), key=lambda row: -row["exposed_seconds"])


# --- for people -------------------------------------------------------------------------------------------------------


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as text for a terminal."""
    lines = [
        f"{plan['num_params'] / 1e9:.3f}B parameters on {plan['topology']} ({plan['num_chips']} chips, {describe_mesh(plan)}), "
        f"{plan['batch_size']} x {plan['seq_len']} tokens in {plan['accumulation_steps']} part(s), remat={plan['remat']}, "
        f"{plan['attention_kernel']} attention",
        "",
        f"{'FITS' if plan['fits'] else 'DOES NOT FIT'}: {plan['hbm_bytes'] / GIB:.2f} GiB of "
        f"{plan['usable_bytes'] / GIB:.2f} GiB a device",
    ]
    lines += [f"  {size / GIB:9.3f} GiB  {kind}" for kind, size in plan["bytes_by_kind"].items()]
    if "estimated_mfu" in plan:
        lines += ["", *format_times(plan)]
    lines += ["", "warnings:" if plan["warnings"] else "no warnings"]
    lines += [f"  - {warning}" for warning in plan["warnings"]]
    return "\n".join(lines)


def describe_mesh(plan: dict[str, Any]) -> str:
    """'fsdp=8 x tensor=2'."""
    return " x ".join(f"{k}={v}" for k, v in plan["mesh"].items()) or "one device"


def format_times(plan: dict[str, Any]) -> list[str]:
    """The estimates as lines of text."""
    low, high = plan["estimated_step_seconds_range"]
    slow, fast = plan["tokens_per_second_per_chip_range"]
    worst, best = plan["estimated_mfu_range"]
    bounds = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in plan["roofline"].items() if k != "bound")
    lines = [
        f"estimate: {plan['estimated_step_seconds'] * 1e3:.1f} ms a step ({low * 1e3:.1f} to {high * 1e3:.1f}), "
        f"{plan['tokens_per_second_per_chip']:,.0f} tokens/s/chip ({slow:,.0f} to {fast:,.0f}), "
        f"MFU {plan['estimated_mfu']:.1%} ({worst:.1%} to {best:.1%}; {plan['estimated_mfu_causal']:.1%} with the causal half of the scores)",
        f"model FLOPs {plan['model_flops']:.4g} a step; cannot be under (ms): {bounds}; bound by {plan['roofline']['bound']}",
        "",
        "       ms  share  what",
    ]
    lines += [
        f"{o['seconds'] * 1e3:9.2f} {o['share']:6.1%}  {o['kind']}, {o['source']}"
        for o in plan["top_operations"]
    ]
    if plan["collectives"]:
        lines += ["", "  exposed   hidden (ms)      MiB   times  collective"]
    lines += [
        f"{c['exposed_seconds'] * 1e3:9.2f} {c['hidden_seconds'] * 1e3:8.2f} {c['bytes'] / 2**20:15,.0f} {c['count']:7,.0f}  "
        f"{c['kind']} over {c['axes']}"
        for c in plan["collectives"]
    ]
    return lines


def draw(plan: dict[str, Any], output: Path) -> list[Path]:
    """memory.png (bytes by kind, against the limit) and, if there are times, time.png; returns what it wrote."""
    figures = {"memory.png": draw_memory(plan)}
    if "top_operations" in plan:
        figures["time.png"] = draw_times(plan)
    for name, figure in figures.items():
        figure.savefig(output / name, dpi=120, bbox_inches="tight")
    return [output / name for name in figures]


def draw_memory(plan: dict[str, Any]) -> Figure:
    """A device's memory by kind, beside its limit, in GiB."""
    figure = Figure(figsize=(8, 2.4))
    axes, left = figure.subplots(), 0.0
    for kind, size in plan["bytes_by_kind"].items():
        axes.barh([0], [size / GIB], left=left, label=f"{kind} {size / GIB:.2f}")
        left += size / GIB
    axes.axvline(plan["usable_bytes"] / GIB, color="black", linestyle="--", label="limit")
    axes.set_yticks([])
    axes.set_xlabel("GiB a device")
    axes.set_title(f"{plan['topology']}: {'fits' if plan['fits'] else 'does not fit'}")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.3), ncols=3, fontsize=7)
    return figure


def draw_times(plan: dict[str, Any]) -> Figure:
    """The operations that take longest, in milliseconds."""
    colors = {"compute": "tab:blue", "kernel": "tab:green"}
    rows = plan["top_operations"][::-1]
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1))
    axes = figure.subplots()
    labels = [f"{row['source']} ({row['kind']})" for row in rows]
    axes.barh(
        range(len(rows)),
        [row["seconds"] * 1e3 for row in rows],
        color=[colors.get(row["kind"], "tab:red") for row in rows],
    )
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_xlabel("estimated ms a step")
    axes.set_title(
        f"{plan['topology']}: {plan['estimated_step_seconds'] * 1e3:.0f} ms a step, the ten costliest sources"
    )
    return figure
