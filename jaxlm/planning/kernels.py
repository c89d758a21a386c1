"""FLOPs of kernels of attention and of experts, which the compiler cannot see into, from the shapes that they are called with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxlm.models.grouped import tile_rows, tile_side
from jaxlm.planning import hlo

Arrays = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Work:
    """flops: of the blocks that are computed. padded_flops: with heads filled up to the matrix unit's width, and groups of rows
    to whole tiles. num_bytes: what is loaded and stored, where it is not each array once. is_matmul: nothing else is done."""

    flops: float
    padded_flops: float
    num_bytes: float = 0.0
    is_matmul: bool = False


@dataclass(frozen=True)
class Sparsity:
    """What a kernel's shapes do not say. causal: whether splash skips the blocks above the diagonal. num_experts: of a layer, 0 =
    none; rows are theirs in equal parts, and a device that has some of them multiplies the rows of these."""

    causal: bool
    num_experts: int = 0


def kernel_work(
    line: hlo.Instruction,
    shape_of: Callable[[str], Arrays],
    *,
    sparsity: Sparsity,
    mxu_width: int,
) -> Work | None:
    """The work of a call of splash or megablox (TPU), cuDNN or Triton (GPU); None for every other custom call.

    A softmax(q k) v takes 2 matmuls forward. Backward it is 3 for queries' gradients and 4 for keys' and values', or 5 in one kernel.
    shape_of: the arrays of an instruction by its name.
    """
    operands = [shape_of(name) for name in line.names]
    if line.target == "tpu_custom_call" and "splash" in line.op_name + line.name:
        return splash_work(line, operands, sparsity.causal, mxu_width)
    if line.target == "tpu_custom_call" and "gmm)/pallas_call" in line.op_name:
        return grouped_work(line, operands, sparsity.num_experts)
    if "fmha" in line.target:
        share = 0.5 if "CAUSAL" in line.attributes.upper() else 1.0
        return gpu_work(operands, 5 if "Backward" in line.target else 2, share)
    if "triton" in line.target and "mha_" in line.op_name and "preprocess" not in line.op_name:
        return gpu_work(
            operands, 7 if "backward" in line.op_name else 2, 0.5 if sparsity.causal else 1.0
        )
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


def grouped_work(line: hlo.Instruction, operands: list[Arrays], num_experts: int) -> Work:
    """The work of jaxlm.models.grouped on a TPU, rows by kernels (gmm) or rows by rows (tgmm).

    A tile of rows is multiplied once for every group that has rows in it: for each group one more than it fills, in the mean.
    """
    (dtype, (rows, _)), (_, right) = operands[-2][0], operands[-1][0]
    result = line.arrays[0][1]
    gathers = len(right) == 3  # else it sums over rows
    groups, *sides = right if gathers else result
    outer = result[-1]
    inner = math.prod(sides) // outer
    size, tile = int(hlo.BYTES[dtype]), tile_rows(rows)
    needed = rows * groups / max(num_experts, groups)
    visited = needed + groups * tile
    # Each side once for every tile of the other.
    left_loads = inner * outer / tile_side(outer, size)
    right_loads = inner * outer / (tile if gathers else tile_side(inner, size))
    loaded = visited * (left_loads + right_loads)
    written = needed * outer if gathers else groups * inner * outer
    flops = 2.0 * inner * outer
    return Work(flops * needed, flops * visited, size * (loaded + written), is_matmul=True)


def live_share(blocks: tuple[int, ...]) -> float:
    """The share of the blocks of a causal mask that hold anything: on the diagonal or under it."""
    rows, columns = blocks
    live = sum(min(columns, math.ceil((row + 1) * columns / rows)) for row in range(rows))
    return live / (rows * columns)
