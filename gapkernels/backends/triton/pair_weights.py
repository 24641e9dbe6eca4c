"""Before and after the products of the backward pass: what they need of saved logarithms; the gradient of the scale.

    pair_weights     per pair: log2 sums of rows and columns relative to a reference, float32; Σ_i of what positives add
                     to the gradient of the logit scale. For whole rows also the middle of the log sums, whether they
                     are close together, and 2^(h + middle − L), with which one exponential serves rows and columns. For
                     centroids: the largest of their log sums
    scale_gradient   from the sums of all programs to the gradient of the logit scale

One program per pair (and one for the centroids): O(N) numbers take it less time than a second launch. About 60 bytes
per row and pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.triton.row_statistics import padded
from gapkernels.backends.triton.tiles import LOG2_E
from gapkernels.distributed import World
from gapkernels.plan import Saved

LARGEST_RANGE = tl.constexpr(100.0)
"""One exponential is exact for log sums this far apart: what it loses is below 2^−76 of the smaller sum."""

BLOCK, NUM_WARPS = 4096, 16


@triton.jit
def relative_logs(source, base, i, exists, reference):
    """Logarithms relative to a reference, in float32: small numbers, which keep their digits."""
    return (tl.load(source + base + i, mask=exists, other=0.0) - reference).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "num_cols"], do_not_specialize_on_alignment=["centroid_logs"])
def pair_weights_kernel(
    row_log_sum,
    col_log_sum,
    wrong_share,
    cosines,
    positive,
    logit_scale,
    centroid_logs,
    logs,
    shares,
    log_stride,
    ranges,
    positive_moments,
    log_reference,
    centroid_reference,
    num_rows,
    num_cols,
    unit,
    centroid_headroom,
    NUM_PAIRS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    if pair < NUM_PAIRS:
        exponent_per_cosine = tl.load(logit_scale).to(tl.float64) * LOG2_E
        # That of a positive: Σ G_ij·x_ij then loses no digits to what positives and negatives have in common.
        reference = (tl.load(positive).to(tl.float64) * exponent_per_cosine).to(tl.float32)
        if pair == 0:
            tl.store(log_reference, reference)
        row_base, col_base = pair * num_rows.to(tl.int64), pair * num_cols.to(tl.int64)
        row_line, col_line = 2 * pair * log_stride, (2 * pair + 1) * log_stride
        smallest = tl.full((BLOCK,), float("inf"), tl.float32)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float64)
        for start in tl.range(0, num_rows, BLOCK):
            i = start + tl.arange(0, BLOCK)
            exists = i < num_rows
            log = relative_logs(row_log_sum, row_base, i, exists, reference)
            tl.store(logs + row_line + i, log, mask=exists)
            smallest = tl.where(exists, tl.minimum(smallest, log), smallest)
            largest = tl.where(exists, tl.maximum(largest, log), largest)
            share = tl.load(wrong_share + row_base + i, mask=exists, other=0.0)
            cosine = tl.load(cosines + row_base + i, mask=exists, other=0.0).to(tl.float64)
            moment += share * (cosine - reference / exponent_per_cosine)
        tl.store(positive_moments + pair, tl.sum(moment, axis=0))
        for start in tl.range(0, num_cols, BLOCK):
            j = start + tl.arange(0, BLOCK)
            exists = j < num_cols
            log = relative_logs(col_log_sum, col_base, j, exists, reference)
            tl.store(logs + col_line + j, log, mask=exists)
            smallest = tl.where(exists, tl.minimum(smallest, log), smallest)
            largest = tl.where(exists, tl.maximum(largest, log), largest)
        if SHARES:
            low, high = tl.min(smallest, axis=0), tl.max(largest, axis=0)
            middle = (low + high) * 0.5
            tl.store(ranges + 2 * pair, middle)
            # Not a number compares false: it takes the way that is right for anything.
            tl.store(ranges + 2 * pair + 1, tl.where(high - low <= LARGEST_RANGE, 0.0, 1.0))
            for start in tl.range(0, num_rows, BLOCK):
                i = start + tl.arange(0, BLOCK)
                log = relative_logs(row_log_sum, row_base, i, i < num_rows, reference)
                tl.store(shares + row_line + i, tl.exp2(middle - log) * unit, mask=i < num_rows)
            for start in tl.range(0, num_cols, BLOCK):
                j = start + tl.arange(0, BLOCK)
                log = relative_logs(col_log_sum, col_base, j, j < num_cols, reference)
                tl.store(shares + col_line + j, tl.exp2(middle - log) * unit, mask=j < num_cols)
    elif CENTROIDS:
        largest_log = tl.full((BLOCK,), float("-inf"), tl.float64)
        for start in tl.range(0, num_rows, BLOCK):
            i = start + tl.arange(0, BLOCK)
            log = tl.load(centroid_logs + i, mask=i < num_rows, other=float("-inf"))
            largest_log = tl.maximum(largest_log, log)
        tl.store(centroid_reference, tl.max(largest_log, axis=0).to(tl.float32) - centroid_headroom)


@triton.jit(do_not_specialize=["num_partials", "num_rows"], do_not_specialize_on_alignment=["partials"])
def scale_gradient_kernel(
    partials,
    positive_moments,
    upstream,
    logit_scale,
    out,
    num_partials,
    num_rows,
    NUM_PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, num_partials, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(partials + place, mask=place < num_partials, other=0.0)
    gradient = tl.sum(total, axis=0) / (tl.load(logit_scale).to(tl.float64) * LOG2_E)
    for p in tl.static_range(NUM_PAIRS):
        gradient -= tl.load(positive_moments + p)
    gradient *= tl.load(upstream) / (2.0 * NUM_PAIRS * num_rows.to(tl.float64))
    tl.store(out, gradient.to(out.dtype.element_ty))


class PairWeights(NamedTuple):
    """What gradients read of the log sums of P pairs.

    Attributes:
        logs: ``[2P, N or more]`` float32, of rows and of columns of each pair, relative to ``log_reference``.
        shares: as ``logs``, 2^(h + middle − log), for whole rows; None for blocks.
        ranges: ``[P, 2]`` float32, the middle of a pair's log sums, and one if they are too far apart to use it; None
            for blocks.
        positive_moments: ``[P]`` float64, Σ_i wrong_share_i·(cos_ii − reference) of this process's rows.
        log_reference: 0-dim float32.
        centroid_reference: 0-dim float32, the reference exponent of the centroids.
    """

    logs: Tensor
    shares: Tensor | None
    ranges: Tensor | None
    positive_moments: Tensor
    log_reference: Tensor
    centroid_reference: Tensor


def pair_weights(
    saved: Saved,
    cosines: Tensor,
    logit_scale: Tensor,
    world: World,
    centroid_headroom: float | None,
    whole_rows: bool = False,
    unit: float = 1.0,
) -> PairWeights:
    """Prepare the log sums.

    Args:
        saved: from the forward pass.
        cosines: ``[P, n]`` float32, of the matching rows of each pair; P may be zero.
        logit_scale: 0-dim.
        world: the processes, all of which take the same references.
        centroid_headroom: base-2 logarithm of the largest entry that the gradient with respect to the inner products of
            centroids may have; None without centroids.
        whole_rows: whether to prepare one exponential for all tiles of a pair; ``unit`` is 2^h then.
    """
    num_pairs, num_rows = cosines.shape
    num_cols = saved.col_log_sum.shape[1]
    new = cosines.new_empty
    # Lines begin at aligned addresses whatever n is.
    lines = new((1 + whole_rows, 2 * num_pairs, padded(max(num_rows, num_cols))))
    weights = PairWeights(
        logs=lines[0],
        shares=lines[1] if whole_rows else None,
        ranges=new((num_pairs, 2)) if whole_rows else None,
        positive_moments=new(num_pairs, dtype=torch.float64),
        log_reference=new(()),
        centroid_reference=new(()),
    )
    positive = cosines
    if world.size > 1 and num_pairs:
        positive = world.sum(cosines[0, 0]) / world.size
    centroids = centroid_headroom is not None
    if num_pairs + centroids:
        pair_weights_kernel[(num_pairs + centroids,)](
            saved.row_log_sum,
            saved.col_log_sum,
            saved.wrong_share,
            cosines,
            positive,
            logit_scale,
            saved.centroid,
            weights.logs,
            weights.shares,
            lines.stride(1),
            weights.ranges,
            weights.positive_moments,
            weights.log_reference,
            weights.centroid_reference,
            num_rows,
            num_cols,
            unit,
            centroid_headroom or 0.0,
            NUM_PAIRS=num_pairs,
            CENTROIDS=centroids,
            SHARES=whole_rows,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return weights._replace(centroid_reference=world.max(weights.centroid_reference))


def scale_gradient(
    partials: Tensor, weights: PairWeights, upstream: Tensor, logit_scale: Tensor, num_rows: int, world: World
) -> Tensor:
    """Σ_ij G_ij·cos_ij of all pairs, from Σ G_ij·(x_ij − reference) off the diagonal; there Σ G_ij = Σ wrong_share.

    Args:
        partials: ``[any]`` float64, with the sums off the diagonal as their sum.
        weights: from :func:`pair_weights`.
        upstream: ``[3]`` float64, gradient with respect to the terms.
        logit_scale: 0-dim.
        num_rows: n.
        world: the processes, over which the parts are summed; by themselves they are large and cancel.

    Returns:
        0-dim, in the type of the scale.
    """
    out = torch.empty_like(logit_scale, dtype=logit_scale.dtype if world.size == 1 else torch.float64)
    scale_gradient_kernel[(1,)](
        partials,
        weights.positive_moments,
        upstream,
        logit_scale,
        out,
        partials.numel(),
        num_rows * world.size,
        NUM_PAIRS=weights.positive_moments.numel(),
        BLOCK=1024,
    )
    return world.sum(out).to(logit_scale.dtype)
