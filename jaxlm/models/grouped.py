"""A matrix product for each group of rows: what experts do to the tokens that chose them, of which none are dropped.

    rows     a a a b c c c c .      sizes 3 1 4: rows of group 0, 1, 2 in this order, then rows of no group
    kernels  A     B C              result  aA aA aA bB cC cC cC cC 0

`jax.lax.ragged_dot` says this, and TPUs have a kernel for it; elsewhere XLA multiplies all rows by all kernels and masks,
which is E times the work. There rows are laid out in blocks of one group each, and every block meets its own kernel:

    blocks   a a | a . | b . | c c | c c            of 2 rows; at most (A + E (b - 1)) / b of them for A rows

Which of the two it is follows from the platform that is compiled for, here or elsewhere.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.custom_vjp
def grouped_matmul(x_AD: jax.Array, kernels_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """(A, F): the rows of group e times kernels_EDF[e]; 0 for rows after the last group.

    sizes_E: int32, of sum at most A. Products accumulate in float32; the result has the dtype of x. Differentiable by x
    and the kernels, in reverse mode.
    """
    return jax.lax.platform_dependent(
        x_AD, kernels_EDF, sizes_E, tpu=_multiply_ragged, default=_multiply_blocks
    )


def _forward(x_AD, kernels_EDF, sizes_E):
    return grouped_matmul(x_AD, kernels_EDF, sizes_E), (x_AD, kernels_EDF, sizes_E)


def _backward(residuals, grad_AF):
    x_AD, kernels_EDF, sizes_E = residuals
    x_grad_AD = grouped_matmul(grad_AF, kernels_EDF.swapaxes(1, 2), sizes_E)
    kernels_grad_EDF = jax.lax.platform_dependent(
        x_AD,
        grad_AF,
        sizes_E,
        tpu=functools.partial(_outer_ragged, kernels_EDF.dtype),
        default=functools.partial(_outer_blocks, kernels_EDF.dtype),
    )
    return x_grad_AD, kernels_grad_EDF, None


grouped_matmul.defvjp(_forward, _backward)


# --- TPU --------------------------------------------------------------------------------------------------------------


def _multiply_ragged(x_AD, kernels_EDF, sizes_E):
    return jax.lax.ragged_dot(
        x_AD, kernels_EDF, sizes_E, preferred_element_type=jnp.float32
    ).astype(x_AD.dtype)


def _outer_ragged(dtype, x_AD, grad_AF, sizes_E):
    """(E, D, F): x^T grad over the rows of each group."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        x_AD, grad_AF, sizes_E, numbers, preferred_element_type=jnp.float32
    ).astype(dtype)


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


def _multiply_blocks(x_AD, kernels_EDF, sizes_E):
    blocks = make_blocks(sizes_E, len(x_AD))
    x_nbD = _take(x_AD, blocks.source_S).reshape(len(blocks.group_n), -1, x_AD.shape[1])
    y_nbF = _to_float32("nbD,nDF->nbF", x_nbD, kernels_EDF[blocks.group_n])
    return _take(y_nbF.reshape(-1, y_nbF.shape[-1]), blocks.place_A).astype(x_AD.dtype)


def _outer_blocks(dtype, x_AD, grad_AF, sizes_E):
    blocks = make_blocks(sizes_E, len(x_AD))
    split = lambda x: _take(x, blocks.source_S).reshape(len(blocks.group_n), -1, x.shape[1])
    outer_nDF = _to_float32("nbD,nbF->nDF", split(x_AD), split(grad_AF))
    sums_EDF = jax.ops.segment_sum(outer_nDF, blocks.group_n, len(sizes_E), indices_are_sorted=True)
    return sums_EDF.astype(dtype)


def _to_float32(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
