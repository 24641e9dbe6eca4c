"""From log sums to the terms of the loss and to what the backward pass needs. O(N) in float64.

    row_terms   per row i and pair: odds o = 2^(L − positive), cross-entropy ln(1 + o), negative mass o/(1 + o), of
                rows and of columns; log2 of the sums with the positive, in float64 and relative to a reference in
                float32; Σ_i 2^(L_i) of centroids, relative to a maximum
    combine     one program adds up what the programs of the first left, and writes loss and terms

For few rows (ALONE) one program of the first does all of it. Per row: P·(3 reads + 3 writes) of 8 bytes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.contract import Forward, Kept, LogSums, RowStatistics, Saved, Scalars
from gapkernels.backends.triton import device
from gapkernels.backends.triton.device import cdiv, next_power_of_2
from gapkernels.backends.triton.launch import launch
from gapkernels.backends.triton.softmax_sums import mean_exponent, relative_log, room
from gapkernels.backends.triton.tiles import LOG2_E
from gapkernels.spec import LossSpec, unordered_pairs

LN_2 = tl.constexpr(math.log(2))
BLOCK = 256
FEW_ROWS = 2048
"""As many rows take one program less time than a second launch."""


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


@triton.jit
def write_terms(
    cross_entropy, largest, sum_of_rows, sums, weights, loss, terms, centroid_summary, references, total_rows, dim,
    centroid_headroom, PAIRS: tl.constexpr, NUM_MODALITIES: tl.constexpr, NUM_PAIRS: tl.constexpr,
    CENTROIDS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Loss and terms, from sums over all rows: the cross-entropy and, relative to the largest, 2^(L_i) of centroids."""
    rows = total_rows.to(tl.float64)
    info_nce = cross_entropy / (rows * max(NUM_PAIRS, 1))
    uniformity = cross_entropy * 0.0
    if CENTROIDS:
        log = largest + tl.log2(sum_of_rows) - 1.0  # rows count every unordered pair twice
        uniformity = log * LN_2 - tl.log(rows * (rows - 1.0) / 2.0)
        tl.store(centroid_summary, log)
        tl.store(centroid_summary + 1, largest)
        tl.store(references + 1, largest.to(tl.float32) - centroid_headroom)

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


@triton.jit
def add_relative(maximum, total, other, others_total):
    """Add what is relative to 2^other to what is relative to 2^maximum; the maximum may become larger."""
    new = tl.maximum(maximum, other)
    reference = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp2(maximum - reference) + others_total * tl.exp2(other - reference)


@triton.jit(
    do_not_specialize=["num_rows", "num_cols", "first_own"],
    do_not_specialize_on_alignment=[
        "row_logs", "col_logs", "cosines", "sums", "logit_scale", "weights", "centroid_logs",
    ],
)  # fmt: skip
def row_terms_kernel(
    row_logs,
    col_logs,
    cosines,
    sums,
    logit_scale,
    weights,
    centroid_logs,
    row_log_sum,
    col_log_sum,
    negative_mass,
    own_centroid_logs,
    centroid_summary,
    lines,
    line_stride,
    references,
    positive_moments,
    partials,
    loss,
    terms,
    num_rows,
    num_cols,
    first_own,
    dim,
    centroid_headroom,
    PAIRS: tl.constexpr,
    NUM_MODALITIES: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    if not ALONE:
        partials += program * (3 + NUM_PAIRS)
    cross_entropy = tl.zeros((BLOCK,), tl.float64)
    if NUM_PAIRS > 0:
        exponent_per_cosine = tl.load(logit_scale).to(tl.float64) * LOG2_E
        positive_sum = sums + (NUM_MODALITIES + 1) * dim + 3
        reference = mean_exponent(positive_sum, exponent_per_cosine, num_cols, NUM_PAIRS)
        reference_cosine = reference / exponent_per_cosine
        if program == 0:
            tl.store(references, reference)
    for p in tl.static_range(NUM_PAIRS):
        row_base, col_base = p * num_rows.to(tl.int64), p * num_cols.to(tl.int64)
        moment = tl.zeros((BLOCK,), tl.float64)
        for start in tl.range(program * BLOCK, num_cols, programs * BLOCK):
            j = start + tl.arange(0, BLOCK)
            i = j - first_own  # the same sample among the rows of this process
            exists = j < num_cols
            own = exists & (i >= 0) & (i < num_rows)
            cosine = tl.load(cosines + col_base + j, mask=exists, other=0.0)
            positive = cosine * exponent_per_cosine
            row_log = tl.load(row_logs + row_base + i, mask=own, other=0.0)
            col_log = tl.load(col_logs + col_base + j, mask=exists, other=0.0)
            row_log_odds, col_log_odds = (row_log - positive) * LN_2, (col_log - positive) * LN_2
            cross_entropy += tl.where(own, softplus(row_log_odds) + softplus(col_log_odds), 0.0)
            mass = 1.0 / (1.0 + tl.exp(-row_log_odds)) + 1.0 / (1.0 + tl.exp(-col_log_odds))
            moment += tl.where(own, mass * (cosine - reference_cosine), 0.0)
            row_log, col_log = logaddexp2(row_log, positive), logaddexp2(col_log, positive)
            tl.store(row_log_sum + row_base + i, row_log, mask=own)
            tl.store(col_log_sum + col_base + j, col_log, mask=exists)
            tl.store(negative_mass + row_base + i, mass, mask=own)
            tl.store(lines + 2 * p * line_stride + i, relative_log(row_log, reference), mask=own)
            tl.store(lines + (2 * p + 1) * line_stride + j, relative_log(col_log, reference), mask=exists)
        if ALONE:
            tl.store(positive_moments + p, tl.sum(moment, axis=0))
        else:
            tl.store(partials + 3 + p, tl.sum(moment, axis=0))
    maximum = tl.full((BLOCK,), float("-inf"), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    if CENTROIDS:
        for start in tl.range(program * BLOCK, num_cols, programs * BLOCK):
            j = start + tl.arange(0, BLOCK)
            i = j - first_own
            log = tl.load(centroid_logs + j, mask=j < num_cols, other=float("-inf"))
            tl.store(own_centroid_logs + i, log, mask=(j < num_cols) & (i >= 0) & (i < num_rows))
            maximum, total = add_relative(maximum, total, log, 1.0)
    cross_entropy_sum = 0.5 * tl.sum(cross_entropy, axis=0)
    largest = tl.max(maximum, axis=0)
    reference_log = tl.where(largest == float("-inf"), 0.0, largest)
    sum_of_rows = tl.sum(total * tl.exp2(maximum - reference_log), axis=0)
    if ALONE:
        write_terms(
            cross_entropy_sum, largest, sum_of_rows, sums, weights, loss, terms, centroid_summary, references,
            num_cols, dim, centroid_headroom, PAIRS, NUM_MODALITIES, NUM_PAIRS, CENTROIDS, BLOCK_D,
        )  # fmt: skip
    else:
        tl.store(partials, cross_entropy_sum)
        tl.store(partials + 1, largest)
        tl.store(partials + 2, sum_of_rows)


@triton.jit(
    do_not_specialize=["num_partials", "total_rows"],
    do_not_specialize_on_alignment=["sums", "weights"],
)
def combine_kernel(
    partials,
    sums,
    weights,
    loss,
    terms,
    centroid_summary,
    references,
    positive_moments,
    num_partials,
    total_rows,
    dim,
    centroid_headroom,
    PAIRS: tl.constexpr,
    NUM_MODALITIES: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    width: tl.constexpr = 3 + NUM_PAIRS
    cross_entropy = tl.zeros((BLOCK,), tl.float64)
    maximum = tl.full((BLOCK,), float("-inf"), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, num_partials, BLOCK):
        b = start + tl.arange(0, BLOCK)
        exists = b < num_partials
        cross_entropy += tl.load(partials + width * b, mask=exists, other=0.0)
        if CENTROIDS:
            other = tl.load(partials + width * b + 1, mask=exists, other=float("-inf"))
            others_total = tl.load(partials + width * b + 2, mask=exists, other=0.0)
            maximum, total = add_relative(maximum, total, other, others_total)
    for p in tl.static_range(NUM_PAIRS):
        moment = tl.zeros((BLOCK,), tl.float64)
        for start in tl.range(0, num_partials, BLOCK):
            b = start + tl.arange(0, BLOCK)
            moment += tl.load(partials + width * b + 3 + p, mask=b < num_partials, other=0.0)
        tl.store(positive_moments + p, tl.sum(moment, axis=0))
    largest = tl.max(maximum, axis=0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    write_terms(
        tl.sum(cross_entropy, axis=0), largest, tl.sum(total * tl.exp2(maximum - reference), axis=0), sums, weights,
        loss, terms, centroid_summary, references, total_rows, dim, centroid_headroom, PAIRS, NUM_MODALITIES,
        NUM_PAIRS, CENTROIDS, BLOCK_D,
    )  # fmt: skip


def terms(
    embeddings: list[Tensor],
    statistics: RowStatistics,
    all_cosines: Tensor,
    pair_sums: LogSums | None,
    centroid_log_sums: Tensor | None,
    scalars: Scalars,
    first_row: int,
    spec: LossSpec,
    centroid_headroom: float,
) -> Forward:
    """See ``gapkernels.backends.contract.Backend.terms``; for the headroom ``.softmax_sums.softmax_sums``."""
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
    prepared = room(statistics.sums, num_pairs, num_rows, num_cols)
    loss, values = new((), dtype=torch.float32), new(5, dtype=torch.float32)
    alone = num_cols <= FEW_ROWS
    block = 2 * BLOCK if alone else BLOCK
    num_programs = 1 if alone else cdiv(num_cols, block)
    # ptxas would spill a number to stay below 64 registers; AMD's compiler knows no such bound.
    registers = {"maxnreg": 112} if device.architecture(embeddings[0].device).startswith("sm_") else {}
    partials = None if alone else new((num_programs, 3 + num_pairs))

    def constants() -> dict[str, object]:
        return {
            "PAIRS": tuple(unordered_pairs(modalities)),
            "NUM_MODALITIES": modalities,
            "NUM_PAIRS": num_pairs,
            "CENTROIDS": has_centroids,
            "BLOCK_D": next_power_of_2(dim),
        }

    launch(
        row_terms_kernel,
        (num_programs,),
        (modalities, num_pairs, has_centroids, dim, alone, scalars.logit_scale.dtype, scalars.weights.dtype),
        (
            None if pair_sums is None else pair_sums.rows,
            None if pair_sums is None else pair_sums.cols,
            all_cosines,
            statistics.sums,
            scalars.logit_scale,
            scalars.weights,
            centroid_log_sums,
            saved.row_log_sum,
            saved.col_log_sum,
            saved.negative_mass,
            saved.centroid_log_sum,
            saved.centroid_summary,
            prepared.lines,
            prepared.lines.stride(1),
            prepared.references,
            prepared.moments,
            partials,
            loss,
            values,
            num_rows,
            num_cols,
            first_row,
            dim,
            centroid_headroom,
        ),
        lambda: {**constants(), "ALONE": alone, "BLOCK": block, "num_warps": block // 32, **registers},
    )
    if not alone:
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
                prepared.references,
                prepared.moments,
                num_programs,
                num_cols,
                dim,
                centroid_headroom,
            ),
            lambda: {**constants(), "BLOCK": BLOCK},
        )
    return Forward(loss, values, saved, Kept([], None, prepared.prepared(num_rows, num_cols)))
