"""From log sums to the terms of the loss and to what the backward pass needs. O(N) in float64, in two launches.

    row_terms   per row i and pair: odds o = 2^(L − positive), cross-entropy ln(1 + o), negative mass o/(1 + o), of
                rows and of columns; log2 of the sums with the positive; Σ_i 2^(L_i) of centroids, relative to a maximum
    combine     one program adds up what the programs of the first left, and writes loss and terms

Per row: P·(3 reads + 3 writes) of 8 bytes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.contract import Forward, LogSums, RowStatistics, Saved, Scalars
from gapkernels.backends.triton.device import cdiv, next_power_of_2
from gapkernels.backends.triton.launch import launch
from gapkernels.backends.triton.tiles import LOG2_E
from gapkernels.spec import LossSpec, unordered_pairs

LN_2 = tl.constexpr(math.log(2))
BLOCK = 256


@triton.jit
def log1p(x):
    """ln(1 + x) for x in [0, 1] without losing small x: the rounding of 1 + x is divided out again."""
    one_plus = 1.0 + x
    rounded = one_plus - 1.0
    safe = tl.where(rounded == 0.0, 1.0, rounded)
    return tl.where(rounded == 0.0, x, tl.log(one_plus) * (x / safe))


@triton.jit
def softplus(x):
    """ln(1 + e^x); x may be −∞."""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def logaddexp2(a, b):
    """log2(2^a + 2^b); a may be −∞."""
    larger = tl.where(a > b, a, b)
    return larger + log1p(tl.exp2(tl.where(a > b, b - a, a - b))) * LOG2_E


@triton.jit(
    do_not_specialize=["num_rows", "num_cols", "first_own"],
    do_not_specialize_on_alignment=["row_logs", "col_logs", "cosines", "logit_scale", "centroid_logs"],
)
def row_terms_kernel(
    row_logs,
    col_logs,
    cosines,
    logit_scale,
    centroid_logs,
    row_log_sum,
    col_log_sum,
    negative_mass,
    own_centroid_logs,
    partials,
    num_rows,
    num_cols,
    first_own,
    NUM_PAIRS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    j = program * BLOCK + tl.arange(0, BLOCK)
    i = j - first_own  # the same sample among the rows of this process
    exists = j < num_cols
    own = exists & (i >= 0) & (i < num_rows)
    cross_entropy = tl.zeros((BLOCK,), tl.float64)
    for p in tl.static_range(NUM_PAIRS):
        row_base, col_base = p * num_rows.to(tl.int64), p * num_cols.to(tl.int64)
        cosine = tl.load(cosines + col_base + j, mask=exists, other=0.0)
        positive = cosine * (tl.load(logit_scale).to(tl.float64) * LOG2_E)
        row_log = tl.load(row_logs + row_base + i, mask=own, other=0.0)
        col_log = tl.load(col_logs + col_base + j, mask=exists, other=0.0)
        row_log_odds, col_log_odds = (row_log - positive) * LN_2, (col_log - positive) * LN_2
        cross_entropy += tl.where(own, softplus(row_log_odds) + softplus(col_log_odds), 0.0)
        mass = 1.0 / (1.0 + tl.exp(-row_log_odds)) + 1.0 / (1.0 + tl.exp(-col_log_odds))
        tl.store(row_log_sum + row_base + i, logaddexp2(row_log, positive), mask=own)
        tl.store(col_log_sum + col_base + j, logaddexp2(col_log, positive), mask=exists)
        tl.store(negative_mass + row_base + i, mass, mask=own)
    tl.store(partials + program * 3, 0.5 * tl.sum(cross_entropy, axis=0))
    if CENTROIDS:
        log = tl.load(centroid_logs + j, mask=exists, other=float("-inf"))
        largest = tl.max(log, axis=0)
        tl.store(own_centroid_logs + i, log, mask=own)
        tl.store(partials + program * 3 + 1, largest)
        tl.store(partials + program * 3 + 2, tl.sum(tl.exp2(log - largest), axis=0))


@triton.jit(
    do_not_specialize=["num_partials", "total_rows"],
    do_not_specialize_on_alignment=["sums", "weights", "centroid_summary"],
)
def combine_kernel(
    partials,
    sums,
    weights,
    loss,
    terms,
    centroid_summary,
    num_partials,
    total_rows,
    dim,
    PAIRS: tl.constexpr,
    NUM_MODALITIES: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = total_rows.to(tl.float64)
    cross_entropy = tl.zeros((BLOCK,), tl.float64)
    maximum = tl.full((BLOCK,), float("-inf"), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, num_partials, BLOCK):
        b = start + tl.arange(0, BLOCK)
        cross_entropy += tl.load(partials + 3 * b, mask=b < num_partials, other=0.0)
        if CENTROIDS:
            other = tl.load(partials + 3 * b + 1, mask=b < num_partials, other=float("-inf"))
            new = tl.maximum(maximum, other)
            reference = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(maximum - reference)
            total += tl.load(partials + 3 * b + 2, mask=b < num_partials, other=0.0) * tl.exp2(other - reference)
            maximum = new
    info_nce = tl.sum(cross_entropy, axis=0) / (rows * max(NUM_PAIRS, 1))

    uniformity = tl.sum(cross_entropy, axis=0) * 0.0
    if CENTROIDS:
        largest = tl.max(maximum, axis=0)
        sum_of_rows = tl.sum(total * tl.exp2(maximum - largest), axis=0)
        log = largest + tl.log2(sum_of_rows) - 1.0  # rows count every unordered pair twice
        uniformity = log * LN_2 - tl.log(rows * (rows - 1.0) / 2.0)
        tl.store(centroid_summary, log)
        tl.store(centroid_summary + 1, largest)

    scalars = sums + (NUM_MODALITIES + 1) * dim
    align_true_pairs = tl.load(scalars) / (rows * (NUM_MODALITIES - 1))
    cosine = tl.load(scalars + 1) / (rows * len(PAIRS))
    k = tl.arange(0, BLOCK_D)
    gap = cosine * 0.0
    for p in tl.static_range(len(PAIRS)):
        x = tl.load(sums + PAIRS[p][0] * dim + k, mask=k < dim, other=0.0)
        y = tl.load(sums + PAIRS[p][1] * dim + k, mask=k < dim, other=0.0)
        difference = (x - y) / rows
        gap += tl.sqrt(tl.sum(difference * difference, axis=0)) / len(PAIRS)

    weighted = tl.load(weights) * info_nce + tl.load(weights + 1) * align_true_pairs
    tl.store(loss, weighted + tl.load(weights + 2) * uniformity)
    tl.store(terms, info_nce)
    tl.store(terms + 1, align_true_pairs)
    tl.store(terms + 2, uniformity)
    tl.store(terms + 3, gap)
    tl.store(terms + 4, cosine)


def terms(
    embeddings: list[Tensor],
    statistics: RowStatistics,
    all_cosines: Tensor,
    pair_sums: LogSums | None,
    centroid_log_sums: Tensor | None,
    scalars: Scalars,
    first_row: int,
    spec: LossSpec,
) -> Forward:
    """See ``gapkernels.backends.contract.Backend.terms``."""
    (num_rows, dim), modalities = embeddings[0].shape, len(embeddings)
    num_pairs, num_cols = all_cosines.shape
    has_centroids = centroid_log_sums is not None
    new = statistics.sums.new_empty
    saved = Saved(
        row_log_sum=new((num_pairs, num_rows)),
        col_log_sum=new((num_pairs, num_cols)),
        negative_mass=new((num_pairs, num_rows)),
        cosines=statistics.cosines,
        sums=statistics.sums,
        centroid_log_sum=new(num_rows if has_centroids else 0),
        centroid_summary=new(2 if has_centroids else 0),
    )
    grid = (cdiv(num_cols, BLOCK),)
    partials = new((*grid, 3))
    launch(
        row_terms_kernel,
        grid,
        (num_pairs, has_centroids, scalars.logit_scale.dtype),
        (
            *(pair_sums or (None, None)),
            all_cosines,
            scalars.logit_scale,
            centroid_log_sums,
            saved.row_log_sum,
            saved.col_log_sum,
            saved.negative_mass,
            saved.centroid_log_sum,
            partials,
            num_rows,
            num_cols,
            first_row,
        ),
        lambda: {"NUM_PAIRS": num_pairs, "CENTROIDS": has_centroids, "BLOCK": BLOCK},
    )
    loss, values = new((), dtype=torch.float32), new(5, dtype=torch.float32)
    launch(
        combine_kernel,
        (1,),
        (modalities, num_pairs, has_centroids, dim, scalars.weights.dtype),
        (
            partials,
            statistics.sums,
            scalars.weights,
            loss,
            values,
            saved.centroid_summary,
            grid[0],
            num_cols,
            dim,
        ),
        lambda: {
            "PAIRS": tuple(unordered_pairs(modalities)),
            "NUM_MODALITIES": modalities,
            "NUM_PAIRS": num_pairs,
            "CENTROIDS": has_centroids,
            "BLOCK": BLOCK,
            "BLOCK_D": next_power_of_2(dim),
        },
    )
    return Forward(loss, values, saved)
