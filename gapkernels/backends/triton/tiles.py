"""What the matrix kernels share: the order of tiles, and one tile of exponents.

A matrix of exponentials has entries e_ij = 2^x_ij, with the exponent made from raw inner products on the tensor cores
and an fp32 factor or bias per row and column (no rounded copy of the operands is ever needed):

    pair of modalities   x_ij = s·log2 e · ⟨z_i, y_j⟩ · (1/‖z_i‖) · (1/‖y_j‖)          BIASED = False
    centroids            x_ij = 2t·log2 e · ⟨c_i, c_j⟩ + b_i + b_j,  b = −t·log2 e·‖c‖²   BIASED = True

Tiles are walked in groups of GROUP row tiles, column by column, so that the programs running at one time share operands
in the L2 cache. Only tiles that meet the diagonal or the ragged edge pay for a mask. Ids and limits, which mask entries
anywhere, are pointers that may be None: a kernel without them is compiled without them.

    all of a matrix             triangle, folded so that row group g and the g-th from below make a full width
    group 0  1 3 5 7            g = 0   1 3 5 7           fold 0 = group 0 then group G−1
             2 4 6 8                    . 4 6 8           fold 1 = group 1 then group G−2 …
    group 1  9 …                g = 1       9 11
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_scale(pointer):
    """log2 e times the scale stored there (any floating type), float32."""
    return (tl.load(pointer).to(tl.float64) * LOG2_E).to(tl.float32)


@triton.jit
def grouped_tile(t, num_row_tiles, num_col_tiles, GROUP: tl.constexpr):
    """``(row tile, column tile)`` number t of a whole matrix."""
    per_group = GROUP * num_col_tiles
    first = t // per_group * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    inside = t % per_group
    return first + inside % height, inside // height


@triton.jit
def num_triangle_tiles(num_rows, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr):
    """How many tile numbers ``triangle_tile`` takes; a few near the diagonal and at the end stand for no tile."""
    groups = tl.cdiv(num_rows, TILE_M * GROUP)
    cols_per_group: tl.constexpr = GROUP * TILE_M // TILE_N
    return GROUP * (tl.cdiv(num_rows, TILE_N) * groups - cols_per_group * (groups * (groups - 1) // 2))


@triton.jit
def triangle_tile(t, num_rows, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr):
    """``(row tile, column tile)`` number t of the part of a square matrix above the diagonal."""
    groups = tl.cdiv(num_rows, TILE_M * GROUP)
    num_col_tiles = tl.cdiv(num_rows, TILE_N)
    cols_per_group: tl.constexpr = GROUP * TILE_M // TILE_N
    per_fold = GROUP * (2 * num_col_tiles - cols_per_group * (groups - 1))
    fold = t // per_fold
    inside = t % per_fold
    in_first = GROUP * (num_col_tiles - cols_per_group * fold)
    in_second = inside >= in_first
    group = tl.where(in_second, groups - 1 - fold, fold)
    inside = tl.where(in_second, inside - in_first, inside)
    return group * GROUP + inside % GROUP, cols_per_group * group + inside // GROUP


@triton.jit
def inner_products(
    rows,
    row_stride,
    row_start,
    num_rows,
    cols,
    col_stride,
    col_start,
    num_cols,
    dim,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """⟨rows_i, cols_j⟩ of one tile, ``[TILE_M, TILE_N]`` float32. Rows past the end repeat the last (or are zero).

    ``rows`` and ``cols`` are pointers, or descriptors for the copy engine if USE_TMA.
    """
    acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    if USE_TMA:
        for k in range(0, dim, TILE_K):
            x = rows.load([row_start, k])
            y = cols.load([col_start, k])
            acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    else:
        i = tl.minimum(tl.arange(0, TILE_M), num_rows - 1 - row_start)
        j = tl.minimum(tl.arange(0, TILE_N), num_cols - 1 - col_start)
        k_offsets = tl.arange(0, TILE_K)
        # The start of the tile in 64 bits, positions inside it in 32: large batches cost no registers.
        x_pointers = rows + tl.cast(row_start, tl.int64) * row_stride + (i[:, None] * row_stride + k_offsets[None, :])
        y_pointers = cols + tl.cast(col_start, tl.int64) * col_stride + (j[None, :] * col_stride + k_offsets[:, None])
        for k in range(0, dim, TILE_K):
            if EVEN_K:
                x = tl.load(x_pointers)
                y = tl.load(y_pointers)
            else:
                x = tl.load(x_pointers, mask=k_offsets[None, :] < dim - k, other=0.0)
                y = tl.load(y_pointers, mask=k_offsets[:, None] < dim - k, other=0.0)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
            x_pointers += TILE_K
            y_pointers += TILE_K
    return acc


@triton.jit
def store_tile(values, out, out_stride):
    """Store a whole tile at ``out``, which has room for what lies past the edges."""
    i, j = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    tl.store(out + (i[:, None] * out_stride + j[None, :]), values.to(out.dtype.element_ty))


@triton.jit
def exponents(acc, row_factor, col_factor, BIASED: tl.constexpr, scale):
    """x_ij from the inner products; the factors are inverse norms, or biases if BIASED."""
    if BIASED:
        return acc * scale + (row_factor[:, None] + col_factor[None, :])
    else:
        return acc * (row_factor * scale)[:, None] * col_factor[None, :]


@triton.jit
def without_diagonal(
    x, row_start, num_rows, col_start, num_cols, diagonal, TRIANGLE: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    """Put −∞ where there is no entry to count: the diagonal, what lies past the edges, below the diagonal if TRIANGLE.

    The diagonal runs through the entries with column = row + ``diagonal``.
    """
    first_diagonal = row_start + diagonal
    if TRIANGLE:
        meets_diagonal = col_start <= first_diagonal + TILE_M - 1
    else:
        meets_diagonal = (col_start <= first_diagonal + TILE_M - 1) & (first_diagonal <= col_start + TILE_N - 1)
    ragged = (row_start + TILE_M > num_rows) | (col_start + TILE_N > num_cols)
    if meets_diagonal | ragged:
        i = row_start + tl.arange(0, TILE_M)[:, None]
        j = col_start + tl.arange(0, TILE_N)[None, :]
        off_diagonal = j > i + diagonal if TRIANGLE else j != i + diagonal
        x = tl.where(off_diagonal & (i < num_rows) & (j < num_cols), x, float("-inf"))
    return x


@triton.jit
def without_equal_ids(x, row_ids, i, num_rows, col_ids, j, num_cols):
    """Put −∞ where row and column have one id; without ids, as they are."""
    if row_ids is None:
        return x
    else:
        row_id = tl.load(row_ids + i, mask=i < num_rows, other=0)
        col_id = tl.load(col_ids + j, mask=j < num_cols, other=0)
        return tl.where(row_id[:, None] == col_id[None, :], float("-inf"), x)


@triton.jit
def within_limits(values, x, limits, i, count, reference, OF_ROWS: tl.constexpr, otherwise: tl.constexpr):
    """``otherwise`` in place of values whose x exceeds the limit of its row, or of its column; without limits, values.

    Limits are absolute, x is relative to ``reference``. What is not a number counts, and shows.
    """
    if limits is None:
        return values
    else:
        limit = (tl.load(limits + i, mask=i < count, other=float("inf")) - reference).to(tl.float32)
        limit = limit[:, None] if OF_ROWS else limit[None, :]
        return tl.where(x > limit, otherwise, values)


@triton.jit
def softplus_and_sigmoid(y):
    """``(ln(1 + 2^y), 2^y / (1 + 2^y))``; y may be −∞.

    With z = 2^−|y| the first is max(y, 0)·ln 2 + ln(1 + z), and ln(1 + z) = 2·artanh(z / (2 + z)), of which w ≤ 1/3
    leaves less than float32 holds after seven terms: a small z keeps its digits, which 1 + z would lose.
    """
    z = tl.exp2(-tl.abs(y))
    w = z / (z + 2.0)
    square = w * w
    series = square / 13 + 1.0 / 11
    series = series * square + 1.0 / 9
    series = series * square + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    series = series * square + 1.0
    share = 1.0 / (1.0 + z)
    return tl.maximum(y, 0.0) * LN_2 + 2.0 * w * series, tl.where(y < 0.0, z * share, share)
