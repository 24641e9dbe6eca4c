"""The portable backend: tiles of library matrix products, driven from Python. Any device torch runs on.

row_arithmetic   O(N·D): operands, statistics, centroids, the last step of the gradients
tiles            N²: sums of a matrix of exponentials, and its gradient's products
tiled (here)     O(N): from log sums to terms, and to what the gradients need
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gapkernels.backends.contract import (
    LN_2,
    LOG2_E,
    SUM_SCALARS,
    SUMS_OF,
    Centroids,
    Evaluation,
    Forward,
    LogSums,
    Matrix,
    Operand,
    PreparedSums,
    RowStatistics,
    Saved,
    Scalars,
    SigmoidWeights,
    SoftmaxSums,
    SoftplusSums,
    compute_dtype,
    statistics_dtype,
)
from gapkernels.backends.tiled import row_arithmetic, tiles
from gapkernels.spec import LossSpec, unordered_pairs


class TiledBackend:
    """``backend="torch"``; see ``gapkernels.backends.contract.Backend``."""

    sums_of = SUMS_OF
    gradient_block = None  # tiles are formed inside
    steps = None

    def row_statistics(self, embeddings: list[Tensor], spec: LossSpec) -> tuple[list[Operand], RowStatistics]:
        return row_arithmetic.row_statistics(embeddings, spec)

    def operand(self, embedding: Tensor, spec: LossSpec) -> Operand:
        return row_arithmetic.operand(embedding, spec)

    def centroids(
        self, embeddings: list[Tensor], sums: Tensor, uniformity_t: Tensor, total_rows: int, spec: LossSpec
    ) -> Centroids:
        return row_arithmetic.centroids(embeddings, sums, uniformity_t, total_rows, spec)

    def log_sums(self, matrices: list[Matrix], zeros: Tensor | None = None, keep: int = 0) -> LogSums:
        sums = [tiles.log_sums(matrix) for matrix in matrices]
        return LogSums(torch.stack([s.row for s in sums]), torch.stack([s.col for s in sums]))

    def softplus_sums(self, matrix: Matrix, bias: Tensor) -> SoftplusSums:
        return tiles.softplus_sums(matrix, bias)

    def terms(
        self,
        embeddings: list[Tensor],
        statistics: RowStatistics,
        all_cosines: Tensor,
        pair_sums: LogSums | None,
        centroid_log_sums: Tensor | None,
        scalars: Scalars,
        first_row: int,
        spec: LossSpec,
    ) -> Forward:
        cosines, sums, _ = statistics
        rows, dim = embeddings[0].shape
        modalities, total_rows = len(embeddings), all_cosines.shape[1]
        own = slice(first_row, first_row + rows)
        info_nce = uniformity = sums.new_zeros(())
        row_log_sum, col_log_sum, negative_mass = (sums.new_empty((0, k)) for k in (rows, total_rows, rows))
        if pair_sums is not None:
            positive = all_cosines * (scalars.logit_scale.to(cosines.dtype) * LOG2_E)
            row_log_odds = (pair_sums.rows - positive[:, own]) * LN_2
            col_log_odds = (pair_sums.cols[:, own] - positive[:, own]) * LN_2
            cross_entropy = torch.logaddexp(info_nce, row_log_odds) + torch.logaddexp(info_nce, col_log_odds)
            info_nce = cross_entropy.sum() / (2 * total_rows * cosines.shape[0])
            row_log_sum = torch.logaddexp2(pair_sums.rows, positive[:, own])
            col_log_sum = torch.logaddexp2(pair_sums.cols, positive)
            negative_mass = row_log_odds.sigmoid() + col_log_odds.sigmoid()
        own_log_sum, summary = sums.new_empty(0), sums.new_empty(0)
        if centroid_log_sums is not None:
            log_total = torch.logsumexp(centroid_log_sums * LN_2, dim=0) / LN_2 - 1  # rows count every pair twice
            uniformity = log_total * LN_2 - math.log(total_rows * (total_rows - 1) / 2)
            own_log_sum = centroid_log_sums[own].clone()
            summary = torch.stack([log_total, centroid_log_sums.max()])

        directions, _, scalar_sums = sums.split([modalities * dim, dim, SUM_SCALARS])
        means = directions.view(modalities, dim) / total_rows
        pairs = unordered_pairs(modalities)
        align_true_pairs = scalar_sums[0] / (total_rows * (modalities - 1))
        cosine = scalar_sums[1] / (total_rows * len(pairs))
        gap = torch.stack([(means[m] - means[k]).norm() for m, k in pairs]).mean()
        terms = torch.stack([info_nce, align_true_pairs, uniformity, gap, cosine])
        dtype = compute_dtype(embeddings[0].dtype)
        saved = Saved(row_log_sum, col_log_sum, negative_mass, cosines, sums, own_log_sum, summary)
        return Forward(torch.dot(terms[:3], scalars.weights).to(dtype), terms.to(dtype), saved)

    def softmax_sums(self, saved: Saved, scalars: Scalars, total_rows: int) -> PreparedSums:
        reference = saved.sums.new_zeros(())
        num_pairs = saved.cosines.shape[0]
        if num_pairs:
            mean_cosine = saved.sums[-1] / (total_rows * num_pairs)
            reference = mean_cosine * scalars.logit_scale.to(mean_cosine.dtype) * LOG2_E
        return PreparedSums(
            rows=saved.row_log_sum - reference,
            cols=saved.col_log_sum - reference,
            reference=reference,
            centroid_reference=saved.centroid_summary[1] if saved.centroid_summary.numel() else reference,
            positive_moment=None,  # products include the positives
        )

    def add_products(
        self,
        block: Matrix,
        sums: SoftmaxSums | SigmoidWeights | None,
        prepared: PreparedSums,
        row_products: Tensor | None,
        col_products: Tensor | None,
        moment: Tensor | None,
        first_rows: bool = False,
        first_cols: bool = False,
    ) -> None:
        reference = prepared.centroid_reference if sums is None else prepared.reference
        tiles.add_products(block, sums, reference, row_products, col_products, moment, first_rows, first_cols)

    def moment_buffer(self, like: Matrix) -> Tensor:
        return like.rows.new_zeros((), dtype=statistics_dtype(like.rows.device))

    def row_gradients(
        self,
        targets: list[int],
        rows: slice,
        factors: list[Tensor | None],
        products: list[Tensor | None],
        centroid_products: Tensor | None,
        evaluation: Evaluation,
        out: list[Tensor],
        moment: Tensor | None = None,
    ) -> None:
        row_arithmetic.row_gradients(targets, rows, products, centroid_products, evaluation, out)

    def scale_gradient(self, moment: Tensor, evaluation: Evaluation) -> Tensor:
        num_pairs = evaluation.saved.cosines.shape[0]
        return moment * evaluation.upstream[0] / (2 * num_pairs * evaluation.total_rows)
