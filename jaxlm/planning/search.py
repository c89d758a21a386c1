"""Which mesh, remat and accumulation run a config fastest on given machines: a rough count first, then the compiler on the best.

The global batch and the model stay as they are: all that is varied is how they are run.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from jaxlm.config_checks import shared_sizes
from jaxlm.models.config import TransformerConfig
from jaxlm.models.flops import train_step_flops
from jaxlm.models.layers import GATED
from jaxlm.parallel import mesh as meshes
from jaxlm.planning.chips import GIB, GPUS_PER_NODE
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


def any_mesh(config: ConfigDict, topology: Topology) -> ConfigDict:
    """The config on a mesh that every model can have, with a row for each chip: to count its parameters."""
    changed, rows = config.copy_and_resolve_references(), topology.num_chips
    with changed.unlocked():
        changed.mesh.update({axis: 1 for axis in changed.mesh} | {"data": rows})
        changed.batch_size, changed.eval.batch_size, changed.accumulation_steps = rows, rows, 1
    return changed


def candidates(config: ConfigDict, topology: Topology) -> Iterator[Candidate]:
    """Every way to run the config that divides evenly. `expert` and `stage` stay as they are.

    Raises:
      ValueError: if these are no sizes whose product divides the devices.
    """
    sizes = config.mesh
    if min(sizes.expert, sizes.stage) < 1 or topology.num_chips % kept_ways(config):
        raise ValueError(
            f"found mesh.expert={sizes.expert}, mesh.stage={sizes.stage}; --search keeps both as they are: set sizes whose "
            f"product divides the {topology.num_chips} devices of {topology.name}"
        )
    chips = topology.num_chips // kept_ways(config)
    for tensor, context in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        if chips % (tensor * context):
            continue
        if context > 1 and (config.seq_len < 8192 or config.seq_len % (context * 128)):
            continue
        rest = chips // (tensor * context)
        for fsdp in divisors(rest):
            whole = Candidate(rest // fsdp, fsdp, tensor, context, "none", 1)
            if divides(whole.apply(config), topology):
                for remat, parts in itertools.product(REMATS, possible_parts(whole, config)):
                    yield replace(whole, remat=remat, accumulation_steps=parts)


def divides(config: ConfigDict, topology: Topology) -> bool:
    """Whether the config's mesh divides its sizes, and the topology's slices its mesh."""
    sizes, slices = config.mesh, bound_slices(topology)
    if sizes.data % slices and sizes.stage % slices:
        return False
    mesh = AbstractMesh(tuple(sizes[axis] for axis in meshes.MESH_AXES), meshes.MESH_AXES)
    return not meshes.misfits(mesh, shared_sizes(config))


def bound_slices(topology: Topology) -> int:
    """Slices that only `data` or `stage` may span (`meshes.lay_out`): of TPUs, while any axis may span nodes of GPUs."""
    return topology.num_slices if topology.chip.platform == "tpu" else 1


def kept_ways(config: ConfigDict) -> int:
    """Over how many devices `expert` and `stage` spread parameters and rows, whatever the candidate."""
    return config.mesh.expert * config.mesh.stage


def possible_parts(candidate: Candidate, config: ConfigDict) -> list[int]:
    """In how many parts the batch can be taken on a candidate's mesh, ascending."""
    rows = config.batch_size // (candidate.data * candidate.fsdp * kept_ways(config))
    passing = max(1, config.pipeline_micro_batches) if config.mesh.stage > 1 else 1
    return [parts for parts in divisors(rows) if config.batch_size // parts % passing == 0]


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return [k for k in range(1, n + 1) if n % k == 0]


def rough_bytes(candidate: Candidate, config: ConfigDict, num_params: int) -> float:
    """Bytes of one device: state, gradients, and what a micro-batch's layers keep for the backward pass."""
    c, model = candidate, config.model
    ways = c.fsdp * kept_ways(config)
    state = num_params * (STATE_BYTES + GRADIENT_BYTES) / (ways * c.tensor)
    tokens = config.batch_size * config.seq_len / (c.data * ways * c.context * c.accumulation_steps)
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
    tokens = config.batch_size * config.seq_len / (c.data * c.fsdp * c.context * kept_ways(config))
    passes = 4 + 2 * (c.remat == "full")  # all-reduces of a layer's activations
    exposed = 0.0
    if c.tensor > 1:
        link = bandwidth(topology, 1, c.tensor)
        exposed += options.num_layers * passes * 2 * tokens * options.emb_dim * 2 / link
    if c.context > 1:
        heads = options.num_kv_heads * options.head_dim / c.tensor
        link = bandwidth(topology, c.tensor, c.context)
        exposed += options.num_layers * 6 * tokens * c.context * heads * 2 / link
    weights = num_params / (c.tensor * kept_ways(config))  # that the devices of `fsdp` share
    traffic, inner = 0.0, c.tensor * c.context * config.mesh.expert
    if c.fsdp > 1:
        link = bandwidth(topology, inner, c.fsdp)
        traffic += 3 * weights * 2 * c.accumulation_steps / link
    if c.data > 1:
        link = bandwidth(topology, inner * c.fsdp * config.mesh.stage, c.data)
        traffic += 2 * 2 * weights / c.fsdp * 2 / link
    if bound_slices(topology) > 1:
        traffic += 2 * weights / c.fsdp * 4 / chip.dcn_bandwidth
    return compute + exposed + max(0.0, traffic - 0.8 * compute)


def bandwidth(topology: Topology, stride: int, ways: int) -> float:
    """Bytes/s of an axis of `ways` devices, `stride` apart in the mesh's order: inside a slice of TPUs, inside a node of GPUs, or,
    where it spans nodes, of the network that its members in one node have."""
    chip = topology.chip
    if chip.platform == "tpu" or stride * ways <= GPUS_PER_NODE:
        return chip.axis_bandwidth
    return max(1, GPUS_PER_NODE // stride) * chip.dcn_bandwidth


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
    count: int,
) -> list[dict[str, Any]]:
    """The plans of the shortlist, those that fit first and then the fastest.

    A candidate that does not fit is tried again in twice as many parts, where the batch allows.
    """
    plans = []
    for candidate in shortlist(config, topology, num_params, count):
        while candidate is not None:
            log.info("planning %s", candidate)
            plan = make_plan(candidate.apply(config), topology.name)
            plans.append(plan)
            candidate = None if plan["fits"] else more_parts(candidate, config)
    return sorted(plans, key=lambda p: (not p["fits"], p.get("estimated_step_seconds", math.inf)))


def more_parts(candidate: Candidate, config: ConfigDict) -> Candidate | None:
    """The candidate with the next larger number of parts that at least doubles, or None."""
    least = 2 * candidate.accumulation_steps
    larger = [parts for parts in possible_parts(candidate, config) if parts >= least]
    return replace(candidate, accumulation_steps=larger[0]) if larger else None


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
