"""What matching rows contribute, O(N·D): operands, statistics, centroids, and the last step of the gradients.

Everything here runs in the statistics type (float64 where there is one) on a block of rows at a time: next to the
matrix products it costs nothing, and the operands of the products are then correctly rounded unit vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gapkernels.backends.contract import (
    LOG2_E,
    NORM_EPS,
    SUM_SCALARS,
    Centroids,
    Evaluation,
    Operand,
    RowStatistics,
    compute_dtype,
    statistics_dtype,
)
from gapkernels.spec import LossSpec, unordered_pairs

ELEMENTS_AT_ONCE = 2**17  # per modality: 1 MiB in float64, so that a handful of temporaries stays in the cache
LARGEST_FLOAT32_EXPONENT = 32.0
"""Exponents of raw centroids up to this size keep an error of a few 1e-6 when they are sums of float32 products."""


def row_statistics(embeddings: list[Tensor], spec: LossSpec) -> tuple[list[Operand], RowStatistics]:
    """See ``gapkernels.backends.contract.Backend.row_statistics``."""
    (rows, dim), modalities = embeddings[0].shape, len(embeddings)
    dtype = compute_dtype(embeddings[0].dtype)
    pairs, atp_pairs = spec.nce_pairs(modalities), spec.anchor_pairs(modalities) if spec.atp else []
    operands = [Operand(e.new_empty((rows, dim), dtype=dtype), None) for e in embeddings] if pairs else []
    statistics = statistics_dtype(embeddings[0].device)
    cosines = embeddings[0].new_empty((len(pairs), rows), dtype=statistics)
    sums = embeddings[0].new_zeros((modalities + 1) * dim + SUM_SCALARS, dtype=statistics)
    directions, centroid_sum, scalars = sums.split([modalities * dim, dim, SUM_SCALARS])
    directions = directions.view(modalities, dim)
    for chunk, vectors, norms in _row_chunks(embeddings, slice(0, rows), spec):
        for operand, v in zip(operands, vectors, strict=False):
            operand.rows[chunk] = v
        for p, (m, k) in enumerate(pairs):
            cosines[p, chunk] = torch.linalg.vecdot(vectors[m], vectors[k])
        if spec.cu:
            c, _ = _centroid(vectors, spec)
            centroid_sum += c.sum(dim=0)
            scalars[2] += c.square().sum()
        for m, k in atp_pairs:
            scalars[0] += (vectors[m] - vectors[k]).square().sum()
        units = vectors if spec.normalize else [_divide(v, n) for v, n in zip(vectors, norms, strict=True)]
        for total, u in zip(directions, units, strict=True):
            total += u.sum(dim=0)
        for m, k in unordered_pairs(modalities):
            scalars[1] += torch.linalg.vecdot(units[m], units[k]).sum()
    scalars[3] = cosines.sum()
    return operands, RowStatistics(cosines, sums)


def operand(embedding: Tensor, spec: LossSpec) -> Operand:
    """See ``gapkernels.backends.contract.Backend.operand``."""
    out = embedding.new_empty(embedding.shape, dtype=compute_dtype(embedding.dtype))
    for chunk, (vectors,), _ in _row_chunks([embedding], slice(0, embedding.shape[0]), spec):
        out[chunk] = vectors
    return Operand(out, None)


def centroids(
    embeddings: list[Tensor], sums: Tensor, uniformity_t: Tensor, total_rows: int, spec: LossSpec
) -> Centroids:
    """See ``gapkernels.backends.contract.Backend.centroids``.

    Raw centroids may be so far apart that ‖c_i‖² + ‖c_j‖² − 2⟨c_i, c_j⟩ of near copies loses every digit in float32;
    these are given out, and multiplied, in float64.

    Raises:
        ValueError: they are, and the device has no float64.
    """
    rows, dim = embeddings[0].shape
    mean = _mean_centroid(sums, len(embeddings), dim, total_rows)
    dtype = compute_dtype(embeddings[0].dtype)
    if not spec.normalize and not spec.normalize_centroids and dtype == torch.float32:
        dtype = torch.float64
        if embeddings[0].device.type in ("cpu", "mps"):  # elsewhere, reading a number would wait for the device
            largest = 0.0
            for _, vectors, _ in _row_chunks(embeddings, slice(0, rows), spec):
                largest = max(largest, (_centroid(vectors, spec)[0] - mean).square().sum(dim=1).max().item())
            exponent = 2 * LOG2_E * uniformity_t.item() * largest
            if exponent <= LARGEST_FLOAT32_EXPONENT:
                dtype = torch.float32
            elif embeddings[0].device.type == "mps":
                raise ValueError(
                    "centroid uniformity of rows as they are (normalize=False, normalize_centroids=False) needs "
                    f"float64 where centroids lie as far apart as here (uniformity_t·‖c − mean‖² up to "
                    f"{uniformity_t.item() * largest:.3g}), and {embeddings[0].device} has no float64; scale the rows "
                    "down, or compute on the CPU"
                )
    out = embeddings[0].new_empty((rows, dim), dtype=dtype)
    for chunk, vectors, _ in _row_chunks(embeddings, slice(0, rows), spec):
        out[chunk] = _centroid(vectors, spec)[0] - mean
    scale = 2 * uniformity_t
    # The norms of what was stored: squared distances are then those of one set of points, never negative.
    squares = torch.linalg.vecdot(out, out).to(scale.dtype)
    return Centroids(out, (-LOG2_E / 2 * scale * squares).to(dtype), scale)


def row_gradients(
    targets: list[int],
    rows: slice,
    products: list[Tensor | None],
    centroid_products: Tensor | None,
    evaluation: Evaluation,
    out: list[Tensor],
) -> None:
    """See ``gapkernels.backends.contract.Backend.row_gradients``.

    Factors of operands are ones here, and products include the positives.
    """
    spec, saved, scalars = evaluation.spec, evaluation.saved, evaluation.scalars
    modalities, dim = len(evaluation.embeddings), evaluation.embeddings[0].shape[1]
    nce_grad, atp_grad, cu_grad = evaluation.upstream.unbind()
    num_pairs = max(1, len(spec.nce_pairs(modalities)))
    weight = nce_grad * scalars.logit_scale.to(nce_grad.dtype) / (2 * evaluation.total_rows * num_pairs)
    atp_weight = 2 * atp_grad / (evaluation.total_rows * (modalities - 1))
    if centroid_products is not None:
        mean = _mean_centroid(saved.sums, modalities, dim, evaluation.total_rows)
        log_total = saved.centroid_summary[0]
        centroid_weight = 2 * scalars.uniformity_t * cu_grad
        product_weight = centroid_weight * torch.exp2(evaluation.prepared.centroid_reference - log_total)
        own_weight = centroid_weight * torch.exp2(saved.centroid_log_sum - log_total)
    for chunk, x, norms in _row_chunks(evaluation.embeddings, rows, spec):
        local = slice(chunk.start - rows.start, chunk.stop - rows.start)
        through_centroids = None
        if centroid_products is not None:
            c, norm = _centroid(x, spec)
            grad = centroid_products[chunk] * product_weight
            grad -= own_weight[chunk, None] * (c - mean)
            if spec.normalize_centroids:
                grad = _through_normalization(grad, c, norm)
            through_centroids = grad / modalities
        for m, product, gradient in zip(targets, products, out, strict=True):
            total = torch.zeros_like(x[m]) if product is None else product[local] * weight
            if spec.atp:
                for partner in range(modalities) if m == spec.anchor else (spec.anchor,):
                    total += atp_weight * (x[m] - x[partner])
            if through_centroids is not None:
                total += through_centroids
            if spec.normalize:
                total = _through_normalization(total, x[m], norms[m])
            gradient[local] = total * evaluation.world_size


def _row_chunks(
    embeddings: list[Tensor], rows: slice, spec: LossSpec
) -> Iterator[tuple[slice, list[Tensor], list[Tensor]]]:
    """Yield ``(rows, vectors as the loss uses them, their norms before normalisation)`` in the statistics type."""
    statistics = statistics_dtype(embeddings[0].device)
    rows_at_once = max(16, ELEMENTS_AT_ONCE // embeddings[0].shape[1])
    for start in range(rows.start, rows.stop, rows_at_once):
        chunk = slice(start, min(start + rows_at_once, rows.stop))
        vectors = [e[chunk].to(statistics) for e in embeddings]
        norms = [_norm(v, given=e.dtype) for v, e in zip(vectors, embeddings, strict=True)]
        if spec.normalize:
            vectors = [_divide(v, norm) for v, norm in zip(vectors, norms, strict=True)]
        yield chunk, vectors, norms


def _mean_centroid(sums: Tensor, modalities: int, dim: int, total_rows: int) -> Tensor:
    return sums[modalities * dim : (modalities + 1) * dim] / total_rows


def _centroid(vectors: list[Tensor], spec: LossSpec) -> tuple[Tensor, Tensor]:
    """``(centroids, norms of the plain means)`` of a block of rows."""
    mean = torch.stack(vectors).mean(dim=0)
    norm = _norm(mean, given=mean.dtype)
    return (_divide(mean, norm) if spec.normalize_centroids else mean), norm


def _through_normalization(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient with respect to v, from the gradient with respect to v/max(‖v‖, eps)."""
    along = (grad * unit).sum(dim=1, keepdim=True)
    return _divide(grad - torch.where(norm < NORM_EPS, 0.0, along) * unit, norm)


def _norm(vectors: Tensor, given: torch.dtype) -> Tensor:
    """Norms ``[rows, 1]``; ``given`` is the type the vectors came in."""
    if given != vectors.dtype:  # squares of a narrower type cannot leave the range of the wider one
        return torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    largest = vectors.abs().amax(dim=1, keepdim=True)
    power = torch.where((largest > 0) & (largest < torch.inf), torch.exp2(-largest.log2().floor()), 1.0)
    return torch.linalg.vector_norm(vectors * power, dim=1, keepdim=True) / power


def _divide(vectors: Tensor, norm: Tensor) -> Tensor:
    return vectors / norm.clamp_min(NORM_EPS)
