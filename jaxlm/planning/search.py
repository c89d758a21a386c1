"""Which mesh, remat and accumulation run a config fastest on given machines: a rough count first, then the compiler on the best.

The global batch and the model stay as they are: all that is varied is how they are run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxlm.files import write_text
from jaxlm.models.config import TransformerConfig
from jaxlm.models.flops import train_step_flops
from jaxlm.models.layers import GATED
from jaxlm.planning.chips import GIB
from jaxlm.planning.report import describe_mesh
from jaxlm.planning.topologies import Topology

log = logging.getLogger("jaxlm")

REMATS = ("none", "dots", "full")
RECOMPUTED = {
    "none": 0.0,
    "attention": 0.05,
    "dots": 0.05,
    "full": 1 / 3,
}  # of forward and backward
REACHABLE = 0.75  # of the peak, by matmuls
SLACK = 1.25  # the rough count of bytes may be wrong by so much before a candidate is dropped
STATE_BYTES, GRADIENT_BYTES = 12, 4  # of a parameter: float32 weights, two moments; its gradient


@dataclass(frozen=True)
class Candidate:
    """How a config could be run: mesh sizes, what is recomputed, in how many parts a batch is taken."""

    data: int
    fsdp: int
    tensor: int
    context: int
    remat: str
    accumulation_steps: int

    def apply(self, config: ConfigDict) -> ConfigDict:
        """The config with the candidate's mesh, rematerialisation and micro-batches."""
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            sizes = dict(data=self.data, fsdp=self.fsdp, tensor=self.tensor, context=self.context)
            changed.mesh.update(sizes)
            changed.remat, changed.accumulation_steps = self.remat, self.accumulation_steps
        return changed

    @property
    def key(self) -> str:
        """A name for what was compiled of it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


def candidates(config: ConfigDict, topology: Topology) -> Iterator[Candidate]:
    """Every way to run the config that divides evenly; `data` is a multiple of the slices. `expert` and `stage` stay as they are."""
    model, kept = config.model, config.mesh.expert * config.mesh.stage
    chips = topology.num_chips // kept
    for tensor, context in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        if chips % (tensor * context) or (context > 1 and config.seq_len % (context * 128)):
            continue
        if any(size % tensor for size in (model.num_heads, model.num_kv_heads, model.mlp_dim)):
            continue
        if model.vocab_size % tensor or (context > 1 and config.seq_len < 8192):
            continue
        rest = chips // (tensor * context)
        for fsdp in divisors(rest):
            data = rest // fsdp
            if (
                data % topology.num_slices
                or model.emb_dim % fsdp
                or config.batch_size % (rest * kept)
            ):
                continue
            rows = config.batch_size // (rest * kept)
            for remat, parts in itertools.product(REMATS, divisors(rows)):
                yield Candidate(data, fsdp, tensor, context, remat, parts)


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return [k for k in range(1, n + 1) if n % k == 0]


def rough_bytes(candidate: Candidate, config: ConfigDict, num_params: int) -> float:
    """Bytes of one device: state, gradients, and what a micro-batch's layers keep for the backward pass."""
    c, model = candidate, config.model
    state = num_params * (STATE_BYTES + GRADIENT_BYTES) / (c.fsdp * c.tensor)
    tokens = config.batch_size * config.seq_len
    tokens /= c.data * c.fsdp * c.context * c.accumulation_steps
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim * 2
    gates = 2 if model.activation in GATED else 1
    inner = (heads + gates * model.mlp_dim) / c.tensor
    # In bfloat16: a layer's input; with 'dots' its matmuls' outputs; with 'none' norms and activations, too.
    kept = {
        "full": model.emb_dim,
        "dots": 4 * model.emb_dim + inner,
        "none": 10 * model.emb_dim + 3 * inner,
    }
    layer = 2 * tokens * (10 * model.emb_dim + 3 * inner)  # the one that is being differentiated
    return state + 2 * tokens * kept[c.remat] * model.num_layers + layer


def rough_seconds(
    candidate: Candidate, config: ConfigDict, topology: Topology, num_params: int
) -> float:
    """A step's seconds: matmuls at REACHABLE of the peak, what tensor and context exchange in full, of the parameters' traffic what
    the matmuls cannot hide."""
    c, chip = candidate, topology.chip
    options = TransformerConfig(**config.model)
    flops = train_step_flops(
        options, config.batch_size, config.seq_len, config.seq_len, causal=config.family == "gpt"
    )
    compute = flops * (1 + RECOMPUTED[c.remat]) / topology.num_chips / chip.peak_flops / REACHABLE
    link = chip.axis_bandwidth
    tokens = config.batch_size * config.seq_len / (c.data * c.fsdp * c.context)
    passes = 4 + 2 * (c.remat == "full")  # all-reduces of a layer's activations
    exposed = 0.0
    if c.tensor > 1:
        exposed += options.num_layers * passes * 2 * tokens * options.emb_dim * 2 / link
    if c.context > 1:
        exposed += (
            options.num_layers
            * 6
            * tokens
            * c.context
            * options.num_kv_heads
            * options.head_dim
            * 2
            / c.tensor
            / link
        )
    weights = num_params * 2 / c.tensor
    traffic = 0.0
    if c.fsdp > 1:
        traffic += 3 * weights * c.accumulation_steps / link
    if c.data > 1:
        traffic += 2 * 2 * num_params * 2 / (c.tensor * c.fsdp) / link
    if topology.num_slices > 1:
        traffic += 2 * num_params * 4 / (c.tensor * c.fsdp) / chip.dcn_bandwidth
    return compute + exposed + max(0.0, traffic - 0.8 * compute)


def shortlist(
    config: ConfigDict, topology: Topology, num_params: int, count: int
) -> list[Candidate]:
    """The `count` candidates that are fastest by the rough count among those that may fit.

    Of accumulation, only the fewest parts that may fit are taken for each mesh and remat.
    """
    limit = topology.chip.usable_bytes * SLACK
    fitting: dict[tuple, Candidate] = {}
    for c in candidates(config, topology):
        if rough_bytes(c, config, num_params) > limit:
            continue
        same = (c.data, c.fsdp, c.tensor, c.context, c.remat)
        if same not in fitting or c.accumulation_steps < fitting[same].accumulation_steps:
            fitting[same] = c
    seconds = lambda c: rough_seconds(c, config, topology, num_params)
    return sorted(fitting.values(), key=seconds)[:count]


def search(
    config: ConfigDict,
    topology: Topology,
    make_plan: Callable[[ConfigDict, str], dict[str, Any]],
    num_params: int,
    folder: Path,
    count: int,
) -> list[dict[str, Any]]:
    """The plans of the shortlist, those that fit first and then the fastest; each is kept in `folder` and not made twice.

    A candidate that does not fit is tried again in twice as many parts, where the batch allows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = []
    for candidate in shortlist(config, topology, num_params, count):
        while candidate is not None:
            path = folder / f"{candidate.key}.json"
            if path.exists():
                plan = json.loads(path.read_text(encoding="utf-8"))
            else:
                log.info("planning %s", candidate)
                plan = make_plan(candidate.apply(config), topology.name)
                write_text(path, json.dumps(plan, indent=1) + "\n")
            plans.append(plan)
            candidate = None if plan["fits"] else more_parts(candidate, config)
    return sorted(plans, key=lambda p: (not p["fits"], p.get("estimated_step_seconds", math.inf)))


def more_parts(candidate: Candidate, config: ConfigDict) -> Candidate | None:
    """The candidate with the next larger number of parts that at least doubles, or None."""
    c = candidate
    rows = config.batch_size // (c.data * c.fsdp)
    larger = [k for k in divisors(rows) if k >= 2 * c.accumulation_steps]
    if not larger:
        return None
    return Candidate(c.data, c.fsdp, c.tensor, c.context, c.remat, larger[0])


def format_ranking(plans: list[dict[str, Any]]) -> str:
    """The plans as lines, the best first."""
    lines = ["   GiB     ms    MFU  mesh, remat, parts"]
    for plan in plans:
        seconds, mfu = plan.get("estimated_step_seconds"), plan.get("estimated_mfu")
        time = f"{seconds * 1e3:6.0f} {mfu:6.1%}" if plan["fits"] and seconds else "does not fit "
        lines.append(
            f"{plan['hbm_bytes'] / GIB:6.2f} {time}  {describe_mesh(plan)}, {plan['remat']}, {plan['accumulation_steps']}"
        )
    return "\n".join(lines)
