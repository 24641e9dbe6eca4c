"""Row and column sums of every matrix of exponentials, one exponential per entry, in one persistent launch.

    R_i = Σ_j 2^(x_ij − shift)      C_j = Σ_i 2^(x_ij − shift)      diagonal left out

Matrices of one launch have one shape [n, N]; a symmetric one (centroids, last) is walked above the diagonal only and
each entry counts for its row and for its column. A matrix with ids or limits has a launch of its own; entries of equal
ids, or beyond the limit of a row or column, do not count. The constant reference exponent

    shift = max(0, max x − (126 − ⌈log2 max(n, N)⌉))

excludes overflow; sums it pushed out of range below are found and redone by ``.log_sums``.

    programs      p0   p1   p2 …  (as many as the device holds at a time)
    tile numbers  0    1    2  …  | pair 0 | pair 1 | … | triangle |      program p takes p, p + programs, …
    one tile      K loop: acc += rows_tile · cols_tileᵀ   →  x, 2^x  →  atomic add of TILE_M row and TILE_N column sums

Per pair: 2·n·N·D operations, n·N exponentials, operand traffic from L2 n·N·D·b·(1/TILE_M + 1/TILE_N) bytes, from
device memory about the operands once per group of tiles; n·N·(1/TILE_M + 1/TILE_N) atomic additions.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gapkernels.backends.contract import Matrix
from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.device import cdiv, input_precision, num_processors
from gapkernels.backends.triton.launch import launch
from gapkernels.backends.triton.tiles import (
    exponents,
    grouped_tile,
    inner_products,
    load_scale,
    num_triangle_tiles,
    store_tile,
    triangle_tile,
    within_limits,
    without_diagonal,
    without_equal_ids,
)


@triton.jit
def constant_shift(scale, largest, matrix: tl.constexpr, headroom, BIASED: tl.constexpr, UNIT: tl.constexpr):
    """The smallest reference exponent with which no sum can overflow."""
    if BIASED:
        bound = 0.0  # distances are not negative
    elif UNIT:
        bound = scale
    else:
        bound = scale * tl.load(largest + matrix)
    return tl.maximum(bound - headroom, 0.0)


@triton.jit(
    do_not_specialize=["num_rows", "num_cols", "diagonal"],
    do_not_specialize_on_alignment=["row_sums", "col_sums", "row_ids", "col_ids", "row_limits", "col_limits"],
)
def tile_sums_kernel(
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
    kept,
    kept_strides,
    num_rows,
    num_cols,
    dim,
    diagonal,
    headroom,
    BIASED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    UNIT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_row_tiles, num_col_tiles = tl.cdiv(num_rows, TILE_M), tl.cdiv(num_cols, TILE_N)
    first_tile = 0
    for m in tl.static_range(len(BIASED)):
        scale = load_scale(scales[m])
        shift = constant_shift(scale, largest, m, headroom, BIASED[m], UNIT)
        if SYMMETRIC[m]:
            num_tiles = num_triangle_tiles(num_rows, TILE_M, TILE_N, GROUP)
        else:
            num_tiles = num_row_tiles * num_col_tiles
        # The first of this program's tile numbers that belongs to this matrix: tiles are dealt out over all matrices.
        mine = (program + programs - first_tile % programs) % programs
        for t in tl.range(mine, num_tiles, programs):
            if SYMMETRIC[m]:
                row_tile, col_tile = triangle_tile(t, num_rows, TILE_M, TILE_N, GROUP)
            else:
                row_tile, col_tile = grouped_tile(t, num_row_tiles, num_col_tiles, GROUP)
            row_start, col_start = row_tile * TILE_M, col_tile * TILE_N
            exists = row_start < num_rows
            if SYMMETRIC[m]:
                exists = exists & (col_start + TILE_N - 1 > row_start)
            if exists:
                acc = inner_products(
                    rows[m], row_strides[m], row_start, num_rows, cols[m], col_strides[m], col_start, num_cols, dim,
                    TILE_M, TILE_N, TILE_K, EVEN_K, PRECISION, False,
                )  # fmt: skip
                i, j = row_start + tl.arange(0, TILE_M), col_start + tl.arange(0, TILE_N)
                row_factor = tl.load(row_factors[m] + i, mask=i < num_rows, other=0.0)
                col_factor = tl.load(col_factors[m] + j, mask=j < num_cols, other=0.0)
                x = exponents(acc, row_factor, col_factor, BIASED[m], scale) - shift
                x = without_diagonal(
                    x, row_start, num_rows, col_start, num_cols, diagonal, SYMMETRIC[m], TILE_M, TILE_N
                )
                x = without_equal_ids(x, row_ids, i, num_rows, col_ids, j, num_cols)
                entries = tl.exp2(x)
                if kept[m] is not None:
                    place = kept[m] + tl.cast(row_start, tl.int64) * kept_strides[m] + col_start
                    store_tile(entries, place, kept_strides[m])
                of_rows = within_limits(entries, x, row_limits, i, num_rows, shift, True, 0.0)
                of_cols = within_limits(entries, x, col_limits, j, num_cols, shift, False, 0.0)
                row_base = row_sums + m * num_rows.to(tl.int64)
                col_base = col_sums + m * num_cols.to(tl.int64)
                if SYMMETRIC[m]:
                    col_base = row_base
                tl.atomic_add(row_base + i, tl.sum(of_rows, axis=1), mask=i < num_rows, sem="relaxed")
                tl.atomic_add(col_base + j, tl.sum(of_cols, axis=0), mask=j < num_cols, sem="relaxed")
        first_tile += num_tiles


def tile_sums(
    matrices: list[Matrix],
    largest: torch.Tensor | None,
    headroom: int,
    zeros: torch.Tensor | None = None,
    kept: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums relative to the constant reference exponent.

    Args:
        matrices: of one shape ``[n, N]``, with one diagonal; one that has ids or limits is alone.
        largest: ``[len(matrices)]`` float32, the largest product of a row norm and a column norm where vectors are
            taken as they are; None for unit vectors.
        headroom: largest exponent an entry may have.
        zeros: ``[m·(n + N)]`` float32 zeros that the sums may take; None to make them.
        kept: per matrix ``[n, N]`` of any floating type for its entries, relative to the same exponent, with room for
            whole tiles; None for those that are not to be kept.

    Returns:
        ``([m, n], [m, N])`` float32; a symmetric matrix has all of its sums in the first.
    """
    first = matrices[0]
    num_rows, dim = first.rows.shape
    num_cols = first.cols.shape[0]
    sums, row_sums, col_sums = room_for_sums(matrices, zeros)
    places = (None,) * len(matrices) if kept is None else tuple(kept)

    def run(config: tuning.Config) -> None:
        if first.row_limit is not None or first.col_limit is not None:
            config = narrower(config)
        if any(place is not None and place.dtype == torch.float32 for place in places):
            config = config._replace(tile_n=min(config.tile_n, 128))  # two of each entry in the registers
        tiles = len(matrices) * cdiv(num_rows, config.tile_m) * cdiv(num_cols, config.tile_n)
        grid = (min(tiles, num_processors(sums.device) * config.programs_per_processor),)
        launch(
            tile_sums_kernel,
            grid,
            (
                matrix_kind(matrices, largest),
                tuple(place is not None and (place.dtype, place.stride(0) % 16) for place in places),
                config,
                input_precision(first.rows.dtype),
            ),
            (
                *matrix_arguments(matrices),
                largest,
                *mask_arguments(matrices),
                row_sums,
                col_sums,
                places,
                tuple(0 if place is None else place.stride(0) for place in places),
                num_rows,
                num_cols,
                dim,
                first.diagonal,
                float(headroom),
            ),
            lambda: {
                "BIASED": tuple(m.biased for m in matrices),
                "SYMMETRIC": tuple(m.symmetric for m in matrices),
                "UNIT": largest is None,
                "TILE_M": config.tile_m,
                "TILE_N": config.tile_n,
                "TILE_K": config.tile_k,
                "GROUP": config.group,
                "EVEN_K": dim % config.tile_k == 0,
                "PRECISION": input_precision(first.rows.dtype),
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
            },
        )

    run(tuning.choose("tile_sums", first.rows, run, reset=sums))
    return row_sums, col_sums


def room_for_sums(
    matrices: list[Matrix], zeros: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zeros, ``[m·(n + N)]`` and its parts ``[m, n]`` and ``[m, N]``."""
    (num_rows, _), num_cols = matrices[0].rows.shape, matrices[0].cols.shape[0]
    size = len(matrices) * (num_rows + num_cols)
    if zeros is None:
        zeros = torch.zeros(size, dtype=torch.float32, device=matrices[0].rows.device)
    assert zeros.numel() == size
    rows, cols = zeros.split([len(matrices) * num_rows, len(matrices) * num_cols])
    return zeros, rows.view(-1, num_rows), cols.view(-1, num_cols)


def matrix_arguments(matrices: list[Matrix]) -> tuple[tuple[object, ...], ...]:
    """Matrices as kernels take them: rows, their strides and factors, columns likewise, scales."""
    return (
        tuple(m.rows for m in matrices),
        tuple(m.rows.stride(0) for m in matrices),
        tuple(m.row_factor for m in matrices),
        tuple(m.cols for m in matrices),
        tuple(m.cols.stride(0) for m in matrices),
        tuple(m.col_factor for m in matrices),
        tuple(m.scale for m in matrices),
    )


def mask_arguments(matrices: list[Matrix]) -> tuple[torch.Tensor | None, ...]:
    """Ids of rows and columns and their limits, of a matrix that is alone in a launch; None for what it lacks."""
    first = matrices[0]
    assert len(matrices) == 1 or not any(m.masked for m in matrices), "a matrix with ids or limits is summed alone"
    return first.row_ids, first.col_ids, first.row_limit, first.col_limit


def narrower(config: tuning.Config) -> tuning.Config:
    """With tiles no wider than one more vector per row and column leaves registers for."""
    return config._replace(tile_n=min(config.tile_n, 64))


def mask_kind(m: Matrix) -> object:
    """What tells launches on a matrix with ids or limits from others."""
    return m.masked and (m.row_ids is None, m.row_limit is None, m.col_limit is None)


def matrix_kind(matrices: list[Matrix], largest: torch.Tensor | None) -> tuple[object, ...]:
    """What tells launches on matrices apart, see ``.launch``."""
    return (
        largest is None,
        matrices[0].rows.shape[1],
        mask_kind(matrices[0]),
        *(
            (m.rows.dtype, m.biased, m.symmetric, m.scale.dtype, m.scale.data_ptr() % 16 == 0, _alignment(m))
            for m in matrices
        ),
    )


def _alignment(m: Matrix) -> tuple[bool, ...]:
    """Blocks of operands and of their factors may begin anywhere; operands are aligned, being padded."""
    assert m.row_factor is not None
    assert m.col_factor is not None
    return m.row_factor.data_ptr() % 16 == 0, m.col_factor.data_ptr() % 16 == 0
