"""From the loss to matrices of exponentials and back.

    embeddings ─ prologue ─► unit vectors, centroids ─► ExpMatrix per pair, triangle ─ backend ─► log sums ─► terms
    gradients ◄─ normalisation, centroid mean ◄─ backend ◄─ soft-max weights ◄─ saved sums ◄─ gradients of terms

Notation: s logit scale, N rows in all, n of them on this process, P InfoNCE pairs.

* InfoNCE of a pair needs, per row, the odds o_i = Σ_{j≠i} e_ij / e_ii: its cross-entropy is ln(1 + o_i) and its
  gradient at the positive is −o_i/(1 + o_i). Leaving the positive out of the sum keeps both exact where the model is
  nearly right and 1 − p_ii would cancel, and the loss cannot become negative through rounding.
* CU depends on differences of centroids only, so they are centred first: the squared distance in matrix form,
  ‖c_i‖² + ‖c_j‖² − 2⟨c_i, c_j⟩, then loses nothing when all centroids lie close together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from gapkernels.backends.exponential import Backend, ExpMatrix, SoftmaxWeights, statistics_dtype
from gapkernels.distributed import World, triangle_blocks
from gapkernels.rows import (
    centred_centroids,
    compute_dtype,
    prologue,
    row_chunks,
    through_centroid,
    through_normalization,
)
from gapkernels.spec import LossSpec

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


class Saved(NamedTuple):
    """What the backward pass needs besides the inputs: O(N) numbers in the statistics type.

    Attributes:
        row_log_sum: ``[P, n]``, for each InfoNCE pair log2 Σ_j e_ij, positive included.
        col_log_sum: ``[P, N]``, log2 Σ_i e_ij over the rows of all processes.
        wrong_share: ``[P, n]``, 1 − p_ii of the row soft-max plus that of the column soft-max.
        centroid: ``[n + 1]``, Σ_{j≠i} e_ij / Z of the own centroids, then log2 Z, where Z = Σ_{i<j} e_ij; empty
            without CU.
    """

    row_log_sum: Tensor
    col_log_sum: Tensor
    wrong_share: Tensor
    centroid: Tensor


class Forward(NamedTuple):
    """What the forward pass returns.

    Attributes:
        loss: 0-dim, the weighted sum of the terms.
        terms: ``[5]``, InfoNCE, ATP, CU (zero where skipped), modality gap, true-pair cosine.
        saved: for :func:`backward`.
    """

    loss: Tensor
    terms: Tensor
    saved: Saved


@runtime_checkable
class FusedBackend(Protocol):
    """A backend with kernels for the O(N·D) steps as well: it takes whole evaluations, not single matrices."""

    def forward(self, embeddings: list[Tensor], logit_scale: Tensor, spec: LossSpec, world: World) -> Forward:
        """As :func:`forward`."""

    def backward(
        self,
        upstream: Tensor,
        embeddings: list[Tensor],
        logit_scale: Tensor,
        saved: Saved,
        spec: LossSpec,
        world: World,
        needs_grad: list[bool],
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """As :func:`backward`; ``saved`` is what the backend's own forward pass saved."""


def forward(
    embeddings: list[Tensor], logit_scale: Tensor, spec: LossSpec, backend: Backend | FusedBackend, world: World
) -> Forward:
    """Evaluate the loss.

    Args:
        embeddings: M tensors ``[n, D]`` of one floating type, this process's rows.
        logit_scale: 0-dim, positive.
        spec: what to compute.
        backend: how to compute it.
        world: the processes that hold the batch.
    """
    rows = embeddings[0].shape[0]
    total_rows = rows * world.size
    world.check_equal_shards(rows, embeddings[0].device)
    if isinstance(backend, FusedBackend):
        return backend.forward(embeddings, logit_scale, spec, world)
    operands = prologue(embeddings, spec, world)
    zero = torch.zeros((), dtype=statistics_dtype(embeddings[0].device), device=embeddings[0].device)

    pairs = spec.nce_pairs(len(embeddings)) if spec.nce_weight else []
    saved = Saved(
        row_log_sum=zero.new_empty((len(pairs), rows)),
        col_log_sum=zero.new_empty((len(pairs), total_rows)),
        wrong_share=zero.new_empty((len(pairs), rows)),
        centroid=zero.new_empty(0),
    )
    info_nce = zero
    for p, (_, _, matrix) in enumerate(_pair_matrices(operands.unit, logit_scale, pairs, spec, world)):
        sums = backend.off_diagonal_log_sums(matrix)
        positive = sums.diagonal
        assert positive is not None
        col = log_sum_over_processes(sums.col, world)
        row_log_odds = (sums.row - positive) * LN_2
        col_log_odds = (_own_rows(col, world) - positive) * LN_2
        info_nce = info_nce + (torch.logaddexp(zero, row_log_odds) + torch.logaddexp(zero, col_log_odds)).sum() / 2
        saved.row_log_sum[p] = torch.logaddexp2(sums.row, positive)
        saved.col_log_sum[p] = torch.logaddexp2(col, world.gather_rows(positive))
        saved.wrong_share[p] = row_log_odds.sigmoid() + col_log_odds.sigmoid()
    if pairs:
        info_nce = world.sum(info_nce) / (total_rows * len(pairs))

    uniformity = zero
    if spec.cu_weight:
        centroids = world.gather_rows(centred_centroids(embeddings, operands.mean_centroid, spec))
        log_sum = _centroid_log_sums(centroids, spec, backend, world)
        log_total = torch.logsumexp(log_sum * LN_2, dim=0) / LN_2 - 1  # rows count every unordered pair twice
        uniformity = log_total * LN_2 - math.log(total_rows * (total_rows - 1) / 2)
        saved = saved._replace(
            centroid=torch.cat([torch.exp2(_own_rows(log_sum, world) - log_total), log_total.reshape(1)])
        )

    loss = spec.nce_weight * info_nce + spec.atp_weight * operands.align_true_pairs + spec.cu_weight * uniformity
    terms = torch.stack(
        [info_nce, operands.align_true_pairs, uniformity, operands.modality_gap, operands.true_pair_cosine]
    )
    dtype = compute_dtype(embeddings[0].dtype)
    return Forward(loss.to(dtype), terms.to(dtype), saved)


def backward(
    upstream: Tensor,
    embeddings: list[Tensor],
    logit_scale: Tensor,
    saved: Saved,
    spec: LossSpec,
    backend: Backend | FusedBackend,
    world: World,
    needs_grad: list[bool],
) -> tuple[list[Tensor | None], Tensor | None]:
    """Differentiate the terms that :func:`forward` evaluated.

    With several processes the gradient of the embeddings is that of the loss times their number, and every process
    returns the whole gradient of the logit scale: the mean over processes, which DistributedDataParallel takes, is then
    the gradient of the loss for every parameter in front of the embeddings and for the scale.

    Args:
        upstream: ``[3]``, gradient with respect to InfoNCE, ATP and CU, their weights included.
        embeddings, logit_scale, spec, backend, world: as for the forward pass.
        saved: from the forward pass.
        needs_grad: for every embedding and, last, the logit scale, whether to differentiate with respect to it.

    Returns:
        ``(gradients of the embeddings, gradient of the scale)``, each shaped and typed like its input, None where not
        needed.
    """
    if isinstance(backend, FusedBackend):
        return backend.backward(upstream, embeddings, logit_scale, saved, spec, world, needs_grad)
    *embedding_needs_grad, scale_needs_grad = needs_grad
    rows = embeddings[0].shape[0]
    total_rows = rows * world.size
    statistics = statistics_dtype(embeddings[0].device)
    nce_grad, atp_grad, cu_grad = upstream.to(statistics).unbind()
    operands = prologue(embeddings, spec, world)

    centroid_grad = None
    if spec.cu_weight and any(embedding_needs_grad):
        centroids = world.gather_rows(centred_centroids(embeddings, operands.mean_centroid, spec))
        centroid_grad = _centroid_gradient(centroids, saved.centroid, cu_grad, spec, backend, world)
        del centroids

    gradients = [
        torch.zeros_like(x) if needed else None for x, needed in zip(operands.unit, embedding_needs_grad, strict=True)
    ]
    scale_grad = upstream.new_zeros((), dtype=statistics)
    pairs = spec.nce_pairs(len(embeddings)) if spec.nce_weight and any(needs_grad) else []
    weight = nce_grad * logit_scale.to(statistics) / (2 * total_rows * max(1, len(pairs)))
    for p, (m, a, matrix) in enumerate(_pair_matrices(operands.unit, logit_scale, pairs, spec, world)):
        softmax = SoftmaxWeights(weight, saved.row_log_sum[p], saved.col_log_sum[p], -weight * saved.wrong_share[p])
        grad_rows, grad_own_cols = gradients[m], gradients[a]
        if grad_rows is None and scale_needs_grad:
            grad_rows = torch.zeros_like(matrix.rows)
        grad_cols = grad_own_cols
        if grad_own_cols is not None and world.size > 1:
            grad_cols = torch.zeros_like(matrix.cols)
        if grad_rows is not None and scale_needs_grad:
            # Σ_ij G_ij⟨rows_i, cols_j⟩ is what this pair adds to ⟨rows, grad_rows⟩.
            before = _inner_product(matrix.rows, grad_rows)
            backend.add_products(matrix, softmax, grad_rows, grad_cols)
            scale_grad += _inner_product(matrix.rows, grad_rows) - before
        else:
            backend.add_products(matrix, softmax, grad_rows, grad_cols)
        if grad_own_cols is not None and grad_cols is not None and world.size > 1:
            grad_own_cols += world.sum_own_rows(grad_cols)

    atp_factor = 2 * atp_grad / (total_rows * (len(embeddings) - 1))
    results = [_like(e, g) for e, g in zip(embeddings, gradients, strict=True)]
    for chunk, x, norms in row_chunks(embeddings, spec):
        shared = None if centroid_grad is None else through_centroid(centroid_grad[chunk].to(statistics), x, spec)
        for m, (gradient, result) in enumerate(zip(gradients, results, strict=True)):
            if gradient is None or result is None:
                continue
            total = gradient[chunk].to(statistics)
            if spec.atp_weight:
                for partner in range(len(x)) if m == spec.anchor else (spec.anchor,):
                    total += atp_factor * (x[m] - x[partner])
            if shared is not None:
                total += shared
            if spec.normalize:
                total = through_normalization(total, x[m], norms[m])
            result[chunk] = total * world.size
    if not scale_needs_grad:
        return results, None
    return results, (world.sum(scale_grad) / logit_scale).to(logit_scale.dtype)


def _pair_matrices(
    unit: list[Tensor], logit_scale: Tensor, pairs: list[tuple[int, int]], spec: LossSpec, world: World
) -> Iterator[tuple[int, int, ExpMatrix]]:
    """Yield ``(row modality, column modality, exponentials of their logits)`` for each pair."""
    rows = unit[0].shape[0]
    scale = logit_scale.to(statistics_dtype(unit[0].device)) * LOG2_E
    largest = [torch.ones_like(scale)] * len(unit)
    if not spec.normalize:
        largest = [world.max(torch.linalg.vector_norm(x, dim=1).max().to(scale.dtype)) for x in unit]
    gathered: dict[int, Tensor] = {}
    for m, a in pairs:
        if a not in gathered:
            gathered = {a: world.gather_rows(unit[a])}  # one at a time: pairs come grouped by column modality
        matrix = ExpMatrix(
            rows=unit[m],
            cols=gathered[a],
            scale=scale,
            bias=None,
            bound=scale * largest[m] * largest[a],
            diagonal=world.rank * rows,
        )
        yield m, a, matrix


def _centroid_matrices(
    centroids: Tensor, spec: LossSpec, world: World, log_total: Tensor | None = None
) -> Iterator[tuple[slice, slice, ExpMatrix]]:
    """Yield ``(rows, columns, exp(−t‖c_i − c_j‖²))`` for this process's blocks of the upper triangle.

    With ``log_total`` the entries are divided by 2^log_total.
    """
    scale = torch.full(
        (), 2 * spec.uniformity_t * LOG2_E, dtype=statistics_dtype(centroids.device), device=centroids.device
    )
    half = -scale / 2 * torch.linalg.vecdot(centroids, centroids)
    row_bias = (half if log_total is None else half - log_total).to(centroids.dtype)
    col_bias = half.to(centroids.dtype)
    for row, col in triangle_blocks(world.rank, world.size, centroids.shape[0] // world.size):
        symmetric = row == col
        if row.start == row.stop or col.start == col.stop:
            continue
        matrix = ExpMatrix(
            rows=centroids[row],
            cols=centroids[col],
            scale=scale,
            bias=(row_bias[row], col_bias[col]),
            bound=torch.zeros_like(scale),
            diagonal=0 if symmetric else None,
            symmetric=symmetric,
        )
        yield row, col, matrix


def _centroid_log_sums(centroids: Tensor, spec: LossSpec, backend: Backend, world: World) -> Tensor:
    """log2 Σ_{j≠i} exp(−t‖c_i − c_j‖²) for the rows of all processes, ``[N]``."""
    log_sum = centroids.new_full((centroids.shape[0],), -math.inf, dtype=statistics_dtype(centroids.device))
    for row, col, matrix in _centroid_matrices(centroids, spec, world):
        sums = backend.off_diagonal_log_sums(matrix)
        log_sum[row] = torch.logaddexp2(log_sum[row], sums.row)
        if not matrix.symmetric:
            log_sum[col] = torch.logaddexp2(log_sum[col], sums.col)
    return log_sum_over_processes(log_sum, world)


def _centroid_gradient(
    centroids: Tensor, saved: Tensor, cu_grad: Tensor, spec: LossSpec, backend: Backend, world: World
) -> Tensor:
    """Gradient with respect to the own centroids, (2t/Z) Σ_{j≠i} e_ij (c_j − c_i), ``[n, D]``."""
    share, log_total = saved[:-1], saved[-1]
    grad = torch.zeros_like(centroids)
    for row, col, matrix in _centroid_matrices(centroids, spec, world, log_total):
        backend.add_products(matrix, None, grad[row], None if matrix.symmetric else grad[col])
    own = world.sum_own_rows(grad)
    own -= share[:, None].to(own.dtype) * _own_rows(centroids, world)
    own *= (2 * spec.uniformity_t * cu_grad).to(own.dtype)
    return own


def _own_rows(x: Tensor, world: World) -> Tensor:
    rows = x.shape[0] // world.size
    return x[world.rank * rows : (world.rank + 1) * rows]


def log_sum_over_processes(log_sum: Tensor, world: World) -> Tensor:
    """log2 Σ 2^log_sum over the processes, elementwise."""
    if world.size == 1:
        return log_sum
    largest = world.max(log_sum)
    reference = torch.where(largest == -math.inf, 0.0, largest)
    return reference + world.sum(torch.exp2(log_sum - reference)).log2()


def _inner_product(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y, summed in the statistics type."""
    return torch.linalg.vecdot(x, y).sum(dtype=statistics_dtype(x.device))


def _like(embedding: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Where the gradient of an embedding goes: over its accumulator if the types agree."""
    if gradient is None or gradient.dtype == embedding.dtype:
        return gradient
    return torch.empty_like(embedding, memory_format=torch.contiguous_format)
