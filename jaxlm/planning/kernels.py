"""FLOPs of attention kernels, which the compiler cannot see into, from the shapes that they are called with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxlm.planning import hlo

Arrays = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Work:
    """flops: of the blocks that are computed. padded_flops: with heads filled up to the matrix unit's width."""

    flops: float
    padded_flops: float


def kernel_work(
    line: hlo.Instruction, shape_of: Callable[[str], Arrays], *, causal: bool, mxu_width: int
) -> Work | None:
    """The work of a splash (TPU) or cuDNN (GPU) call; None for every other custom call.

    A softmax(q k) v takes 2 matmuls forward. Backward it is 3 for queries' gradients and 4 for keys' and values', or 5 in one kernel.
    shape_of: the arrays of an instruction by its name. causal: whether splash skips the blocks above the diagonal.
    """
    operands = [shape_of(name) for name in line.names]
    if line.target == "tpu_custom_call" and "splash" in line.op_name + line.name:
        return splash_work(line, operands, causal, mxu_width)
    if "fmha" in line.target:
        share = 0.5 if "CAUSAL" in line.attributes.upper() else 1.0
        return gpu_work(operands, 5 if "Backward" in line.target else 2, share)
    if "triton" in line.target and "mha_" in line.op_name and "preprocess" not in line.op_name:
        return gpu_work(operands, 7 if "backward" in line.op_name else 2, 0.5 if causal else 1.0)
    return None


def gpu_work(operands: list[Arrays], matmuls: int, share: float) -> Work:
    """Of queries and keys (B, T, N, H) or (B, N, T, H): the head axis is the smaller one."""
    (batch, *sizes, width), (_, *key_sizes, _) = (arrays[0][1] for arrays in operands[:2])
    flops = 2.0 * batch * math.prod(sizes) * max(key_sizes) * width * matmuls * share
    return Work(flops, flops)


def splash_work(
    line: hlo.Instruction, operands: list[Arrays], causal: bool, mxu_width: int
) -> Work:
    """The work of a call of the splash kernel, forward or backward, by its operands' shapes."""
    blocks = operands[0][0][1]  # (1 or heads, blocks of queries, blocks of keys)
    query, key = operands[2][0][1], operands[3][0][1]  # (…, N, T, H) and (…, K, S, H)
    name = line.op_name + line.name
    if "_fwd" in name:
        matmuls = 2
    elif "_dq" in name:
        matmuls = 3
    else:  # one that also makes queries' gradients has a copy of them for each block of keys
        matmuls = 5 if any(len(shape) > len(query) for _, shape in line.arrays) else 4
    *rows, length, width = query
    whole = 2.0 * math.prod(rows) * length * key[-2] * matmuls
    share = live_share(blocks[-2:]) if causal else 1.0
    return Work(whole * share * width, whole * share * max(width, mxu_width))


def live_share(blocks: tuple[int, ...]) -> float:
    """The share of the blocks of a causal mask that hold anything: on the diagonal or under it."""
    rows, columns = blocks
    live = sum(min(columns, math.ceil((row + 1) * columns / rows)) for row in range(rows))
    return live / (rows * columns)
