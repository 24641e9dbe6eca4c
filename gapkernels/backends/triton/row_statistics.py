"""What the loss needs of the rows before any N×N work, O(N·D): operands, cosines of matching rows, means, centroids.

    operands          z_i·2^q with norm in [1, 2), rows padded to whole 32-byte sectors, and the inverse of that norm
    row_statistics    the same, and cos(z_i^m, z_i^a) per pair; per program the sums over its rows of ẑ^m, c,
                      ‖ẑ^m − ẑ^a‖², cosines and ‖c‖²
    add_up            these added up over the programs; zeros for the sums of the matrices, in passing
    centroids         2^k·(c_i − mean c), rounded, and its bias −t·log2 e·‖c_i − mean c‖²

Operands of the matrix products are the embeddings themselves but for a power of two: no rounding, so products on the
tensor cores are exact and the inverse norms follow in float32. The power of two takes care of norms that would leave
the range of float32 (or, in the backward pass, of float16), the copy of odd strides and of alignment.

c_i is the mean over modalities of ẑ_i, put back on the sphere if NORMALIZE_CENTROIDS. Distances of centroids do not
change if the mean is taken away, but ‖c_i‖² + ‖c_j‖² − 2⟨c_i, c_j⟩ then loses nothing when all lie close together; the
power of two k brings the spread near one, so that float16 (eight times finer than bfloat16 at the same speed) does not
run out of range either.

A program takes every programs-th block of rows, a block holds whole rows. Reads of M·N·D·b bytes from device memory
for each of the three kernels (matching rows meet again in L2), writes of M·N·D·b and of N·D·b' for the centroids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.contract import NORM_EPS, SUM_SCALARS, Centroids, Operand, RowStatistics
from gapkernels.backends.triton.device import cdiv, num_processors, row_block
from gapkernels.backends.triton.launch import launch, layout
from gapkernels.backends.triton.tiles import LOG2_E
from gapkernels.spec import LossSpec, unordered_pairs

EPS = tl.constexpr(NORM_EPS)
NUM_SCALARS = tl.constexpr(SUM_SCALARS)
LARGEST_CENTROID_EXPONENT = tl.constexpr(12)


@triton.jit
def load_rows(pointer, stride, i, num_rows, dim, BLOCK_D: tl.constexpr):
    """Whole rows in float32, zero past the ends."""
    k = tl.arange(0, BLOCK_D)
    pointers = pointer + i.to(tl.int64)[:, None] * stride + k[None, :]
    return tl.load(pointers, mask=(i < num_rows)[:, None] & (k < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def reciprocal_power_of_two(x):
    """2^−⌊log2 x⌋ for x ≥ 0, exactly, kept within 2^±100 or so; from the bits of x."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 27), 252)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled_rows(pointer, stride, i, num_rows, dim, BLOCK_D: tl.constexpr):
    """``(z·p, p, max(‖z‖, eps)·p, whether ‖z‖ < eps)`` with powers of two p: no norm overflows or underflows."""
    z = load_rows(pointer, stride, i, num_rows, dim, BLOCK_D)
    power = reciprocal_power_of_two(tl.max(tl.abs(z), axis=1))
    z *= power[:, None]
    norm = tl.sqrt_rn(tl.sum(z * z, axis=1))
    floor = power * EPS
    return z, power, tl.where(norm < floor, floor, norm), norm < floor


@triton.jit
def unit_rows(pointer, stride, i, num_rows, dim, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr):
    """Rows as the loss uses them, ``[rows, BLOCK_D]``, what they were multiplied by, and whether that is 1/eps."""
    if NORMALIZE:
        z, power, divisor, clamped = scaled_rows(pointer, stride, i, num_rows, dim, BLOCK_D)
        inverse = tl.div_rn(1.0, divisor)
        # Multiplied by the inverse and put right by what is left over: rounded like a quotient, so that opposite
        # vectors cancel in a centroid, for one division per row instead of one per number.
        divisor = divisor[:, None] + tl.zeros_like(z)
        quotient = z * inverse[:, None]
        quotient += tl.fma(-quotient, divisor, z) * inverse[:, None]
        return quotient, power * inverse, clamped
    else:
        z = load_rows(pointer, stride, i, num_rows, dim, BLOCK_D)
        return z, 1.0, False


@triton.jit
def centroid_rows(
    embeddings, strides, i, num_rows, dim, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
    NORMALIZE_CENTROIDS: tl.constexpr,
):  # fmt: skip
    """Centroids ``[rows, BLOCK_D]``, what the plain means were multiplied by, and whether that is 1/eps."""
    mean, _, _ = unit_rows(embeddings[0], strides[0], i, num_rows, dim, BLOCK_D, NORMALIZE)
    for m in tl.static_range(1, len(embeddings)):
        z, _, _ = unit_rows(embeddings[m], strides[m], i, num_rows, dim, BLOCK_D, NORMALIZE)
        mean += z
    mean /= len(embeddings)
    norm = tl.sqrt_rn(tl.sum(mean * mean, axis=1))
    inverse = tl.div_rn(1.0, tl.where(norm < EPS, EPS, norm))
    if NORMALIZE_CENTROIDS:
        mean = mean * inverse[:, None]
    return mean, inverse, norm < EPS


@triton.jit
def store_operand(
    pointer, stride, operands, factors, i, num_rows, dim, padded_dim, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write some rows of the operand of one modality, and what they are to be multiplied by."""
    k = tl.arange(0, BLOCK_D)
    exists = i < num_rows
    if NORMALIZE:
        z, _, divisor, _ = scaled_rows(pointer, stride, i, num_rows, dim, BLOCK_D)
        norm = tl.sqrt_rn(tl.sum(z * z, axis=1))
        power = reciprocal_power_of_two(norm)
        z *= power[:, None]
        # A row of zeros has cosine 0 whatever its factor; 1 keeps 1/eps out of the products.
        factor = tl.where(norm == 0, 1.0, tl.div_rn(1.0, divisor * power))
    else:
        z = load_rows(pointer, stride, i, num_rows, dim, BLOCK_D)
        factor = tl.full((z.shape[0],), 1.0, tl.float32)
    pointers = operands + i.to(tl.int64)[:, None] * padded_dim + k[None, :]
    tl.store(pointers, z.to(operands.dtype.element_ty), mask=exists[:, None] & (k < padded_dim)[None, :])
    tl.store(factors + i, factor, mask=exists)


@triton.jit(do_not_specialize=["num_rows"])
def operands_kernel(
    embedding,
    stride,
    operands,
    factors,
    num_rows,
    dim,
    padded_dim,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    for start in tl.range(tl.program_id(0) * BLOCK_N, num_rows, tl.num_programs(0) * BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        store_operand(embedding, stride, operands, factors, i, num_rows, dim, padded_dim, NORMALIZE, BLOCK_D)


@triton.jit(do_not_specialize=["num_rows"])
def row_statistics_kernel(
    embeddings,
    strides,
    operands,
    factors,
    factor_stride,
    cosines,
    sums,
    num_rows,
    dim,
    padded_dim,
    ALL_PAIRS: tl.constexpr,
    NCE_PAIRS: tl.constexpr,
    ATP_PAIRS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_CENTROIDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    start, step = program * BLOCK_N, programs * BLOCK_N
    k = tl.arange(0, BLOCK_D)
    sums += program.to(tl.int64) * ((len(embeddings) + 1) * dim + NUM_SCALARS)
    scalars = sums + (len(embeddings) + 1) * dim
    for m in tl.static_range(len(embeddings)):
        direction_sum = tl.zeros((BLOCK_D,), tl.float64)
        for first in tl.range(start, num_rows, step):
            i = first + tl.arange(0, BLOCK_N)
            z, power, _, _ = scaled_rows(embeddings[m], strides[m], i, num_rows, dim, BLOCK_D)
            # The gap between two means may be a thousandth of either: float64.
            norm = tl.sqrt(tl.sum(z.to(tl.float64) * z.to(tl.float64), axis=1))
            norm = tl.maximum(norm, power.to(tl.float64) * EPS)
            direction_sum += tl.sum(z.to(tl.float64) * (1.0 / norm)[:, None], axis=0)
        tl.store(sums + m * dim + k, direction_sum, mask=k < dim)
        if len(NCE_PAIRS) > 0:  # a loop of its own: with the sums beside it registers would not do
            for first in tl.range(start, num_rows, step):
                i = first + tl.arange(0, BLOCK_N)
                rows = operands + m * num_rows.to(tl.int64) * padded_dim
                store_operand(
                    embeddings[m], strides[m], rows, factors + m * factor_stride, i, num_rows, dim, padded_dim,
                    NORMALIZE, BLOCK_D,
                )  # fmt: skip
    cosine_sum = 0.0
    distance_sum = 0.0
    for p in tl.static_range(len(ALL_PAIRS)):
        for first in tl.range(start, num_rows, step):
            i = first + tl.arange(0, BLOCK_N)
            x, _, _ = unit_rows(embeddings[ALL_PAIRS[p][0]], strides[ALL_PAIRS[p][0]], i, num_rows, dim, BLOCK_D, True)
            y, _, _ = unit_rows(embeddings[ALL_PAIRS[p][1]], strides[ALL_PAIRS[p][1]], i, num_rows, dim, BLOCK_D, True)
            cosine_sum += tl.sum(x * y)
    for p in tl.static_range(len(ATP_PAIRS)):
        for first in tl.range(start, num_rows, step):
            i = first + tl.arange(0, BLOCK_N)
            x, _, _ = unit_rows(
                embeddings[ATP_PAIRS[p][0]], strides[ATP_PAIRS[p][0]], i, num_rows, dim, BLOCK_D, NORMALIZE
            )
            y, _, _ = unit_rows(
                embeddings[ATP_PAIRS[p][1]], strides[ATP_PAIRS[p][1]], i, num_rows, dim, BLOCK_D, NORMALIZE
            )
            distance_sum += tl.sum((x - y) * (x - y))
    positive_sum = 0.0
    for p in tl.static_range(len(NCE_PAIRS)):
        for first in tl.range(start, num_rows, step):
            i = first + tl.arange(0, BLOCK_N)
            x, _, _ = unit_rows(
                embeddings[NCE_PAIRS[p][0]], strides[NCE_PAIRS[p][0]], i, num_rows, dim, BLOCK_D, NORMALIZE
            )
            y, _, _ = unit_rows(
                embeddings[NCE_PAIRS[p][1]], strides[NCE_PAIRS[p][1]], i, num_rows, dim, BLOCK_D, NORMALIZE
            )
            cosine = tl.sum(x * y, axis=1)
            positive_sum += tl.sum(cosine, axis=0)
            tl.store(cosines + p * num_rows.to(tl.int64) + i, cosine.to(tl.float64), mask=i < num_rows)
    centroid_sum = tl.zeros((BLOCK_D,), tl.float32)
    square_sum = 0.0
    if CENTROIDS:
        for first in tl.range(start, num_rows, step):
            i = first + tl.arange(0, BLOCK_N)
            c, _, _ = centroid_rows(embeddings, strides, i, num_rows, dim, BLOCK_D, NORMALIZE, NORMALIZE_CENTROIDS)
            centroid_sum += tl.sum(c, axis=0)
            square_sum += tl.sum(c * c)
    tl.store(sums + len(embeddings) * dim + k, centroid_sum, mask=k < dim)
    tl.store(scalars, distance_sum)
    tl.store(scalars + 1, cosine_sum)
    tl.store(scalars + 2, square_sum)
    tl.store(scalars + 3, positive_sum)


@triton.jit(do_not_specialize=["num_partials", "num_zeros"])
def add_up_kernel(
    partials, sums, zeros, num_partials, num_zeros, width, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    k = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((AT_ONCE, BLOCK), tl.float64)
    for start in tl.range(0, num_partials, AT_ONCE):
        p = start + tl.arange(0, AT_ONCE)
        exists = (p < num_partials)[:, None] & (k < width)[None, :]
        total += tl.load(partials + (p.to(tl.int64)[:, None] * width + k[None, :]), mask=exists, other=0.0)
    tl.store(sums + k, tl.sum(total, axis=0), mask=k < width)
    for start in tl.range(program * BLOCK, num_zeros, programs * BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(zeros + place, tl.zeros((BLOCK,), tl.float32), mask=place < num_zeros)


@triton.jit
def centroid_exponent(sums, num_modalities: tl.constexpr, dim, total_rows, BLOCK_D: tl.constexpr):
    """The power of two that brings the root mean square distance from the mean centroid near one; float64."""
    k = tl.arange(0, BLOCK_D)
    mean = tl.load(sums + num_modalities * dim + k, mask=k < dim, other=0.0) / total_rows
    square = tl.load(sums + (num_modalities + 1) * dim + 2) / total_rows
    spread = square - tl.sum(mean * mean, axis=0)
    smallest: tl.constexpr = 2.0 ** (-2 * LARGEST_CENTROID_EXPONENT)
    return tl.floor(-0.5 * tl.log2(tl.maximum(spread, smallest)))


@triton.jit
def centred(centroid, sums, num_modalities: tl.constexpr, dim, total_rows, BLOCK_D: tl.constexpr):
    """Centroids less their mean."""
    k = tl.arange(0, BLOCK_D)
    mean = tl.load(sums + num_modalities * dim + k, mask=k < dim, other=0.0) / total_rows
    return centroid - mean.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows", "total_rows"], do_not_specialize_on_alignment=["sums", "uniformity_t"])
def centroids_kernel(
    embeddings,
    strides,
    sums,
    centroids,
    biases,
    scale,
    num_rows,
    total_rows,
    dim,
    padded_dim,
    uniformity_t,
    NORMALIZE: tl.constexpr,
    NORMALIZE_CENTROIDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, BLOCK_D)
    exponent = centroid_exponent(sums, len(embeddings), dim, total_rows, BLOCK_D)
    stretch = tl.exp2(exponent).to(tl.float32)
    scale_value = 2 * tl.load(uniformity_t).to(tl.float32) / (stretch * stretch)
    if program == 0:
        tl.store(scale, scale_value)
    for first in tl.range(program * BLOCK_N, num_rows, programs * BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        c, _, _ = centroid_rows(embeddings, strides, i, num_rows, dim, BLOCK_D, NORMALIZE, NORMALIZE_CENTROIDS)
        c = centred(c, sums, len(embeddings), dim, total_rows, BLOCK_D) * stretch
        rounded = c.to(centroids.dtype.element_ty)
        pointers = centroids + i.to(tl.int64)[:, None] * padded_dim + k[None, :]
        tl.store(pointers, rounded, mask=(i < num_rows)[:, None] & (k < padded_dim)[None, :])
        # The norm of what was stored: squared distances are then those of one set of points, never negative.
        stored = rounded.to(tl.float32)
        bias = tl.sum(stored * stored, axis=1) * (-0.5 * LOG2_E * scale_value)
        tl.store(biases + i, bias, mask=i < num_rows)


def _grid(embedding: Tensor, block_rows: int) -> tuple[int]:
    return (min(cdiv(embedding.shape[0], block_rows), 4 * num_processors(embedding.device)),)


def padded(dim: int) -> int:
    """Length of the rows of operands: tiles are loaded in whole 32-byte sectors."""
    return -(-dim // 16) * 16


def operand(embedding: Tensor, spec: LossSpec) -> Operand:
    """Operand of the matrices of pairs, from rows ``[n, D]`` of one modality; its own are padded, ``[n, D']``."""
    num_rows, dim = embedding.shape
    padded_dim = padded(dim)
    block_rows, block_dim = row_block(padded_dim, 2048)
    rows, factors = embedding.new_empty((num_rows, padded_dim)), embedding.new_empty(num_rows, dtype=torch.float32)
    launch(
        operands_kernel,
        _grid(embedding, block_rows),
        (layout([embedding]), dim, spec.normalize),
        (embedding, embedding.stride(0), rows, factors, num_rows, dim, padded_dim),
        lambda: {"NORMALIZE": spec.normalize, "BLOCK_N": block_rows, "BLOCK_D": block_dim},
    )
    return Operand(rows, factors)


def row_statistics(embeddings: list[Tensor], spec: LossSpec) -> tuple[list[Operand], RowStatistics]:
    """One pass over the embeddings ``[n, D]``."""
    (num_rows, dim), modalities = embeddings[0].shape, len(embeddings)
    padded_dim = padded(dim)
    nce_pairs = spec.nce_pairs(modalities)
    block_rows, block_dim = row_block(padded_dim, 2048)
    grid = _grid(embeddings[0], block_rows)
    new = embeddings[0].new_empty
    width = (modalities + 1) * dim + SUM_SCALARS
    cosines = new((len(nce_pairs), num_rows), dtype=torch.float64)
    partials = new((*grid, width), dtype=torch.float64)
    rows = factors = None
    if nce_pairs:
        rows = new((modalities, num_rows, padded_dim))
        # Each modality's factors begin at an aligned address whatever n is: nothing is compiled anew for another n.
        factors = new((modalities, padded(num_rows)), dtype=torch.float32)
    launch(
        row_statistics_kernel,
        grid,
        (layout(embeddings), dim, spec),
        (
            tuple(embeddings),
            tuple(e.stride(0) for e in embeddings),
            rows,
            factors,
            padded(num_rows),
            cosines,
            partials,
            num_rows,
            dim,
            padded_dim,
        ),
        lambda: {
            "ALL_PAIRS": tuple(unordered_pairs(modalities)),
            "NCE_PAIRS": tuple(nce_pairs),
            "ATP_PAIRS": tuple(spec.anchor_pairs(modalities)) if spec.atp else (),
            "CENTROIDS": spec.cu,
            "NORMALIZE": spec.normalize,
            "NORMALIZE_CENTROIDS": spec.normalize_centroids,
            "BLOCK_N": block_rows,
            "BLOCK_D": block_dim,
        },
    )
    sums = new(width, dtype=torch.float64)
    zeros = new((len(nce_pairs) + spec.cu) * 2 * num_rows, dtype=torch.float32)
    launch(
        add_up_kernel,
        (cdiv(width, 64),),
        (width,),
        (partials, sums, zeros, grid[0], zeros.numel(), width),
        lambda: {"BLOCK": 64, "AT_ONCE": 32},
    )
    operands = []
    if rows is not None and factors is not None:
        operands = [Operand(rows[m], factors[m, :num_rows]) for m in range(modalities)]
    return operands, RowStatistics(cosines, sums, zeros)


def _centroid_dtype(embedding: Tensor, total_rows: int) -> torch.dtype:
    """The type centroids are rounded to.

    Rounding to float16 moves CU by about 8e-4/√(N·D), which has to stay clear of 1e-5 relative. Where there is so
    little to average over, float32 costs nothing that could be measured.
    """
    few = total_rows * embedding.shape[1] <= 2**16 and total_rows <= 4096
    return torch.float32 if few or embedding.dtype == torch.float32 else torch.float16


def centroids(
    embeddings: list[Tensor], sums: Tensor, uniformity_t: Tensor, total_rows: int, spec: LossSpec
) -> Centroids:
    """The operand of the centroid matrix, from the sums over the rows of all processes.

    Rows are padded, in float16 for 16-bit embeddings unless they are few, else in float32.
    """
    num_rows, dim = embeddings[0].shape
    block_rows, block_dim = row_block(padded(dim), 2048)
    new = embeddings[0].new_empty
    result = Centroids(
        rows=new((num_rows, padded(dim)), dtype=_centroid_dtype(embeddings[0], total_rows)),
        bias=new(num_rows, dtype=torch.float32),
        scale=new((), dtype=torch.float32),
    )
    launch(
        centroids_kernel,
        _grid(embeddings[0], block_rows),
        (layout(embeddings), result.rows.dtype, uniformity_t.dtype, dim, spec.normalize, spec.normalize_centroids),
        (
            tuple(embeddings),
            tuple(e.stride(0) for e in embeddings),
            sums,
            *result,
            num_rows,
            total_rows,
            dim,
            padded(dim),
            uniformity_t,
        ),
        lambda: {
            "NORMALIZE": spec.normalize,
            "NORMALIZE_CENTROIDS": spec.normalize_centroids,
            "BLOCK_N": block_rows,
            "BLOCK_D": block_dim,
        },
    )
    return result
