"""The contrastive term with every option, on sums along one similarity matrix at a time.

The plain symmetric InfoNCE of matched batches is part of the fused plan (``gapkernels.plan``). With any option here the
term is this composition instead: N² work in ``similarity_logsumexp`` or ``similarity_softplus``, the rest in torch.

For sample i of a pair, with anchor row q_i, its partner p_i, x_ij = s·⟨q̂_i, p̂_j⟩ and positive x_ii:

    from_anchor    ln(Σ_{j≠i} exp x_ij [+ Σ_k exp s⟨q̂_i, n̂_k⟩] [+ Σ_{j≠i} exp s⟨q̂_i, q̂_j⟩] + exp x_ii) − x_ii
    to_anchor      ln(Σ_{j≠i} exp x_ji                         [+ Σ_{j≠i} exp s⟨p̂_i, p̂_j⟩] + exp x_ii) − x_ii
    sigmoid        Σ_{j≠i} softplus(x_ij + b) [+ Σ_k softplus(s⟨q̂_i, n̂_k⟩ + b)] + softplus(−x_ii − b)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gapkernels import similarity_ops  # noqa: F401 (registers the operators)
from gapkernels.backends.contract import NORM_EPS, compute_dtype, statistics_dtype
from gapkernels.collectives import gather_rows, mean_of_equal_ids, own_part, sum_over_processes
from gapkernels.own_negatives import own_products
from gapkernels.spec import Candidates, Contrast, SimilaritySums


class How(NamedTuple):
    """How sums are computed: arguments of the operators."""

    normalize: bool
    backend: str
    group: str
    world_size: int

    def gather(self, x: Tensor) -> Tensor:
        return gather_rows(x, self.group, self.world_size)

    def sum(self, x: Tensor) -> Tensor:
        return sum_over_processes(x, self.group, self.world_size)


def logsumexp(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    how: How,
    matched: bool,
    ids: tuple[Tensor, Tensor] | None = None,
    row_limit: Tensor | None = None,
    col_limit: Tensor | None = None,
) -> SimilaritySums:
    """Log sums of one matrix, see ``gapkernels.similarity_logsumexp``."""
    row_ids, col_ids = ids or (None, None)
    row, col, positives, _ = torch.ops.gapkernels.similarity_logsumexp(
        rows, cols, scale, row_ids, col_ids, row_limit, col_limit, matched, *how
    )
    return SimilaritySums(row, col, positives)


def softplus_sums(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    bias: Tensor,
    how: How,
    matched: bool,
    ids: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of softplus along rows, and logits of the positives; see ``gapkernels.similarity_softplus``."""
    row_ids, col_ids = ids or (None, None)
    row, positives, _ = torch.ops.gapkernels.similarity_softplus(
        rows, cols, scale, bias, row_ids, col_ids, matched, how.normalize, how.backend, how.group
    )
    return row, positives


def per_sample(
    anchor: Tensor, other: Tensor, scale: Tensor, contrast: Contrast, given: Candidates, how: How
) -> tuple[Tensor, SimilaritySums | None]:
    """The contrastive term of each sample of one pair, ``[n]`` in the statistics type, and the sums it is made of.

    Its mean over samples is the loss. The sigmoid loss has no log sums.
    """
    if contrast.sigmoid:
        return _sigmoid(anchor, other, scale, contrast, given, how), None
    ids, masked = given.ids, _masked_ids(contrast, given)
    limit = None
    if contrast.margin is not None:
        with torch.no_grad():
            wide = statistics_dtype(anchor.device)
            cosine = (vectors_of(anchor.to(wide), how) * vectors_of(other.to(wide), how)).sum(dim=1)
            limit = (cosine + contrast.margin) * scale.to(cosine.dtype)
    sums = logsumexp(anchor, other, scale, how, True, masked, limit, limit)
    from_anchor, to_anchor = [sums.rows], [sums.cols]
    if given.negatives is not None:
        from_anchor.append(_negatives(anchor, scale, given, masked is not None, limit, how))
    if contrast.same_anchor:
        from_anchor.append(logsumexp(anchor, anchor, scale, how, True, masked, limit).rows)
    if contrast.same_other:
        to_anchor.append(logsumexp(other, other, scale, how, True, masked, limit).rows)
    positive = sums.positives
    rows, cols = _log_sum(from_anchor), _log_sum(to_anchor)
    if contrast.joint:
        parts = [rows] * (contrast.from_anchor > 0) + [cols] * (contrast.to_anchor > 0)
        return _cross_entropy(_log_sum(parts), positive, positive, contrast), SimilaritySums(rows, cols, positive)
    total = torch.zeros_like(positive)
    if contrast.label_smoothing or (contrast.equal_are_positive and ids is not None):  # as means of vectors need them
        anchor, other = vectors_of(anchor, how), vectors_of(other, how)
    for weight, negatives, ours, theirs, extra in (
        (contrast.from_anchor, rows, anchor, other, given.negatives),
        (contrast.to_anchor, cols, other, anchor, None),
    ):
        if weight:
            target = _target(ours, theirs, extra, positive, scale, contrast, ids, how)
            total = total + weight * _cross_entropy(negatives, positive, target, contrast)
    return total, SimilaritySums(rows, cols, positive)


def uniformity_of_different(centroids: Tensor, t: Tensor, ids: Tensor, how: How) -> Tensor:
    """Centroid uniformity over the pairs of samples whose ids differ, 0-dim.

    Args:
        centroids: ``[n, D]``, whose directions count.
        t: 0-dim, the sharpness.
        ids: ``[n]`` int64.
        how: how sums are computed.

    Returns:
        zero if all ids are equal.
    """
    # Of unit vectors −t‖c_i − c_j‖² = 2t⟨c_i, c_j⟩ − 2t.
    sums = logsumexp(centroids, centroids, 2 * t, how._replace(normalize=True), True, (ids, ids)).rows
    everyone, all_ids = how.gather(sums), how.gather(ids)
    _, size = _classes(all_ids)
    pairs = (all_ids.shape[0] - size).sum()
    uniformity = _log_sum_exp(everyone[None])[0] - 2 * t - pairs.clamp_min(1).log()
    return torch.where(pairs > 0, uniformity, 0.0)


# ---- parts ----------------------------------------------------------------------------------------------------------


def _sigmoid(anchor: Tensor, other: Tensor, scale: Tensor, contrast: Contrast, given: Candidates, how: How) -> Tensor:
    assert given.bias is not None
    bias, masked = given.bias, _masked_ids(contrast, given)
    sums, positive = softplus_sums(anchor, other, scale, bias, how, True, masked)
    bias = bias.to(sums.dtype)
    total = sums - F.logsigmoid(positive + bias)
    if contrast.equal_are_positive and given.ids is not None:  # softplus(−x) = softplus(x) − x
        mean, size = _class_means(vectors_of(other, how), given.ids, how)
        logits = _products(vectors_of(anchor, how), mean) * scale.to(sums.dtype)
        total = total - (size * logits - positive + (size - 1) * bias)
    if given.negatives is not None:
        if given.negatives.dim() == 2:
            negative_ids = None if masked is None or given.negative_ids is None else (masked[0], given.negative_ids)
            total = total + softplus_sums(anchor, given.negatives, scale, given.bias, how, False, negative_ids)[0]
        else:
            total = total + F.softplus(_own_logits(anchor, given.negatives, scale, how) + bias, threshold=40).sum(dim=1)
    return total


def _masked_ids(contrast: Contrast, given: Candidates) -> tuple[Tensor, Tensor] | None:
    """Ids whose equality takes an entry out of the sums: of a soft-max, positives are in it unless it is decoupled."""
    if given.ids is None or (contrast.equal_are_positive and not contrast.decoupled):
        return None
    return given.ids, given.ids


def _negatives(anchor: Tensor, scale: Tensor, given: Candidates, masks: bool, limit: Tensor | None, how: How) -> Tensor:
    """Log sums over the negatives beyond the batch, ``[n]``."""
    assert given.negatives is not None
    if given.negatives.dim() == 2:
        ids = None
        if masks and given.ids is not None and given.negative_ids is not None:
            ids = given.ids, given.negative_ids
        return logsumexp(anchor, given.negatives, scale, how, False, ids, limit).rows
    logits = _own_logits(anchor, given.negatives, scale, how)
    if limit is not None:
        logits = logits.masked_fill(logits.detach() > limit[:, None], -torch.inf)
    return _log_sum_exp(logits)


def _own_logits(anchor: Tensor, negatives: Tensor, scale: Tensor, how: How) -> Tensor:
    """Logits of negatives of a row's own, ``[n, K]``, in the statistics type from products in float32 or wider."""
    products = own_products(anchor, negatives, how.normalize)
    return products * scale.to(products.dtype)


def vectors_of(x: Tensor, how: How) -> Tensor:
    """Rows ``[..., D]`` as the loss uses them, in float32 or wider."""
    x = x.to(compute_dtype(x.dtype))
    return F.normalize(x, dim=-1, eps=NORM_EPS) if how.normalize else x


def _log_sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else _log_sum_exp(torch.stack(parts, dim=1))


def _log_sum_exp(x: Tensor) -> Tensor:
    """``torch.logsumexp`` along rows, whose gradient is not a number where a whole row is −∞; here it is zero."""
    largest = x.detach().amax(dim=1)
    empty = largest == -torch.inf
    largest = largest.masked_fill(empty, 0.0)
    total = (x - largest[:, None]).exp().sum(dim=1).masked_fill(empty, 1.0)
    return (total.log() + largest).masked_fill(empty, -torch.inf)


def _cross_entropy(negatives: Tensor, positive: Tensor, target: Tensor, contrast: Contrast) -> Tensor:
    """ln(denominator) − target; without cancellation where the positive is both."""
    if contrast.decoupled:
        return negatives - target
    cross_entropy = -F.logsigmoid(positive - negatives)
    return cross_entropy if target is positive else cross_entropy + (positive - target)


def _target(
    rows: Tensor,
    cols: Tensor,
    extra: Tensor | None,
    positive: Tensor,
    scale: Tensor,
    contrast: Contrast,
    ids: Tensor | None,
    how: How,
) -> Tensor:
    """The logit that cross-entropy compares with: the positive's, a mean of several, smoothed.

    Where it is not the positive's alone, rows and cols are vectors as the loss uses them.
    """
    target = positive
    if contrast.equal_are_positive and ids is not None:
        mean, _ = _class_means(cols, ids, how)
        target = _products(rows, mean) * scale.to(positive.dtype)
    if contrast.label_smoothing:
        logits = (rows @ _total(cols, how)).to(positive.dtype) * scale.to(positive.dtype)
        count = cols.shape[0] * how.world_size
        if extra is not None and extra.dim() == 2:
            total = _total(vectors_of(extra, how), how)
            logits = logits + (rows @ total).to(positive.dtype) * scale.to(positive.dtype)
            count += extra.shape[0] * how.world_size
        elif extra is not None:
            logits = logits + _own_logits(rows, extra, scale, how).sum(dim=1)
            count += extra.shape[1]
        target = (1 - contrast.label_smoothing) * target + contrast.label_smoothing / count * logits
    return target


def _products(x: Tensor, y: Tensor) -> Tensor:
    """⟨x_i, y_i⟩, in the statistics type."""
    return torch.linalg.vecdot(x, y).to(statistics_dtype(x.device))


def _total(vectors: Tensor, how: How) -> Tensor:
    """The sum of the vectors of all processes, ``[D]``."""
    return how.sum(vectors.sum(dim=0, dtype=statistics_dtype(vectors.device))).to(vectors.dtype)


def _class_means(vectors: Tensor, ids: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """For each own sample the mean of the vectors of its id over all processes ``[n, D]``, and their number ``[n]``."""
    place, size = _classes(how.gather(ids))
    size = own_part(size, how.group, how.world_size)
    return mean_of_equal_ids(vectors, place, size.to(vectors.dtype), how.group), size


def _classes(ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample a number below N that it shares with the samples of its id, and how many these are.

    ``torch.unique`` would make a shape depend on values, which a compiler cannot follow and a GPU waits for.
    """
    values, order = ids.sort()
    first = torch.cat([values.new_zeros(1), (values[1:] != values[:-1]).long()]).cumsum(dim=0)
    place = torch.empty_like(ids).scatter(0, order, first)
    size = torch.zeros_like(ids).scatter_add(0, place, torch.ones_like(ids))
    return place, size[place].to(statistics_dtype(ids.device))
