"""What a plan's reader should look at before the machine is booked: each finding with its size and what to change."""

import math
from collections import Counter

import jax

from jaxlm.planning import hlo
from jaxlm.planning.chips import GIB, Chip
from jaxlm.planning.compiling import Outcome
from jaxlm.planning.cost import Cost, hbm_bytes
from jaxlm.planning.memory import state_bytes
from jaxlm.program import Program

LARGE = 64 * 2**20  # bytes of one device that are worth a line
SHARE = 0.03  # of the step's time


def find_warnings(
    program: Program, chip: Chip, outcome: Outcome, module: hlo.Module | None, cost: Cost | None
) -> list[str]:
    """All findings, the most expensive kinds first."""
    found = []
    if not outcome.fits:
        found.append(does_not_fit(program, outcome))
    if outcome.unreadable:
        found.append(
            "no times: this jaxlib cannot read what the compiler made (memory is known all the same): "
            + outcome.unreadable
        )
    found += replicated_state(program)
    found += padded_sizes(program, chip)
    if module is None or cost is None:
        return found
    found += whole_scores(program, module)
    found += float32_matmuls(program, module)
    found += exposed_collectives(cost)
    padding = (
        outcome.argument_bytes and 1 - sum(state_bytes(program).values()) / outcome.argument_bytes
    )
    if padding > 0.1:
        found.append(
            f"{padding:.0%} of the arguments' bytes are padding: sizes that are no multiple of 128"
        )
    return found


def does_not_fit(program: Program, outcome: Outcome) -> str:
    """What is said of a program that needs more memory than a device has."""
    return (
        f"does not fit: needs {outcome.hbm_bytes / GIB:.2f} GiB of {outcome.usable_bytes / GIB:.2f} GiB a device; shard over "
        f"fsdp, take remat='full', raise accumulation_steps, or plan with --search"
    )


def replicated_state(program: Program) -> list[str]:
    """Arrays of the state that every device holds whole, although there are several devices."""
    mesh = program.mesh
    if mesh.size == 1:
        return []
    large = []
    for path, x in jax.tree_util.tree_leaves_with_path(program.state_shape):
        size = math.prod(x.shape) * x.dtype.itemsize
        if size >= LARGE and x.sharding.is_fully_replicated:
            large.append((size, jax.tree_util.keystr(path)))
    if not large:
        return []
    total = sum(size for size, _ in large)
    return [
        f"{len(large)} large arrays are whole on each of the {mesh.size} devices, {total / GIB:.2f} GiB of each (the largest: "
        f"{max(large)[1]}): a mesh with fsdp > 1 divides them"
    ]


def padded_sizes(program: Program, chip: Chip) -> list[str]:
    """Sizes that leave a part of the matrix units empty."""
    if chip.platform != "tpu":
        return []
    c, found = program.model.config, []
    ways = program.mesh.shape["tensor"]
    if c.head_dim % chip.mxu_width and c.head_dim < chip.mxu_width:
        share = c.head_dim / chip.mxu_width
        found.append(
            f"head_dim {c.head_dim} fills {share:.0%} of a matrix unit of {chip.mxu_width}: attention runs at that share of its speed; "
            f"fewer heads of {chip.mxu_width} have as many parameters"
        )
    vocab = c.vocab_size / ways
    if vocab % 128:
        padded = math.ceil(vocab / 128) * 128 * ways
        found.append(
            f"vocab_size {c.vocab_size} over tensor={ways} is no multiple of 128: {padded} takes no longer"
        )
    return found


def whole_scores(program: Program, module: hlo.Module) -> list[str]:
    """(length, length) and (length, vocab) arrays in device memory."""
    found, c, length = [], program.model.config, program.config.seq_len
    squares = 0.0
    if c.attention_kernel in (
        "xla",
        "cudnn",
    ):  # the others keep none, and a matrix may have these sizes, too
        squares = arrays_with(module, length, length, made_in=("attention", "kernels", "mask"))
    if squares >= LARGE:
        says = {
            "xla": "the reference attention writes whole scores; a fused kernel ('auto') writes none",
            "cudnn": "packed rows are a mask of each row to cuDNN; attention_kernel='triton' needs none",
        }[c.attention_kernel]
        found.append(
            f"{length} x {length} arrays in memory, {squares / 2**20:,.0f} MiB the largest, with attention_kernel={c.attention_kernel!r}: {says}"
        )
    logits = arrays_with(module, length, c.vocab_size // program.mesh.shape["tensor"])
    if logits >= LARGE and length != c.table_dim:  # else it may be the embedding table
        found.append(
            f"whole logits are in memory ({logits / 2**20:,.0f} MiB): lower objective.chunk_tokens"
        )
    return found


def arrays_with(module: hlo.Module, *sizes: int, made_in: tuple[str, ...] = ("",)) -> float:
    """Bytes of the largest array in device memory that has all these sizes among its axes; 0 if there is none.

    made_in: only those whose source line or operation has one of these words: an MLP may be as wide as a row is long.
    """
    wanted, largest = Counter(sizes), 0.0
    for step in module.walk():
        made = module.source(step.instruction) + step.instruction.op_name
        if not hbm_bytes(step.instruction.shape) or not any(word in made for word in made_in):
            continue
        for dtype, shape in step.instruction.arrays:
            if wanted <= Counter(shape):
                largest = max(largest, hlo.BYTES[dtype] * math.prod(shape))
    return largest


def float32_matmuls(program: Program, module: hlo.Module) -> list[str]:
    """Matmuls of float32 inputs, which take several passes through the matrix units."""
    if program.model.config.dtype == "float32":
        return [
            "the compute dtype is float32: matmuls run at a fraction of bfloat16's speed; dtype='auto'"
        ]
    sources: dict[str, float] = {}
    for lines in module.computations.values():
        shapes = {i.name: i for i in lines}
        for line in lines:
            if line.opcode not in ("convolution", "dot") or len(line.names) < 2:
                continue
            operands = [shapes.get(name) for name in line.names[:2]]
            if all(o is not None and o.arrays and o.arrays[0][0] == "f32" for o in operands):
                size = max(math.prod(o.arrays[0][1]) for o in operands if o)
                if size >= 2**20:
                    source = module.source(line)
                    sources[source] = max(sources.get(source, 0), size)
    return [
        f"float32 matmul at {source} (an operand of {size:,.0f} entries): it takes several passes of the matrix units"
        for source, size in sorted(sources.items())
    ]


def exposed_collectives(cost: Cost) -> list[str]:
    """Collectives that nothing hides, and those between slices, where they take a visible share of the step."""
    total = cost.estimate
    sums: dict[tuple[str, str, str, bool], float] = {}
    for o in cost.operations:
        if o.kind not in hlo.COLLECTIVES:
            continue
        key = (o.kind, "+".join(o.axes), o.source, o.is_slow)
        sums[key] = sums.get(key, 0.0) + cost.middle(o.seconds)
    found = []
    for (kind, axes, source, slow), seconds in sorted(sums.items(), key=lambda item: -item[1]):
        if seconds < SHARE * total:
            continue
        where = " between slices, on the slow network," if slow else ""
        found.append(
            f"{kind} over {axes or 'one device'}{where} takes {seconds / total:.0%} of the step with nothing beside it ({source})"
        )
    return found
