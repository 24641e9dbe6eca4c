"""Arithmetic that is O(N·D): normalisation, centroids, and the terms and diagnostics that need matching rows only.

Everything here runs in the statistics type (float64 where there is one) on a block of rows at a time: next to the
matrix products it costs nothing, and the operands of the products are then correctly rounded unit vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gapkernels.backends.exponential import statistics_dtype
from gapkernels.distributed import World
from gapkernels.spec import LossSpec, unordered_pairs

NORM_EPS = 1e-12  # as torch.nn.functional.normalize
ELEMENTS_AT_ONCE = 2**17  # per modality: 1 MiB in float64, so that a handful of temporaries stays in the cache


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of matrix product operands and of the returned loss, for embeddings of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_chunks(embeddings: list[Tensor], spec: LossSpec) -> Iterator[tuple[slice, list[Tensor], list[Tensor]]]:
    """Yield ``(rows, vectors as the loss uses them, their norms before normalisation)`` in the statistics type."""
    statistics = statistics_dtype(embeddings[0].device)
    rows, dim = embeddings[0].shape
    rows_at_once = max(16, ELEMENTS_AT_ONCE // dim)
    for start in range(0, rows, rows_at_once):
        chunk = slice(start, start + rows_at_once)
        vectors = [e[chunk].to(statistics) for e in embeddings]
        norms = [_norm(v) for v in vectors]
        if spec.normalize:
            vectors = [_divide(v, norm) for v, norm in zip(vectors, norms, strict=True)]
        yield chunk, vectors, norms


def through_normalization(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient with respect to v, from the gradient with respect to v/max(‖v‖, eps)."""
    along = (grad * unit).sum(dim=1, keepdim=True)
    return _divide(grad - torch.where(norm < NORM_EPS, 0.0, along) * unit, norm)


class Prologue(NamedTuple):
    """What the loss needs of the rows before any N×N work; means are over the rows of all processes.

    Attributes:
        unit: per modality ``[n, D]``, contiguous, in the compute type: the operands of the matrix products.
        mean_centroid: ``[D]``.
        align_true_pairs, modality_gap, true_pair_cosine: 0-dim.
    """

    unit: list[Tensor]
    mean_centroid: Tensor
    align_true_pairs: Tensor
    modality_gap: Tensor
    true_pair_cosine: Tensor


def prologue(embeddings: list[Tensor], spec: LossSpec, world: World) -> Prologue:
    """Normalise the rows and sum up what only matching rows contribute to."""
    (rows, dim), modalities = embeddings[0].shape, len(embeddings)
    dtype = compute_dtype(embeddings[0].dtype)
    unit = [e.new_empty((rows, dim), dtype=dtype) for e in embeddings]
    # One row per modality for its mean direction, one for the centroid, one for squared distance and cosine.
    sums = embeddings[0].new_zeros((modalities + 2, max(dim, 2)), dtype=statistics_dtype(embeddings[0].device))
    direction_sums, centroid_sum, pair_sums = sums[:modalities, :dim], sums[modalities, :dim], sums[modalities + 1, :2]
    anchor_pairs = spec.anchor_pairs(modalities)
    for chunk, vectors, norms in row_chunks(embeddings, spec):
        for out, v in zip(unit, vectors, strict=True):
            out[chunk] = v
        if spec.cu_weight:
            centroid_sum += _centroid(vectors, spec)[0].sum(dim=0)
        if spec.atp_weight:
            for m, a in anchor_pairs:
                pair_sums[0] += (vectors[m] - vectors[a]).square().sum() / len(anchor_pairs)
        directions = vectors if spec.normalize else [_divide(v, n) for v, n in zip(vectors, norms, strict=True)]
        for total, u in zip(direction_sums, directions, strict=True):
            total += u.sum(dim=0)
        for m, k in unordered_pairs(modalities):
            pair_sums[1] += torch.linalg.vecdot(directions[m], directions[k]).sum()
    sums = world.sum(sums) / (rows * world.size)
    direction_means = sums[:modalities, :dim]
    gaps = [(direction_means[m] - direction_means[k]).norm() for m, k in unordered_pairs(modalities)]
    return Prologue(
        unit=unit,
        mean_centroid=sums[modalities, :dim],
        align_true_pairs=sums[modalities + 1, 0],
        modality_gap=torch.stack(gaps).mean(),
        true_pair_cosine=sums[modalities + 1, 1] / len(gaps),
    )


def centred_centroids(embeddings: list[Tensor], mean_centroid: Tensor, spec: LossSpec) -> Tensor:
    """The centroids less their mean, ``[n, D]`` in the compute type."""
    out = embeddings[0].new_empty(embeddings[0].shape, dtype=compute_dtype(embeddings[0].dtype))
    for chunk, vectors, _ in row_chunks(embeddings, spec):
        out[chunk] = _centroid(vectors, spec)[0] - mean_centroid
    return out


def through_centroid(grad: Tensor, vectors: list[Tensor], spec: LossSpec) -> Tensor:
    """Gradient with respect to each modality's vectors (the same for all), from that with respect to the centroids."""
    if spec.normalize_centroids:
        centroid, norm = _centroid(vectors, spec)
        grad = through_normalization(grad, centroid, norm)
    return grad / len(vectors)


def _centroid(vectors: list[Tensor], spec: LossSpec) -> tuple[Tensor, Tensor]:
    """``(centroids, norms of the plain means)`` of a block of rows."""
    mean = torch.stack(vectors).mean(dim=0)
    norm = _norm(mean)
    return (_divide(mean, norm) if spec.normalize_centroids else mean), norm


def _norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def _divide(vectors: Tensor, norm: Tensor) -> Tensor:
    return vectors / norm.clamp_min(NORM_EPS)
