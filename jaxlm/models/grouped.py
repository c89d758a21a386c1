"""A matrix product for each group of rows: what experts do to the tokens that chose them, of which none are dropped.

    rows     a a a b c c c c .      sizes 3 1 4: rows of group 0, 1, 2 in this order, then rows of no group
    kernels  A     B C              result  aA aA aA bB cC cC cC cC 0

`jax.lax.ragged_dot` says this, but XLA multiplies all rows by all kernels and masks, which is E times the work: everywhere but
on TPUs, and there, by its version, for the gradient of the kernels. On TPUs JAX's own Pallas kernels (megablox,
arXiv:2211.15841) go through tiles of rows, each once for every group that has rows in it. Elsewhere rows are laid out in
blocks of one group each, and every block meets its own kernel:

    blocks   a a | a . | b . | c c | c c            of 2 rows; at most (A + E (b - 1)) / b of them for A rows

Which of the two it is follows from the platform that is compiled for, here or elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from jaxlm.models.kernels.sharding import whole_blocks


@jax.custom_vjp
def grouped_matmul(x_AD: jax.Array, kernels_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """(A, F): the rows of group e times kernels_EDF[e]; 0 for rows after the last group.

    sizes_E: int32, of sum at most A. Products accumulate in float32; the result has the dtype of x. Differentiable by x
    and the kernels, in reverse mode.
    """
    return _multiply(x_AD, kernels_EDF, sizes_E, transposed=False)


def _multiply(x_AD, kernels_EDF, sizes_E, *, transposed):
    """transposed: by each kernel's transpose, which then is (F, D)."""
    return jax.lax.platform_dependent(
        x_AD,
        kernels_EDF,
        sizes_E,
        tpu=functools.partial(_multiply_tiles, transposed=transposed),
        default=functools.partial(_multiply_blocks, transposed=transposed),
    )


def _forward(x_AD, kernels_EDF, sizes_E):
    return grouped_matmul(x_AD, kernels_EDF, sizes_E), (x_AD, kernels_EDF, sizes_E)


def _backward(residuals, grad_AF):
    x_AD, kernels_EDF, sizes_E = residuals
    x_grad_AD = _multiply(grad_AF, kernels_EDF, sizes_E, transposed=True)
    kernels_grad_EDF = jax.lax.platform_dependent(
        x_AD,
        grad_AF,
        sizes_E,
        tpu=functools.partial(_outer_tiles, kernels_EDF.dtype),
        default=functools.partial(_outer_blocks, kernels_EDF.dtype),
    )
    return x_grad_AD, kernels_grad_EDF, None


grouped_matmul.defvjp(_forward, _backward)


# --- TPU --------------------------------------------------------------------------------------------------------------

# Rows, and both sides of a kernel in bfloat16, of one step of a kernel's grid: 341 FLOPs for each byte that it loads, which is
# more than v4, v5e and v5p want, in less than the 16 MiB of VMEM that a kernel gets from v4 to v6e (1,024 rows are too many).
TILE_ROWS, TILE_SIDE = 512, 1024
LANES = 128


def _multiply_tiles(x_AD, kernels_EDF, sizes_E, *, transposed, interpret=False):
    x = _in_tiles(x_AD)
    inner, outer = kernels_EDF.shape[1:][:: -1 if transposed else 1]
    y = gmm(
        x,
        kernels_EDF,
        _with_rest(sizes_E, len(x)),
        preferred_element_type=x.dtype,
        tiling=_tiling(len(x), inner, outer, x.dtype),
        transpose_rhs=transposed,
        interpret=interpret,
    )
    return y[: len(x_AD)]


def _outer_tiles(dtype, x_AD, grad_AF, sizes_E, *, interpret=False):
    """(E, D, F): x^T grad over the rows of each group."""
    x, grad = _in_tiles(x_AD), _in_tiles(grad_AF)
    return tgmm(
        x.T,
        grad,
        _with_rest(sizes_E, len(x)),
        preferred_element_type=dtype,
        tiling=_tiling(len(x), x.shape[1], grad.shape[1], dtype),
        num_actual_groups=len(sizes_E),
        interpret=interpret,
    )


def tile_rows(rows: int) -> int:
    """Rows of a tile of so many."""
    return min(TILE_ROWS, whole_blocks(rows, LANES))


def tile_side(size: int, itemsize: int) -> int:
    """A kernel's side in tiles: whole, or pieces that take as much room in any dtype. itemsize: bytes of a number."""
    return min(size, TILE_SIDE * 2 // itemsize)


def _tiling(rows: int, inner: int, outer: int, dtype: Any) -> tuple[int, int, int]:
    itemsize = jnp.dtype(dtype).itemsize
    return tile_rows(rows), tile_side(inner, itemsize), tile_side(outer, itemsize)


def _in_tiles(x_AD: jax.Array) -> jax.Array:
    """Rows of zeros behind, up to whole tiles."""
    padding = whole_blocks(len(x_AD), tile_rows(len(x_AD))) - len(x_AD)
    return jnp.pad(x_AD, ((0, padding), (0, 0)))


def _with_rest(sizes_E: jax.Array, rows: int) -> jax.Array:
    """The sizes, and behind them how many rows have no group: the kernels want all rows in one, and leave out the last."""
    return jnp.append(sizes_E, rows - sizes_E.sum(dtype=jnp.int32))


# --- everywhere else --------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Where rows stand in blocks. S = blocks x rows of one.

    source_S: the row that stands there; A if there is none. place_A: where the row stands; S if nowhere.
    group_n: the group of each block.
    """

    source_S: jax.Array
    place_A: jax.Array
    group_n: jax.Array


def block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: half of what a group has in the mean, so that at most half as many again are multiplied."""
    return max(1, num_rows // (2 * num_groups))


def make_blocks(sizes_E: jax.Array, num_rows: int) -> Blocks:
    """The blocks of A rows whose groups have these sizes; each group begins with a new block."""
    groups = len(sizes_E)
    rows = block_rows(num_rows, groups)
    blocks = min((num_rows + groups * (rows - 1)) // rows, num_rows)
    first_E = jnp.cumsum(sizes_E) - sizes_E  # row of each group
    used_E = -(-sizes_E // rows)
    last_E = jnp.cumsum(used_E)  # block after each group
    start_E = (last_E - used_E) * rows  # place of each group

    group_n = _find(last_E, jnp.arange(blocks))
    group_S = jnp.repeat(group_n, rows, total_repeat_length=blocks * rows)
    rank_S = jnp.arange(blocks * rows) - start_E[group_S]
    held_S = (rank_S < sizes_E[group_S]) & (jnp.arange(blocks * rows) < last_E[-1] * rows)
    source_S = jnp.where(held_S, first_E[group_S] + rank_S, num_rows)

    row_A = jnp.arange(num_rows)
    group_A = _find(first_E + sizes_E, row_A)
    place_A = jnp.where(
        row_A < sizes_E.sum(), start_E[group_A] + row_A - first_E[group_A], blocks * rows
    )
    return Blocks(source_S, place_A, group_n)


def _find(ends_E: jax.Array, x: jax.Array) -> jax.Array:
    """The first group whose end lies behind each x; the last one if none does."""
    return jnp.minimum((x[:, None] >= ends_E[None, :]).sum(1), len(ends_E) - 1)


def _take(x_AD: jax.Array, index_N: jax.Array) -> jax.Array:
    """Rows of x; zeros for an index beyond them."""
    return jnp.take(x_AD, index_N, axis=0, mode="fill", fill_value=0)


def _multiply_blocks(x_AD, kernels_EDF, sizes_E, *, transposed):
    blocks = make_blocks(sizes_E, len(x_AD))
    x_nbD = _take(x_AD, blocks.source_S).reshape(len(blocks.group_n), -1, x_AD.shape[1])
    spec = "nbD,nFD->nbF" if transposed else "nbD,nDF->nbF"
    y_nbF = _to_float32(spec, x_nbD, kernels_EDF[blocks.group_n])
    return _take(y_nbF.reshape(-1, y_nbF.shape[-1]), blocks.place_A).astype(x_AD.dtype)


def _outer_blocks(dtype, x_AD, grad_AF, sizes_E):
    blocks = make_blocks(sizes_E, len(x_AD))
    split = lambda x: _take(x, blocks.source_S).reshape(len(blocks.group_n), -1, x.shape[1])
    outer_nDF = _to_float32("nbD,nbF->nDF", split(x_AD), split(grad_AF))
    sums_EDF = jax.ops.segment_sum(outer_nDF, blocks.group_n, len(sizes_E), indices_are_sorted=True)
    return sums_EDF.astype(dtype)


def _to_float32(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
