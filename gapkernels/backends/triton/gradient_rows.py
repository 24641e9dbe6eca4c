"""Gradient products of whole rows: H is never written, a block of rows keeps its sums in registers.

    product_i = Σ_partners Σ_{j≠i} H_ij y_j     H_ij = 2^h·(2^(x_ij − L_i) + 2^(x_ij − L_j)) / (‖z_i‖·‖y_j‖)
    product_i = Σ_{j≠i} 2^(x_ij − reference) c_j                                                  for the centroids

The same products as :mod:`.gradient_tiles` followed by library products, computed the other way round: every row, of
whichever modality, walks along all rows of its partners, so each entry is computed once for its row and once for its
column, and a tile of the other operand is read once and used twice.

    program → rows of one modality:   for each partner, for each tile of its rows (read through L2, used twice):
                                          acc = own · tileᵀ  →  H, rounded  →  total += H · tile
                                      total → product_i          (centroids: the same, with themselves)

All modalities and the centroids share one launch. Where that makes fewer programs than the device holds, the columns
are split and the next kernel adds the splits; no atomics, always the same bits.

One exponential per entry and side: with a reference half-way between the smallest and the largest log sum of the pair,

    2^(x − L_i) + 2^(x − L_j) = 2^(x − middle)·(2^(middle − L_i) + 2^(middle − L_j))

as in :mod:`.gradient_tiles`, but for all tiles of a pair; a pair whose log sums are more than 2^100 apart takes two
exponentials per entry. Tiles on the diagonal or past the edge are taken in a loop of their own, so that the others pay
for no mask.

Per pair: 8·N²·D operations (by blocks 6·N²·D), 2·N² exponentials (N²), 2·N²·D·b/TILE_M bytes through L2 (3·N²·b for H,
besides operands). Per triangle of centroids: 4·N²·D (3·N²·D), N² exponentials (N²/2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.device import cdiv, input_precision, next_power_of_2, num_processors
from gapkernels.backends.triton.pair_weights import PairWeights
from gapkernels.backends.triton.row_statistics import Centroids, Operands
from gapkernels.backends.triton.tiles import load_scale


@triton.jit
def load_tile(
    source, stride, base, start, num_rows, dim, TILE: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    CLAMP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Whole rows ``base + start …`` of stacked operands; past the end the last one repeats (or others follow)."""
    if USE_TMA:
        return source.load([base + start, 0])
    else:
        row = tl.arange(0, TILE)
        if CLAMP:
            row = tl.minimum(row, num_rows - 1 - start)
        k = tl.arange(0, BLOCK_D)
        # The start of the tile in 64 bits, positions inside it in 32: large batches cost no registers.
        pointers = source + tl.cast(base + start, tl.int64) * stride + (row[:, None] * stride + k[None, :])
        if EVEN_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=k[None, :] < dim, other=0.0)


@triton.jit
def pair_tiles(
    total,
    moment,
    own,
    own_scale,
    own_log,
    own_share,
    others,
    stride,
    base,
    factors,
    logs,
    shares,
    reference,
    middle,
    unit,
    row_start,
    first,
    skip_from,
    skip,
    count,
    last,
    num_rows,
    dim,
    MASK: tl.constexpr,
    MOMENT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Add ``count`` tiles of one partner to the sums of a block of rows.

    Without MASK: the tiles ``first + t``, those from ``skip_from`` on shifted by ``skip``, one exponential per entry.
    With MASK: the tiles ``first + t`` for t < ``skip`` and then ``last``, two exponentials, without the diagonal.
    """
    for t in tl.range(0, count):
        if MASK:
            tile = tl.where(t < skip, first + t, last)
        else:
            tile = first + t
            tile = tl.where(tile >= skip_from, tile + skip, tile)
        start = tile * TILE_N
        y = load_tile(others, stride, base, start, num_rows, dim, TILE_N, BLOCK_D, EVEN_D, MASK, USE_TMA)
        acc = tl.dot(own, y.T, input_precision=PRECISION)
        j = start + tl.arange(0, TILE_N)
        if MASK:
            inside = j < num_rows
            factor = tl.load(factors + j, mask=inside, other=0.0)
            x = acc * factor[None, :] * own_scale[:, None] - reference
            i = row_start + tl.arange(0, TILE_M)
            counts = (i[:, None] != j[None, :]) & inside[None, :]
            log = tl.load(logs + j, mask=inside, other=float("inf"))
            gradient = (tl.exp2(x - own_log[:, None]) + tl.exp2(x - log[None, :])) * unit
            gradient = tl.where(counts, gradient, 0.0)
            if MOMENT:
                moment += tl.sum(tl.where(counts, gradient * x, 0.0), axis=1)
        else:
            factor = tl.load(factors + j)
            x = acc * factor[None, :] * own_scale[:, None]
            share = tl.load(shares + j)
            if MOMENT:
                x = x - reference
                gradient = tl.exp2(x - middle) * (own_share[:, None] + share[None, :])
                moment += tl.sum(gradient * x, axis=1)
            else:
                gradient = tl.exp2(x - (reference + middle)) * (own_share[:, None] + share[None, :])
        h = (gradient * factor[None, :]).to(y.dtype)
        total = tl.dot(h, y, total, input_precision=PRECISION)
    return total, moment


@triton.jit
def centroid_tiles(
    total,
    own,
    own_bias,
    others,
    stride,
    biases,
    scale,
    row_start,
    first,
    skip_from,
    skip,
    count,
    last,
    num_rows,
    dim,
    MASK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """As :func:`pair_tiles`, for the centroids; ``own_bias`` is relative to the reference."""
    for t in tl.range(0, count):
        if MASK:
            tile = tl.where(t < skip, first + t, last)
        else:
            tile = first + t
            tile = tl.where(tile >= skip_from, tile + skip, tile)
        start = tile * TILE_N
        y = load_tile(others, stride, 0, start, num_rows, dim, TILE_N, BLOCK_D, EVEN_D, MASK, USE_TMA)
        acc = tl.dot(own, y.T, input_precision=PRECISION)
        j = start + tl.arange(0, TILE_N)
        if MASK:
            bias = tl.load(biases + j, mask=j < num_rows, other=float("-inf"))
            h = tl.exp2(acc * scale + (own_bias[:, None] + bias[None, :]))
            i = row_start + tl.arange(0, TILE_M)
            h = tl.where(i[:, None] != j[None, :], h, 0.0)
        else:
            bias = tl.load(biases + j)
            h = tl.exp2(acc * scale + (own_bias[:, None] + bias[None, :]))
        total = tl.dot(h.to(y.dtype), y, total, input_precision=PRECISION)
    return total


@triton.jit
def store_rows(out, values, num_rows, dim):
    """Store as many rows, and as much of them, as there are."""
    i, k = tl.arange(0, values.shape[0])[:, None], tl.arange(0, values.shape[1])[None, :]
    tl.store(out + (i * dim + k), values.to(out.dtype.element_ty), mask=(i < num_rows) & (k < dim))


@triton.jit(
    do_not_specialize=["num_rows", "stacked_rows", "num_splits", "first_row", "stop_row"],
    do_not_specialize_on_alignment=["ranges"],
)
def gradient_rows_kernel(
    operands,
    factors,
    factor_stride,
    logs,
    shares,
    log_stride,
    ranges,
    scale_pointer,
    log_reference,
    centroids,
    biases,
    centroid_scale,
    centroid_reference,
    products,
    centroid_products,
    scale_partials,
    num_rows,
    stacked_rows,
    num_splits,
    first_row,
    stop_row,
    dim,
    unit,
    NUM_TARGETS: tl.constexpr,
    PARTNERS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    # Whose rows, which of them, and which part of the columns: neighbours walk the same columns at the same time.
    program = tl.program_id(0)
    blocks = tl.cdiv(stop_row - first_row, TILE_M)
    start = first_row + program % blocks * TILE_M
    split = program // blocks % num_splits
    target = program // blocks // num_splits

    tiles = tl.cdiv(num_rows, TILE_N)
    per_split = tl.cdiv(tiles, num_splits)
    first = tl.minimum(split * per_split, tiles)
    end = tl.minimum(first + per_split, tiles)
    diagonal = tl.minimum(tl.maximum(start // TILE_N, first), end)
    past_diagonal = tl.minimum(tl.maximum((tl.minimum(start + TILE_M, num_rows) - 1) // TILE_N + 1, first), end)
    on_diagonal = past_diagonal - diagonal
    ragged = tl.where((num_rows % TILE_N != 0) & (end == tiles) & (past_diagonal < end), 1, 0)
    clean = end - first - on_diagonal - ragged

    i = start + tl.arange(0, TILE_M)
    exists = i < stop_row
    # Products are [targets, splits, rows, dim], those of the centroids [splits, rows, dim].
    place = (split.to(tl.int64) * (stop_row - first_row) + (start - first_row)) * dim

    # Two conditions: where the first is false, which the compiler knows, there is nothing to compile.
    if NUM_TARGETS:  # noqa: SIM102
        if target < NUM_TARGETS:
            modality, entry, past_entry = 0, 0, 0
            for e in tl.static_range(len(PARTNERS)):
                modality = tl.where(target == PARTNERS[e][0], PARTNERS[e][1], modality)
                entry += tl.where(target > PARTNERS[e][0], 1, 0)
                past_entry += tl.where(target >= PARTNERS[e][0], 1, 0)
            scale = load_scale(scale_pointer)
            reference = tl.load(log_reference)
            if USE_TMA:
                others = tl.make_tensor_descriptor(
                    operands, shape=[stacked_rows, dim], strides=[dim, 1], block_shape=[TILE_N, BLOCK_D]
                )
            else:
                others = operands
            own = load_tile(
                operands, dim, modality * num_rows, start, num_rows, dim, TILE_M, BLOCK_D, EVEN_D, True, False
            )
            own_factor = tl.load(factors + modality * factor_stride + i, mask=exists, other=0.0)
            own_scale = own_factor * scale
            total = tl.zeros((TILE_M, BLOCK_D), tl.float32)
            moment = tl.zeros((TILE_M,), tl.float32)
            for partner in tl.range(entry, past_entry):
                other, line, has_moment = 0, 0, 0
                for e in tl.static_range(len(PARTNERS)):
                    other = tl.where(partner == e, PARTNERS[e][2], other)
                    line = tl.where(partner == e, PARTNERS[e][3], line)
                    has_moment = tl.where(partner == e, PARTNERS[e][4], has_moment)
                own_line, other_line = line * log_stride, (line ^ 1) * log_stride
                middle = tl.load(ranges + line // 2 * 2)
                apart = tl.load(ranges + line // 2 * 2 + 1) != 0.0
                own_log = tl.load(logs + own_line + i, mask=exists, other=float("inf"))
                own_share = tl.load(shares + own_line + i, mask=exists, other=0.0)
                other_factors = factors + other * factor_stride
                base = other * num_rows
                # Everything without a mask and with one exponential, unless log sums are far apart.
                in_one = tl.where(apart, 0, clean)
                if NEEDS_SCALE:
                    total, moment = pair_tiles(
                        total, moment, own, own_scale, own_log, own_share, others, dim, base, other_factors,
                        logs + other_line, shares + other_line, reference, middle, unit, start, first, diagonal,
                        on_diagonal, in_one * has_moment, 0, num_rows, dim, False, True, TILE_M, TILE_N, BLOCK_D,
                        EVEN_D, PRECISION, USE_TMA,
                    )  # fmt: skip
                    in_one = in_one * (1 - has_moment)
                total, moment = pair_tiles(
                    total, moment, own, own_scale, own_log, own_share, others, dim, base, other_factors,
                    logs + other_line, shares + other_line, reference, middle, unit, start, first, diagonal,
                    on_diagonal, in_one, 0, num_rows, dim, False, False, TILE_M, TILE_N, BLOCK_D, EVEN_D, PRECISION,
                    USE_TMA,
                )  # fmt: skip
                total, with_edges = pair_tiles(
                    total, moment, own, own_scale, own_log, own_share, others, dim, base, other_factors,
                    logs + other_line, shares + other_line, reference, middle, unit, start,
                    tl.where(apart, first, diagonal), 0, tl.where(apart, end - first, on_diagonal),
                    tl.where(apart, end - first, on_diagonal + ragged), tiles - 1, num_rows, dim, True, NEEDS_SCALE,
                    TILE_M, TILE_N, BLOCK_D, EVEN_D, PRECISION, USE_TMA,
                )  # fmt: skip
                moment = tl.where(has_moment != 0, with_edges, moment)
            total *= own_factor[:, None]
            place += target.to(tl.int64) * num_splits * (stop_row - first_row) * dim
            store_rows(products + place, total, stop_row - start, dim)
            if NEEDS_SCALE:
                moment = tl.where(exists, moment, 0.0).to(tl.float64)
                tl.store(scale_partials + program, tl.sum(moment, axis=0) / unit)
    if CENTROIDS:  # noqa: SIM102
        if target == NUM_TARGETS:
            stretch = load_scale(centroid_scale)
            if USE_TMA:
                all_centroids = tl.make_tensor_descriptor(
                    centroids, shape=[num_rows, dim], strides=[dim, 1], block_shape=[TILE_N, BLOCK_D]
                )
            else:
                all_centroids = centroids
            centroid = load_tile(centroids, dim, 0, start, num_rows, dim, TILE_M, BLOCK_D, EVEN_D, True, False)
            own_bias = tl.load(biases + i, mask=exists, other=0.0) - tl.load(centroid_reference)
            centroid_total = tl.zeros((TILE_M, BLOCK_D), tl.float32)
            centroid_total = centroid_tiles(
                centroid_total, centroid, own_bias, all_centroids, dim, biases, stretch, start, first, diagonal,
                on_diagonal, clean, 0, num_rows, dim, False, TILE_M, TILE_N, BLOCK_D, EVEN_D, PRECISION, USE_TMA,
            )  # fmt: skip
            centroid_total = centroid_tiles(
                centroid_total, centroid, own_bias, all_centroids, dim, biases, stretch, start, diagonal, 0,
                on_diagonal, on_diagonal + ragged, tiles - 1, num_rows, dim, True, TILE_M, TILE_N, BLOCK_D, EVEN_D,
                PRECISION, USE_TMA,
            )  # fmt: skip
            store_rows(centroid_products + place, centroid_total, stop_row - start, dim)


class Partner(NamedTuple):
    """One partner of a modality whose rows are walked.

    Attributes:
        target: place of the products of the modality among all that are computed.
        modality: the modality.
        other: the partner.
        line: the modality's line of log sums; that of the partner is ``line ^ 1``.
        has_moment: 1 if the gradient of the logit scale takes the sum over this pair from here, else 0.
    """

    target: int
    modality: int
    other: int
    line: int
    has_moment: int


class Products(NamedTuple):
    """What one launch computed; splits are to be added up.

    Attributes:
        pairs: ``[targets, splits, rows, D']`` float32.
        centroids: ``[splits, rows, D']``, None if not asked for.
        scale_partials: ``[any]`` float64, whose sum is Σ G_ij·(x_ij − reference) of the rows; None if not asked for.
    """

    pairs: Tensor
    centroids: Tensor | None
    scale_partials: Tensor | None


def gradient_rows(
    operands: Operands | None,
    partners: list[Partner],
    centroids: Centroids | None,
    weights: PairWeights,
    logit_scale: Tensor,
    rows: slice,
    unit: float,
    needs_scale: bool,
    centroid_dtype: torch.dtype = torch.float32,
) -> Products:
    """Products of some rows of any modalities, and of the centroids, in one launch.

    Args:
        operands: of all modalities; None to compute those of the centroids alone.
        partners: by target, those of one target together; empty without operands.
        centroids: to compute the products of the centroids as well; their type is as wide as that of the operands.
        weights: from :func:`.pair_weights.pair_weights`.
        logit_scale: 0-dim.
        rows: which rows, of each.
        unit: 2^h, as in the weights.
        needs_scale: whether the gradient of the logit scale is wanted.
        centroid_dtype: type of the products of the centroids, if they are not split.
    """
    like = operands.rows[0] if operands is not None else centroids.rows if centroids is not None else None
    assert like is not None
    num_rows, dim = like.shape
    targets = len({partner.target for partner in partners})
    length = rows.stop - rows.start

    def launch(config: tuning.Config) -> Products:
        blocks = cdiv(length, config.tile_m)
        walks = blocks * (targets + (centroids is not None))
        splits = num_splits(walks, cdiv(num_rows, config.tile_n), config, like.device)
        products = Products(
            like.new_empty((targets, splits, length, dim), dtype=torch.float32),
            None
            if centroids is None
            else like.new_empty((splits, length, dim), dtype=centroid_dtype if splits == 1 else torch.float32),
            like.new_empty(blocks * targets * splits, dtype=torch.float64) if needs_scale else None,
        )
        gradient_rows_kernel[(walks * splits,)](
            None if operands is None else operands.rows,
            None if operands is None else operands.factors,
            0 if operands is None else operands.factors.stride(0),
            weights.logs,
            weights.shares,
            weights.logs.stride(0),
            weights.ranges,
            logit_scale,
            weights.log_reference,
            *(centroids or (None, None, None)),
            weights.centroid_reference,
            products.pairs,
            products.centroids,
            products.scale_partials,
            num_rows,
            num_rows if operands is None else num_rows * operands.rows.shape[0],
            splits,
            rows.start,
            rows.stop,
            dim,
            unit,
            NUM_TARGETS=targets,
            PARTNERS=tuple(tuple(partner) for partner in partners),
            CENTROIDS=centroids is not None,
            NEEDS_SCALE=needs_scale,
            TILE_M=config.tile_m,
            TILE_N=config.tile_n,
            BLOCK_D=row_length(dim),
            EVEN_D=dim == row_length(dim),
            PRECISION=input_precision(like.dtype),
            USE_TMA=config.tma,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return products

    return launch(tuning.choose("gradient_rows", like, launch))


def num_splits(walks: int, tiles: int, config: tuning.Config, device: torch.device) -> int:
    """In how many parts the columns are walked: as many as the device holds at a time, of at least two tiles."""
    held = num_processors(device) * config.programs_per_processor
    return max(1, min(held // walks, tiles // 2))


def row_length(dim: int) -> int:
    """Length of rows in registers."""
    return max(16, next_power_of_2(dim))
