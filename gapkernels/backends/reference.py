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
from gapkernels.spec import Candidates, Contrast, LossSpec, SimilaritySums, unordered_pairs


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


def contrast_per_sample(
    anchor: Tensor, other: Tensor, scale: Tensor, contrast: Contrast, given: Candidates
) -> tuple[Tensor, SimilaritySums | None]:
    """The contrastive term of each sample with every option, ``[N]``, and its log sums without positives.

    Plain InfoNCE is the mean of the first without any option.

    Args:
        anchor, other: ``[N, D]``, vectors as the loss uses them; so are the negatives.
        scale: 0-dim.
        contrast, given: the options; sources are in ``gapkernels.ContrastOptions``.
    """
    n = len(anchor)
    logits = scale * anchor @ other.T
    diagonal = torch.eye(n, dtype=torch.bool, device=anchor.device)
    equal = diagonal if given.ids is None else given.ids[:, None] == given.ids[None, :]
    positives = equal if contrast.equal_are_positive else diagonal
    # Other positives are in the denominator, as the own one is, unless it is decoupled.
    no_negatives = equal & (~positives | contrast.decoupled)
    extra, left_out = logits.new_empty(n, 0), diagonal[:, :0]
    if given.negatives is not None:
        subscripts = "nd,kd->nk" if given.negatives.dim() == 2 else "nd,nkd->nk"
        extra = scale * torch.einsum(subscripts, anchor, given.negatives)
        left_out = torch.zeros_like(extra, dtype=torch.bool)
        if given.ids is not None and given.negative_ids is not None:
            left_out = given.ids[:, None] == given.negative_ids[None, :]
    if contrast.sigmoid:
        assert given.bias is not None
        bias = given.bias
        of_pairs = -F.logsigmoid(torch.where(positives, logits + bias, -(logits + bias)))
        of_pairs = of_pairs.masked_fill(equal & ~positives, 0.0)
        return of_pairs.sum(dim=1) - F.logsigmoid(-(extra + bias)).masked_fill(left_out, 0.0).sum(dim=1), None
    positive = logits.diagonal()
    limit = torch.inf if contrast.margin is None else (positive + scale * contrast.margin)[:, None]

    def negatives(x: Tensor, without: Tensor) -> Tensor:
        return x.masked_fill(without | (x > limit), -torch.inf)

    rows = [negatives(logits, diagonal | no_negatives), negatives(extra, left_out)]
    cols = [negatives(logits.T, diagonal | no_negatives)]
    rows += [negatives(scale * anchor @ anchor.T, diagonal | no_negatives)] if contrast.same_anchor else []
    cols += [negatives(scale * other @ other.T, diagonal | no_negatives)] if contrast.same_other else []
    sums = SimilaritySums(torch.cat(rows, dim=1).logsumexp(dim=1), torch.cat(cols, dim=1).logsumexp(dim=1), positive)
    own = [] if contrast.decoupled else [positive[:, None]]
    if contrast.joint:
        chosen = rows * (contrast.from_anchor > 0) + cols * (contrast.to_anchor > 0)
        return torch.cat(own + chosen, dim=1).logsumexp(dim=1) - positive, sums
    total = torch.zeros_like(positive)
    for weight, candidates, x in ((contrast.from_anchor, rows, logits), (contrast.to_anchor, cols, logits.T)):
        if not weight:
            continue
        target = (1 - contrast.label_smoothing) * (positives * x).sum(dim=1) / positives.sum(dim=1)
        if contrast.label_smoothing:
            everything = torch.cat([x, extra], dim=1) if candidates is rows else x
            target = target + contrast.label_smoothing * everything.mean(dim=1)
        total = total + weight * (torch.cat(own + candidates, dim=1).logsumexp(dim=1) - target)
    return total, sums


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


def centroid_uniformity(centroid: Tensor, t: Tensor, ids: Tensor | None = None) -> Tensor:
    """Logarithm of the mean over pairs i < j of exp(−t‖c_i − c_j‖²).

    Args:
        centroid: ``[N, D]``, see ``centroids``.
        t: 0-dim, positive.
        ids: ``[N]``: pairs of equal ids are left out; zero if that leaves none.

    Source:
        arXiv 2601.18525; the potential: arXiv 2005.10242.
    """
    n = len(centroid)
    norm = centroid.square().sum(dim=1)
    squared_distance = norm[:, None] + norm[None, :] - 2 * centroid @ centroid.T
    i, j = torch.triu_indices(n, n, offset=1, device=centroid.device)
    if ids is not None:
        different = ids[i] != ids[j]
        i, j = i[different], j[different]
        if len(i) == 0:
            return 0 * centroid.sum()
    return torch.logsumexp(-t * squared_distance[i, j], dim=0) - math.log(len(i))


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
