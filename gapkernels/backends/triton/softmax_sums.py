"""Before and after the products of the backward pass: what they need of saved logarithms; the gradient of the scale.

    softmax_sums     per pair: log2 sums of rows and columns relative to a reference, float32; Σ_i of what positives add
                     to the gradient of the logit scale
    scale_gradient   from the sums of all programs to the gradient of the logit scale

One program per pair: O(N) numbers take it less time than a second launch. About 40 bytes per row and pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.contract import Evaluation, PreparedSums, Saved, Scalars
from gapkernels.backends.triton.gradient_tiles import Moment
from gapkernels.backends.triton.launch import launch
from gapkernels.backends.triton.row_statistics import padded
from gapkernels.backends.triton.tiles import LOG2_E

BLOCK, NUM_WARPS = 4096, 16
PARTIALS_AT_ONCE = 1024


@triton.jit
def mean_exponent(positive_sum, exponent_per_cosine, total_rows, NUM_PAIRS: tl.constexpr):
    """The mean of the positives: Σ H_ij·x_ij then loses no digits to what positives and negatives have in common."""
    mean = tl.load(positive_sum) / (total_rows.to(tl.float64) * NUM_PAIRS)
    return (mean * exponent_per_cosine).to(tl.float32)


@triton.jit
def relative_log(log, reference):
    """A logarithm relative to a reference, in float32: a small number, which keeps its digits."""
    return (log - reference).to(tl.float32)


@triton.jit(
    do_not_specialize=["num_rows", "num_cols", "total_rows"],
    do_not_specialize_on_alignment=["positive_sum", "logit_scale", "centroid_log_sum"],
)
def softmax_sums_kernel(
    row_log_sum,
    col_log_sum,
    negative_mass,
    cosines,
    positive_sum,
    logit_scale,
    centroid_log_sum,
    logs,
    log_stride,
    positive_moments,
    references,
    num_rows,
    num_cols,
    total_rows,
    centroid_headroom,
    NUM_PAIRS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    if CENTROIDS and pair == 0:
        largest = tl.load(centroid_log_sum).to(tl.float32)
        tl.store(references + 1, largest - centroid_headroom)
    if NUM_PAIRS > 0:
        exponent_per_cosine = tl.load(logit_scale).to(tl.float64) * LOG2_E
        reference = mean_exponent(positive_sum, exponent_per_cosine, total_rows, NUM_PAIRS)
        if pair == 0:
            tl.store(references, reference)
        row_base, col_base = pair * num_rows.to(tl.int64), pair * num_cols.to(tl.int64)
        row_line, col_line = 2 * pair * log_stride, (2 * pair + 1) * log_stride
        moment = tl.zeros((BLOCK,), tl.float64)
        for start in tl.range(0, num_rows, BLOCK):
            i = start + tl.arange(0, BLOCK)
            exists = i < num_rows
            log = tl.load(row_log_sum + row_base + i, mask=exists, other=0.0)
            tl.store(logs + row_line + i, relative_log(log, reference), mask=exists)
            mass = tl.load(negative_mass + row_base + i, mask=exists, other=0.0)
            cosine = tl.load(cosines + row_base + i, mask=exists, other=0.0)
            moment += mass * (cosine - reference / exponent_per_cosine)
        tl.store(positive_moments + pair, tl.sum(moment, axis=0))
        for start in tl.range(0, num_cols, BLOCK):
            j = start + tl.arange(0, BLOCK)
            exists = j < num_cols
            log = tl.load(col_log_sum + col_base + j, mask=exists, other=0.0)
            tl.store(logs + col_line + j, relative_log(log, reference), mask=exists)


@triton.jit
def write_scale_gradient(
    partials, positive_moments, upstream, logit_scale, out, num_partials, total_rows, NUM_PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """By one program."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, num_partials, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(partials + place, mask=place < num_partials, other=0.0)
    gradient = tl.sum(total, axis=0) / (tl.load(logit_scale).to(tl.float64) * LOG2_E)
    for p in tl.static_range(NUM_PAIRS):
        gradient -= tl.load(positive_moments + p)
    gradient *= tl.load(upstream) / (2.0 * NUM_PAIRS * total_rows.to(tl.float64))
    tl.store(out, gradient)


@triton.jit(
    do_not_specialize=["num_partials", "total_rows"],
    do_not_specialize_on_alignment=["upstream", "logit_scale"],
)
def scale_gradient_kernel(
    partials,
    positive_moments,
    upstream,
    logit_scale,
    out,
    num_partials,
    total_rows,
    NUM_PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    write_scale_gradient(
        partials, positive_moments, upstream, logit_scale, out, num_partials, total_rows, NUM_PAIRS, BLOCK
    )


class Room(NamedTuple):
    """Where prepared sums are written.

    Attributes:
        lines: ``[P, 2, ≥ max(n, N)]`` float32, of rows and of columns; they begin at aligned addresses whatever n is.
        references: ``[2]`` float32, of pairs and of centroids.
        moments: ``[P]`` float64.
    """

    lines: Tensor
    references: Tensor
    moments: Tensor

    def prepared(self, num_rows: int, num_cols: int) -> PreparedSums:
        """The sums that have been written here."""
        num_pairs = self.moments.shape[0]
        return PreparedSums(
            rows=self.lines[:num_pairs, 0, :num_rows],
            cols=self.lines[:num_pairs, 1, :num_cols],
            reference=self.references[0],
            centroid_reference=self.references[1],
            positive_moment=self.moments,
        )


def room(like: Tensor, num_pairs: int, num_rows: int, num_cols: int) -> Room:
    """On the device of ``like``."""
    return Room(
        lines=like.new_empty((max(num_pairs, 1), 2, padded(max(num_rows, num_cols))), dtype=torch.float32),
        references=like.new_empty(2, dtype=torch.float32),
        moments=like.new_empty(num_pairs, dtype=torch.float64),
    )


def softmax_sums(saved: Saved, scalars: Scalars, total_rows: int, centroid_headroom: float) -> PreparedSums:
    """Prepare the log sums of P pairs; see ``gapkernels.backends.contract.Backend.softmax_sums``.

    ``centroid_headroom`` is the base-2 logarithm of the largest entry that the gradient with respect to the inner
    products of centroids may have.
    """
    num_pairs, num_rows = saved.cosines.shape
    num_cols = saved.col_log_sum.shape[1]
    has_centroids = saved.centroid_summary.shape[0] > 0
    out = room(saved.sums, num_pairs, num_rows, num_cols)
    if num_pairs or has_centroids:
        launch(
            softmax_sums_kernel,
            (max(num_pairs, 1),),
            (num_pairs, has_centroids, scalars.logit_scale.dtype),
            (
                saved.row_log_sum,
                saved.col_log_sum,
                saved.negative_mass,
                saved.cosines,
                saved.sums[-1:],
                scalars.logit_scale,
                saved.centroid_summary[1:],
                out.lines,
                out.lines.stride(1),
                out.moments,
                out.references,
                num_rows,
                num_cols,
                total_rows,
                centroid_headroom,
            ),
            lambda: {"NUM_PAIRS": num_pairs, "CENTROIDS": has_centroids, "BLOCK": BLOCK, "num_warps": NUM_WARPS},
        )
    return out.prepared(num_rows, num_cols)


def scale_gradient_like(evaluation: Evaluation) -> Tensor:
    """Room for the gradient of the logit scale: in the scale's type where nothing is added to it, else float64."""
    scale = evaluation.scalars.logit_scale
    return scale.new_empty((), dtype=scale.dtype if evaluation.world_size == 1 else torch.float64)


def scale_gradient(moment: Moment, evaluation: Evaluation) -> Tensor:
    """Σ_ij G_ij·cos_ij of all pairs, from Σ G_ij·(x_ij − reference) off the diagonal; there Σ G_ij = Σ negative mass.

    Args:
        moment: what is off the diagonal.
        evaluation: everything else.

    Returns:
        0-dim, see ``scale_gradient_like``.
    """
    moments = evaluation.prepared.positive_moment
    assert moments is not None
    scale = evaluation.scalars.logit_scale
    out = scale_gradient_like(evaluation)
    launch(
        scale_gradient_kernel,
        (1,),
        (moments.numel(), scale.dtype, out.dtype, evaluation.upstream.dtype),
        (moment.partials, moments, evaluation.upstream, scale, out, moment.used, evaluation.total_rows),
        lambda: {"NUM_PAIRS": moments.numel(), "BLOCK": PARTIALS_AT_ONCE},
    )
    return out
