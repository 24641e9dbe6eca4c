"""A block of the gradient with respect to the inner products, as an operand for library matrix products.

    pairs       H_ij = 2^h·(2^(x_ij − L_i) + 2^(x_ij − L_j)) / (‖z_i‖·‖y_j‖)    L: log2 of row and column sums
                each of the two times a weight of its row or column, where there are some; none beyond a limit
    sigmoid     H_ij = weight_i / (1 + 2^−(x_ij + bias)) / (‖z_i‖·‖y_j‖)
    centroids   H_ij = 2^x_ij

with exponents relative to a reference, so that logarithms are small numbers in float32, and without the diagonal, which
is added later in float32. The inverse norms make H multiply the embeddings as they are,
and the constant weight of all entries is left to the end. 2^h keeps float16 from underflowing.

One exponential per entry: with a reference of the tile's own, halfway between its largest and smallest log sum,

    2^(x − L_i) + 2^(x − L_j) = 2^(x − ref)·(2^(ref − L_i) + 2^(ref − L_j))

is exact as long as the sums of the tile lie within a factor of 2^100 of each other (an entry lost then is below 2^−76);
otherwise the tile takes two.

    program → one tile:  K loop  acc += rows_tile · cols_tileᵀ  →  x → H → store (in a block that stays in the L2 cache)
                         optionally Σ x_ij·G_ij of the tile, for the gradient of the logit scale

Per block R×C: 2·R·C·D operations, R·C exponentials, R·C·b bytes written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.contract import Matrix
from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.device import architecture, cdiv, input_precision
from gapkernels.backends.triton.launch import descriptor, launch
from gapkernels.backends.triton.recording import Launch
from gapkernels.backends.triton.tile_sums import constant_shift, mask_arguments, mask_kind, narrower
from gapkernels.backends.triton.tiles import (
    exponents,
    grouped_tile,
    inner_products,
    load_scale,
    softplus_and_sigmoid,
    store_tile,
    within_limits,
    without_diagonal,
    without_equal_ids,
)

LOWEST = tl.constexpr(-1e30)  # stands for −∞ where it is multiplied by zero
HALF_SCALE = 2.0**14
"""Float16 gradients are scaled such that a soft-max weight of one becomes this; twice it is still in range."""


class Moment:
    """Σ_ij H_ij·(x_ij − reference), each tile of a block adding to a place of its own.

    Args:
        partials: ``[places]`` float64; may hold anything.

    Attributes:
        used: how many places the first block has written: as many as any block has tiles.
    """

    def __init__(self, partials: Tensor) -> None:
        self.partials = partials
        self.used = 0


def gradient_scale(dtype: torch.dtype) -> float:
    """2^h, what H of pairs is multiplied by where operands are of this type, so that float16 does not underflow."""
    return HALF_SCALE if dtype == torch.float16 else 1.0


@triton.jit
def log_sum_range(row_log, col_log, i_exists, j_exists):
    """Smallest and largest log sum of a tile."""
    smallest = tl.minimum(
        tl.min(tl.where(i_exists, row_log, float("inf")), axis=0),
        tl.min(tl.where(j_exists, col_log, float("inf")), axis=0),
    )
    largest = tl.maximum(
        tl.max(tl.where(i_exists, row_log, float("-inf")), axis=0),
        tl.max(tl.where(j_exists, col_log, float("-inf")), axis=0),
    )
    return smallest, largest


@triton.jit
def load_weights(weights, i, count):
    """Weights of rows or columns in float32, zero past the end."""
    return tl.load(weights + i, mask=i < count, other=0.0).to(tl.float32)


@triton.jit
def store_pair(
    x,
    row_log,
    col_log,
    middle,
    reference,
    row_weights,
    row_limits,
    i,
    num_rows,
    col_weights,
    col_limits,
    j,
    num_cols,
    row_factor,
    col_factor,
    out,
    out_stride,
    scale_partials,
    ONE_EXPONENTIAL: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    IS_FIRST: tl.constexpr,
):
    """From exponents to H: the whole epilogue, so that nothing outlives the branch it is called in."""
    if ONE_EXPONENTIAL:
        row_share, col_share = tl.exp2(middle - row_log), tl.exp2(middle - col_log)
        if row_weights is not None:
            row_share *= load_weights(row_weights, i, num_rows)
            col_share *= load_weights(col_weights, j, num_cols)
        entries = tl.exp2(x - middle)
        if row_limits is None and col_limits is None:
            gradient = entries * (row_share[:, None] + col_share[None, :])
        else:  # an entry beyond a limit may be infinite
            by_row, by_col = entries * row_share[:, None], entries * col_share[None, :]
            gradient = within_limits(by_row, x, row_limits, i, num_rows, reference, True, 0.0)
            gradient += within_limits(by_col, x, col_limits, j, num_cols, reference, False, 0.0)
    else:
        by_row, by_col = tl.exp2(x - row_log[:, None]), tl.exp2(x - col_log[None, :])
        if row_weights is not None:
            by_row *= load_weights(row_weights, i, num_rows)[:, None]
            by_col *= load_weights(col_weights, j, num_cols)[None, :]
        gradient = within_limits(by_row, x, row_limits, i, num_rows, reference, True, 0.0)
        gradient += within_limits(by_col, x, col_limits, j, num_cols, reference, False, 0.0)
    store_entries(gradient, x, row_factor, col_factor, out, out_stride, scale_partials, NEEDS_SCALE, IS_FIRST)


@triton.jit
def store_entries(
    gradient,
    x,
    row_factor,
    col_factor,
    out,
    out_stride,
    scale_partials,
    NEEDS_SCALE: tl.constexpr,
    IS_FIRST: tl.constexpr,
):
    """Add up the tile's part of the moment, and store H."""
    if NEEDS_SCALE:
        store_moment(tl.sum(tl.sum(gradient * tl.maximum(x, LOWEST), axis=1), axis=0), scale_partials, IS_FIRST)
    gradient = gradient * row_factor[:, None] * col_factor[None, :]
    store_tile(gradient, out, out_stride)


@triton.jit
def make_of_kept(
    kept,
    kept_stride,
    row_start,
    num_rows,
    row_log_sums,
    row_factors,
    entry_scale,
    col_start,
    num_cols,
    col_log_sums,
    col_factors,
    scale,
    reference,
    headroom,
    smallest_log,
    out,
    out_stride,
    scale_partials,
    NEEDS_SCALE: tl.constexpr,
    IS_FIRST: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Store H of kept entries, and return whether it could be: entries of a sum out of float32's range are lost."""
    i, j = tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    i_exists, j_exists = row_start + i < num_rows, col_start + j < num_cols
    row_log = tl.load(row_log_sums + row_start + i, mask=i_exists, other=float("inf"))
    col_log = tl.load(col_log_sums + col_start + j, mask=j_exists, other=float("inf"))
    smallest, _ = log_sum_range(row_log, col_log, i_exists, j_exists)
    exponent = constant_shift(scale, None, 0, headroom, False, True) - tl.load(reference)
    is_lost = smallest - exponent < smallest_log  # what is not a number compares false, and shows
    if not is_lost:
        row_factor = tl.load(row_factors + row_start + i, mask=i_exists, other=0.0) * entry_scale
        out += row_start.to(tl.int64) * out_stride + col_start
        store_kept(
            kept, kept_stride, row_start, num_rows, row_log, row_factor, col_start, num_cols, col_log_sums,
            col_factors, exponent, out, out_stride, scale_partials, NEEDS_SCALE, IS_FIRST, TILE_M, TILE_N,
        )  # fmt: skip
    return not is_lost


@triton.jit
def store_kept(
    kept,
    kept_stride,
    row_start,
    num_rows,
    row_log,
    row_factor,
    col_start,
    num_cols,
    col_log_sums,
    col_factors,
    exponent,
    out,
    out_stride,
    scale_partials,
    NEEDS_SCALE: tl.constexpr,
    IS_FIRST: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """From kept entries to H, some columns at a time: a whole tile of entries and of H would not fit the registers.

    ``exponent`` is what the logarithms of the entries lack to those relative to the reference.
    """
    WIDTH: tl.constexpr = min(TILE_N, 32)
    i, j = tl.arange(0, TILE_M), tl.arange(0, WIDTH)
    i_exists = row_start + i < num_rows
    row_share = tl.exp2(exponent - row_log)
    kept += tl.cast(row_start, tl.int64) * kept_stride
    places = kept + (tl.minimum(i, num_rows - 1 - row_start)[:, None] * kept_stride + (col_start + j)[None, :])
    moment = tl.zeros((TILE_M,), tl.float32)
    for start in tl.range(0, TILE_N, WIDTH):
        col = col_start + start + j
        j_exists = col < num_cols
        col_share = tl.exp2(exponent - tl.load(col_log_sums + col, mask=j_exists, other=float("inf")))
        col_factor = tl.load(col_factors + col, mask=j_exists, other=0.0)
        entries = tl.load(places + start).to(tl.float32)
        entries = tl.where(i_exists[:, None] & j_exists[None, :], entries, 0.0)
        gradient = entries * (row_share[:, None] + col_share[None, :])
        if NEEDS_SCALE:
            moment += tl.sum(gradient * tl.maximum(tl.log2(entries) + exponent, LOWEST), axis=1)
        store_tile(gradient * row_factor[:, None] * col_factor[None, :], out + start, out_stride)
    if NEEDS_SCALE:
        store_moment(tl.sum(moment, axis=0), scale_partials, IS_FIRST)


@triton.jit
def store_moment(moment, scale_partials, IS_FIRST: tl.constexpr):
    """Each tile has a place of its own, and launches follow one another: no atomics, always the same bits."""
    place = scale_partials + tl.program_id(0)
    if not IS_FIRST:
        moment += tl.load(place)
    tl.store(place, moment)


@triton.jit(
    do_not_specialize=["num_rows", "num_cols", "diagonal"],
    do_not_specialize_on_alignment=[
        "row_factors",
        "col_factors",
        "row_log_sums",
        "col_log_sums",
        "scale_pointer",
        "reference",
        "row_ids",
        "col_ids",
        "row_limits",
        "col_limits",
        "row_weights",
        "col_weights",
        "bias",
    ],
)
def gradient_tiles_kernel(
    rows,
    row_stride,
    row_factors,
    row_log_sums,
    cols,
    col_stride,
    col_factors,
    col_log_sums,
    scale_pointer,
    reference,
    row_ids,
    col_ids,
    row_limits,
    col_limits,
    row_weights,
    col_weights,
    bias,
    kept,
    kept_stride,
    out,
    out_stride,
    scale_partials,
    num_rows,
    num_cols,
    dim,
    diagonal,
    entry_scale,
    headroom,
    smallest_log,
    BIASED: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    IS_FIRST: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    program = tl.program_id(0)
    scale = load_scale(scale_pointer)
    row_tile, col_tile = grouped_tile(program, tl.cdiv(num_rows, TILE_M), tl.cdiv(num_cols, TILE_N), GROUP)
    row_start, col_start = row_tile * TILE_M, col_tile * TILE_N
    is_made = False
    if kept is not None:
        is_made = make_of_kept(
            kept, kept_stride, row_start, num_rows, row_log_sums, row_factors, entry_scale, col_start, num_cols,
            col_log_sums, col_factors, scale, reference, headroom, smallest_log, out, out_stride, scale_partials,
            NEEDS_SCALE, IS_FIRST, TILE_M, TILE_N,
        )  # fmt: skip
    if not is_made:
        acc = inner_products(
            rows, row_stride, row_start, num_rows, cols, col_stride, col_start, num_cols, dim, TILE_M, TILE_N, TILE_K,
            EVEN_K, PRECISION, USE_TMA,
        )  # fmt: skip
        i, j = row_start + tl.arange(0, TILE_M), col_start + tl.arange(0, TILE_N)
        i_exists, j_exists = i < num_rows, j < num_cols
        row_factor = tl.load(row_factors + i, mask=i_exists, other=0.0)
        col_factor = tl.load(col_factors + j, mask=j_exists, other=0.0)
        origin = tl.load(reference)
        x = exponents(acc, row_factor, col_factor, BIASED, scale) - origin
        x = without_diagonal(x, row_start, num_rows, col_start, num_cols, diagonal, False, TILE_M, TILE_N)
        x = without_equal_ids(x, row_ids, i, num_rows, col_ids, j, num_cols)
        out += row_start.to(tl.int64) * out_stride + col_start
        if BIASED:
            store_tile(tl.exp2(x), out, out_stride)
        elif bias is not None:
            _, sigmoid = softplus_and_sigmoid(x + (tl.load(bias) + origin).to(tl.float32))
            gradient = sigmoid * load_weights(row_weights, i, num_rows)[:, None]
            row_factor *= entry_scale
            store_entries(gradient, x, row_factor, col_factor, out, out_stride, scale_partials, NEEDS_SCALE, IS_FIRST)
        else:
            row_log = tl.load(row_log_sums + i, mask=i_exists, other=float("inf"))
            col_log = tl.load(col_log_sums + j, mask=j_exists, other=float("inf"))
            smallest, largest = log_sum_range(row_log, col_log, i_exists, j_exists)
            middle = (smallest + largest) * 0.5
            row_factor *= entry_scale
            if largest - smallest <= 100.0:
                store_pair(
                    x, row_log, col_log, middle, origin, row_weights, row_limits, i, num_rows, col_weights, col_limits,
                    j, num_cols, row_factor, col_factor, out, out_stride, scale_partials, True, NEEDS_SCALE, IS_FIRST,
                )  # fmt: skip
            else:
                store_pair(
                    x, row_log, col_log, middle, origin, row_weights, row_limits, i, num_rows, col_weights, col_limits,
                    j, num_cols, row_factor, col_factor, out, out_stride, scale_partials, False, NEEDS_SCALE, IS_FIRST,
                )  # fmt: skip


def shape_with_kept(config: tuning.Config, dtype: torch.dtype) -> tuning.Config:
    """With tiles that leave registers for both ways to H; true float32 products take more than others."""
    return config._replace(tile_n=min(config.tile_n, 32)) if dtype == torch.float32 else narrower(config)


def usable_entries(block: Matrix, moment: Moment | None) -> Tensor | None:
    """Kept entries, if the gradient can take them: a logarithm of bfloat16 is too coarse for that of the scale."""
    if block.entries is None or (moment is not None and block.entries.dtype == torch.bfloat16):
        return None
    return block.entries


def gradient_tiles(
    block: Matrix,
    row_log_sum: Tensor | None,
    col_log_sum: Tensor | None,
    reference: Tensor,
    scale: float,
    moment: Moment | None,
    out: Tensor,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    bias: Tensor | None = None,
    headroom: int = 0,
    smallest_log: float = 0.0,
) -> Launch | None:
    """Write one block of H; see ``.launch.launch`` for what is returned.

    Args:
        block: ``[R, C]``; its diagonal entries are written as zero.
        row_log_sum, col_log_sum: ``[R]``, ``[C]`` float32, relative to the reference; None for centroids and a sigmoid.
        reference: 0-dim float32.
        scale: 2^h.
        moment: to which each tile's Σ H_ij·(x_ij − reference) is added. None if not needed.
        out: in the type of the operands, unit stride along its columns; at least ``[R, C]``, rounded up to whole tiles.
        row_weight, col_weight: ``[R]``, ``[C]`` of any floating type; None for ones. A sigmoid has the first only.
        bias: 0-dim, of a sigmoid, to base 2; None for a soft-max and for centroids.
        headroom: with which the entries of the block were kept, see ``.tile_sums.tile_sums``.
        smallest_log: of a sum relative to the constant exponent, below which kept entries are not used.
    """
    num_rows, dim = block.rows.shape
    num_cols = block.cols.shape[0]
    is_first = moment is not None and not moment.used
    kept = usable_entries(block, moment)

    def shape_of(config: tuning.Config) -> tuning.Config:
        if kept is not None:
            return shape_with_kept(config, block.rows.dtype)
        return narrower(config) if row_weight is not None or block.masked else config

    def registers(config: tuning.Config) -> dict[str, int]:
        # ptxas would spill numbers to stay at 128 registers.
        nvidia = architecture(block.rows.device).startswith("sm_")
        return {"maxnreg": 168} if kept is not None and config.num_warps == 8 and nvidia else {}

    def run(config: tuning.Config) -> Launch | None:
        config = shape_of(config)
        m, n, k = config.tile_m, config.tile_n, config.tile_k
        return launch(
            gradient_tiles_kernel,
            (cdiv(num_rows, m) * cdiv(num_cols, n),),
            (
                block.rows.dtype,
                block.scale.dtype,
                dim,
                out.stride(0),
                block.biased,
                moment is None,
                is_first,
                row_weight is not None and (row_weight.dtype, bias is None),
                mask_kind(block),
                kept is not None and (kept.dtype, kept.stride(0) % 16, kept.data_ptr() % 16),
                config,
                input_precision(block.rows.dtype),
            ),
            (
                descriptor(block.rows, [m, k]) if config.tma else block.rows,
                block.rows.stride(0),
                block.row_factor,
                row_log_sum,
                descriptor(block.cols, [n, k]) if config.tma else block.cols,
                block.cols.stride(0),
                block.col_factor,
                col_log_sum,
                block.scale,
                reference,
                *mask_arguments([block]),
                row_weight,
                col_weight,
                bias,
                kept,
                0 if kept is None else kept.stride(0),
                out,
                out.stride(0),
                None if moment is None else moment.partials,
                num_rows,
                num_cols,
                dim,
                block.diagonal,
                scale,
                float(headroom),
                smallest_log,
            ),
            lambda: {
                "BIASED": block.biased,
                "NEEDS_SCALE": moment is not None,
                "IS_FIRST": is_first,
                "TILE_M": m,
                "TILE_N": n,
                "TILE_K": k,
                "GROUP": config.group,
                "EVEN_K": dim % k == 0,
                "PRECISION": input_precision(block.rows.dtype),
                "USE_TMA": config.tma,
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                **registers(config),
            },
        )

    config = tuning.choose("gradient_tiles", block.rows, run, reset=None if moment is None else moment.partials)
    launched = run(config)
    config = shape_of(config)
    if moment is not None and is_first:
        moment.used = cdiv(num_rows, config.tile_m) * cdiv(num_cols, config.tile_n)
    return launched
