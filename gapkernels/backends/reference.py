"""The definition: every term written as its formula, dense, differentiated by autograd.

This is the page to read to know what the library computes; every other backend is tested against it in float64.
It builds N×N matrices, so its memory grows with the square of the batch. It is also the backend to choose when
second derivatives are needed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gapkernels.backends.contract import Scalars
from gapkernels.spec import LossSpec, unordered_pairs


class Terms(NamedTuple):
    """The unweighted terms; ``None`` for a term whose weight is zero."""

    info_nce: Tensor | None
    align_true_pairs: Tensor | None
    centroid_uniformity: Tensor | None


def info_nce(rows: Tensor, cols: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of one pair of modalities: matching rows are the positives.

    Args:
        rows, cols: ``[N, D]``.
        logit_scale: 0-dim, 1/temperature.

    Source:
        CLIP, arXiv 2103.00020.
    """
    logits = logit_scale * rows @ cols.T
    target = torch.arange(len(rows), device=rows.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def align_true_pairs(rows: Tensor, cols: Tensor) -> Tensor:
    """Mean squared distance of matching rows.

    Args:
        rows, cols: ``[N, D]``.

    Source:
        arXiv 2601.18525, the alignment of true pairs.
    """
    return (rows - cols).square().sum(dim=1).mean()


def centroids(embeddings: list[Tensor], normalize: bool) -> Tensor:
    """The mean over modalities of each sample, ``[N, D]``, put back on the unit sphere if ``normalize``."""
    mean = torch.stack(embeddings).mean(dim=0)
    return F.normalize(mean, dim=1) if normalize else mean


def centroid_uniformity(centroid: Tensor, t: Tensor) -> Tensor:
    """Logarithm of the mean over pairs i < j of exp(−t‖c_i − c_j‖²).

    Args:
        centroid: ``[N, D]``, see ``centroids``.
        t: 0-dim, positive.

    Source:
        arXiv 2601.18525; the potential: arXiv 2005.10242.
    """
    n = len(centroid)
    norm = centroid.square().sum(dim=1)
    squared_distance = norm[:, None] + norm[None, :] - 2 * centroid @ centroid.T
    i, j = torch.triu_indices(n, n, offset=1, device=centroid.device)
    return torch.logsumexp(-t * squared_distance[i, j], dim=0) - math.log(n * (n - 1) / 2)


def loss_terms(embeddings: list[Tensor], scalars: Scalars, spec: LossSpec) -> Terms:
    """All terms of the loss for embeddings ``[N, D]`` of two or more modalities."""
    z = [F.normalize(e, dim=1) for e in embeddings] if spec.normalize else embeddings
    nce_pairs, atp_pairs = spec.nce_pairs(len(z)), spec.anchor_pairs(len(z))
    return Terms(
        info_nce=torch.stack([info_nce(z[m], z[a], scalars.logit_scale) for m, a in nce_pairs]).mean()
        if spec.nce
        else None,
        align_true_pairs=torch.stack([align_true_pairs(z[m], z[a]) for m, a in atp_pairs]).mean() if spec.atp else None,
        centroid_uniformity=centroid_uniformity(centroids(z, spec.normalize_centroids), scalars.uniformity_t)
        if spec.cu
        else None,
    )


def total(terms: Terms, weights: Tensor, embeddings: list[Tensor]) -> Tensor:
    """The weighted sum of the terms; zero, with a gradient of zeros, when all are off."""
    present = [w * term for w, term in zip(weights, terms, strict=True) if term is not None]
    return torch.stack(present or [0 * e.sum() for e in embeddings]).sum()


def diagnostics(embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``(modality_gap, true_pair_cosine)`` of the normalised embeddings, averaged over unordered pairs."""
    z = [F.normalize(e.detach(), dim=1) for e in embeddings]
    pairs = unordered_pairs(len(z))
    gap = torch.stack([(z[m].mean(dim=0) - z[k].mean(dim=0)).norm() for m, k in pairs]).mean()
    cosine = torch.stack([(z[m] * z[k]).sum(dim=1).mean() for m, k in pairs]).mean()
    return gap, cosine
