"""Logarithms of row and column sums; sums that left the range of float32 are computed anew with a running maximum.

    L_i = log2 Σ_j 2^x_ij = log2 R_i + shift                         if R_i ≥ (number of terms)·2^−102
                          = m_i + log2 Σ_j 2^(x_ij − m_i), m_i = max_j x_ij   otherwise, or always if RECOMPUTE

A program owns a block of rows (or of columns: the roles of the operands change places) and decides for it on the
device; where nothing is out of range it reads the sums and writes their logarithms, and that is all. No atomics: with
RECOMPUTE the results do not depend on the order of execution, which is what deterministic mode uses.

    for each side (rows of matrix 0, its columns, rows of matrix 1, …):
        for my blocks of TILE_M own rows:
            any sum too small?  ──no──►  log2
                 └─yes─► for all tiles of the other operand: acc = own · otherᵀ, running maximum and sum

Normal case: 12 bytes per sum. Recomputed: 2·n·N·D operations per side.
"""

import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.contract import Matrix
from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.device import cdiv, input_precision, num_processors
from gapkernels.backends.triton.launch import launch
from gapkernels.backends.triton.tile_sums import constant_shift, mask_arguments, matrix_arguments, matrix_kind
from gapkernels.backends.triton.tiles import (
    exponents,
    inner_products,
    load_scale,
    within_limits,
    without_diagonal,
    without_equal_ids,
)

SMALLEST_EXACT_SUM = 2.0**-102
"""Per term: a sum of terms this large on average loses less than its rounding to those that underflow."""


@triton.jit(
    do_not_specialize=["num_rows", "num_cols", "diagonal"],
    do_not_specialize_on_alignment=[
        "row_sums", "col_sums", "row_log_sums", "col_log_sums", "row_ids", "col_ids", "row_limits", "col_limits",
    ],
)  # fmt: skip
def log_sums_kernel(
    rows,
    row_strides,
    row_factors,
    cols,
    col_strides,
    col_factors,
    scales,
    largest,
    row_ids,
    col_ids,
    row_limits,
    col_limits,
    row_sums,
    col_sums,
    row_log_sums,
    col_log_sums,
    num_rows,
    num_cols,
    dim,
    diagonal,
    headroom,
    smallest_exact,
    BIASED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    UNIT: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    first_block = 0
    for m in tl.static_range(len(BIASED)):
        scale = load_scale(scales[m])
        shift = constant_shift(scale, largest, m, headroom, BIASED[m], UNIT)
        blocks = tl.cdiv(num_rows, TILE_M)
        mine = (program + programs - first_block % programs) % programs
        for block in tl.range(mine, blocks, programs):
            one_block(
                block * TILE_M, row_sums, row_log_sums, m * num_rows.to(tl.int64), shift, smallest_exact,
                rows[m], row_strides[m], row_factors[m], row_ids, row_limits, num_rows, cols[m], col_strides[m],
                col_factors[m], col_ids, num_cols, dim, diagonal, scale, BIASED[m], RECOMPUTE, TILE_M, TILE_N, TILE_K,
                EVEN_K, PRECISION,
            )  # fmt: skip
        first_block += blocks
        if not SYMMETRIC[m]:
            blocks = tl.cdiv(num_cols, TILE_M)
            mine = (program + programs - first_block % programs) % programs
            for block in tl.range(mine, blocks, programs):
                one_block(
                    block * TILE_M, col_sums, col_log_sums, m * num_cols.to(tl.int64), shift, smallest_exact,
                    cols[m], col_strides[m], col_factors[m], col_ids, col_limits, num_cols, rows[m], row_strides[m],
                    row_factors[m], row_ids, num_rows, dim, -diagonal, scale, BIASED[m], RECOMPUTE, TILE_M, TILE_N,
                    TILE_K, EVEN_K, PRECISION,
                )  # fmt: skip
            first_block += blocks


@triton.jit
def one_block(
    start,
    sums,
    log_sums,
    base,
    shift,
    smallest_exact,
    own,
    own_stride,
    own_factors,
    own_ids,
    own_limits,
    num_own,
    other,
    other_stride,
    other_factors,
    other_ids,
    num_other,
    dim,
    diagonal,
    scale,
    BIASED: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the logarithms of the sums of one block of own rows."""
    i = start + tl.arange(0, TILE_M)
    log_sums += base
    if RECOMPUTE:
        total = tl.full((TILE_M,), float("-inf"), tl.float32)  # below any bound
    else:
        total = tl.load(sums + base + i, mask=i < num_own, other=float("inf"))
    in_range = not (tl.min(total, axis=0) < smallest_exact)  # not a number compares false and passes through
    if in_range:
        tl.store(log_sums + i, tl.log2(total.to(tl.float64)) + shift, mask=i < num_own)
    else:
        own_factor = tl.load(own_factors + i, mask=i < num_own, other=0.0)
        maximum = tl.full((TILE_M,), float("-inf"), tl.float32)
        running = tl.zeros((TILE_M,), tl.float32)
        for other_start in tl.range(0, num_other, TILE_N):
            acc = inner_products(
                own, own_stride, start, num_own, other, other_stride, other_start, num_other, dim, TILE_M, TILE_N,
                TILE_K, EVEN_K, PRECISION, False,
            )  # fmt: skip
            j = other_start + tl.arange(0, TILE_N)
            other_factor = tl.load(other_factors + j, mask=j < num_other, other=0.0)
            x = exponents(acc, own_factor, other_factor, BIASED, scale)
            x = without_diagonal(x, start, num_own, other_start, num_other, diagonal, False, TILE_M, TILE_N)
            x = without_equal_ids(x, own_ids, i, num_own, other_ids, j, num_other)
            x = within_limits(x, x, own_limits, i, num_own, 0.0, True, float("-inf"))
            new = tl.maximum(maximum, tl.max(x, axis=1))
            # Nothing but −∞ so far (no entry that counts): any finite reference gives the sum zero that is right.
            reference = tl.where(new == float("-inf"), 0.0, new)
            running = running * tl.exp2(maximum - reference) + tl.sum(tl.exp2(x - reference[:, None]), axis=1)
            maximum = new
        reference = tl.where(maximum == float("-inf"), 0.0, maximum)
        tl.store(log_sums + i, tl.log2(running.to(tl.float64)) + reference, mask=i < num_own)


def log_sums(
    matrices: list[Matrix],
    sums: tuple[Tensor, Tensor] | None,
    largest: Tensor | None,
    headroom: int,
    logs: tuple[Tensor, Tensor],
) -> None:
    """Base-2 logarithms of all row and column sums, diagonal left out.

    Args:
        matrices: of one shape ``[n, N]``, with one diagonal; one that has ids or limits is alone.
        sums: from ``.tile_sums.tile_sums``; None to compute all of them here, without atomics.
        largest, headroom: as there.
        logs: ``([m, n], [m, N])`` float64, written; the row of a symmetric matrix in the second is not.
    """
    first = matrices[0]
    num_rows, dim = first.rows.shape
    num_cols = first.cols.shape[0]

    def run(config: tuning.Config) -> None:
        blocks = len(matrices) * (cdiv(num_rows, config.tile_m) + cdiv(num_cols, config.tile_m))
        grid = (min(blocks, num_processors(first.rows.device) * config.programs_per_processor),)
        launch(
            log_sums_kernel,
            grid,
            (matrix_kind(matrices, largest), sums is None, config, input_precision(first.rows.dtype)),
            (
                *matrix_arguments(matrices),
                largest,
                *mask_arguments(matrices),
                None if sums is None else sums[0],
                None if sums is None else sums[1],
                *logs,
                num_rows,
                num_cols,
                dim,
                first.diagonal,
                float(headroom),
                max(num_rows, num_cols) * SMALLEST_EXACT_SUM,
            ),
            lambda: {
                "BIASED": tuple(m.biased for m in matrices),
                "SYMMETRIC": tuple(m.symmetric for m in matrices),
                "UNIT": largest is None,
                "RECOMPUTE": sums is None,
                "TILE_M": config.tile_m,
                "TILE_N": config.tile_n,
                "TILE_K": config.tile_k,
                "EVEN_K": dim % config.tile_k == 0,
                "PRECISION": input_precision(first.rows.dtype),
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
            },
        )

    run(tuning.choose("log_sums", first.rows, run))
