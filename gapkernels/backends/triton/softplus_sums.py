"""Sums along rows of ln(1 + 2^(x + bias)) and of its derivative, diagonal left out: what a sigmoid loss is made of.

No term exceeds its logit, so that no reference is needed. A program owns a block of rows and, where these are fewer
than the device holds programs, a part of the columns; it writes its sums to places of its own. No atomics: always the
same bits on one device.

    program (block of rows, part of the columns):
        for all tiles of its columns: acc = rows · colsᵀ  →  x  →  ln(1 + 2^(x + bias)), sigmoid  →  row sums, float64

2·n·N·D operations, n·N exponentials and twice as many divisions; 16 bytes per row and part.
"""

import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.contract import Matrix, SoftplusSums
from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.device import cdiv, input_precision, num_processors
from gapkernels.backends.triton.launch import launch
from gapkernels.backends.triton.tile_sums import mask_kind
from gapkernels.backends.triton.tiles import (
    exponents,
    inner_products,
    load_scale,
    softplus_and_sigmoid,
    without_diagonal,
    without_equal_ids,
)


@triton.jit(
    do_not_specialize=["num_rows", "num_cols", "diagonal", "tiles_per_part"],
    do_not_specialize_on_alignment=["row_factors", "col_factors", "scale_pointer", "row_ids", "col_ids", "bias"],
)
def softplus_sums_kernel(
    rows,
    row_stride,
    row_factors,
    cols,
    col_stride,
    col_factors,
    scale_pointer,
    row_ids,
    col_ids,
    bias,
    softplus_sums,
    sigmoid_sums,
    num_rows,
    num_cols,
    dim,
    diagonal,
    tiles_per_part,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale, offset = load_scale(scale_pointer), tl.load(bias).to(tl.float32)
    row_start, part = tl.program_id(0) * TILE_M, tl.program_id(1)
    i = row_start + tl.arange(0, TILE_M)
    row_factor = tl.load(row_factors + i, mask=i < num_rows, other=0.0)
    softplus_sum = tl.zeros((TILE_M,), tl.float64)
    sigmoid_sum = tl.zeros((TILE_M,), tl.float64)
    first = part * tiles_per_part * TILE_N
    for col_start in tl.range(first, tl.minimum(first + tiles_per_part * TILE_N, num_cols), TILE_N):
        acc = inner_products(
            rows, row_stride, row_start, num_rows, cols, col_stride, col_start, num_cols, dim, TILE_M, TILE_N, TILE_K,
            EVEN_K, PRECISION, False,
        )  # fmt: skip
        j = col_start + tl.arange(0, TILE_N)
        col_factor = tl.load(col_factors + j, mask=j < num_cols, other=0.0)
        x = exponents(acc, row_factor, col_factor, False, scale) + offset
        x = without_diagonal(x, row_start, num_rows, col_start, num_cols, diagonal, False, TILE_M, TILE_N)
        x = without_equal_ids(x, row_ids, i, num_rows, col_ids, j, num_cols)
        softplus, sigmoid = softplus_and_sigmoid(x)
        softplus_sum += tl.sum(softplus, axis=1).to(tl.float64)
        sigmoid_sum += tl.sum(sigmoid, axis=1).to(tl.float64)
    base = part * num_rows.to(tl.int64)
    tl.store(softplus_sums + base + i, softplus_sum, mask=i < num_rows)
    tl.store(sigmoid_sums + base + i, sigmoid_sum, mask=i < num_rows)


def softplus_sums(matrix: Matrix, bias: Tensor) -> SoftplusSums:
    """Row sums of one matrix of a pair; see ``gapkernels.backends.contract.Backend.softplus_sums``.

    Args:
        matrix: ``[n, N]`` with N ≥ 1, without limits.
        bias: 0-dim, to base 2.

    Returns:
        ``[n]`` float64, each.
    """
    assert matrix.row_factor is not None
    assert matrix.col_factor is not None
    rows, cols = matrix.rows, matrix.cols
    (num_rows, dim), num_cols = rows.shape, cols.shape[0]
    # Not timed: as in ``.log_sums`` there is one configuration, of one block of rows against all columns.
    config = tuning.choose("log_sums", rows, lambda config: None)
    blocks, tiles = cdiv(num_rows, config.tile_m), cdiv(num_cols, config.tile_n)
    parts = min(tiles, cdiv(num_processors(rows.device) * config.programs_per_processor, blocks))
    tiles_per_part = cdiv(tiles, parts)
    parts = cdiv(tiles, tiles_per_part)
    sums = rows.new_empty((2, parts, num_rows), dtype=bias.dtype)
    launch(
        softplus_sums_kernel,
        (blocks, parts),
        (rows.dtype, matrix.scale.dtype, bias.dtype, dim, mask_kind(matrix), config, input_precision(rows.dtype)),
        (
            rows,
            rows.stride(0),
            matrix.row_factor,
            cols,
            cols.stride(0),
            matrix.col_factor,
            matrix.scale,
            matrix.row_ids,
            matrix.col_ids,
            bias,
            sums[0],
            sums[1],
            num_rows,
            num_cols,
            dim,
            matrix.diagonal,
            tiles_per_part,
        ),
        lambda: {
            "TILE_M": config.tile_m,
            "TILE_N": config.tile_n,
            "TILE_K": config.tile_k,
            "EVEN_K": dim % config.tile_k == 0,
            "PRECISION": input_precision(rows.dtype),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
    return SoftplusSums(*sums.sum(dim=1))
