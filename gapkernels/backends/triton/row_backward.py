"""The backward pass by whole rows, for short rows: few launches, and no block of gradients.

    row_statistics ─► centroids ─┐
    operands ─► pair_weights ────┴─► gradient_rows (every modality and the centroids, one launch) ─► row_gradients
                                                                                                  └─► scale_gradient

Products of all rows stay in float32 until ``row_gradients`` has used them. Where they would take more than
:data:`PRODUCT_BYTES`, the centroids come first, their products rounded where gradients will be, and then the rows of
one modality after the other, as many at a time as that much memory holds. For two bf16 modalities, in units of N·D
bytes beyond inputs and gradients: 2 (centroids) + 2 (their products) first, then 4 (operands) + 2, and that memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gapkernels.backends.triton.gradient_rows import Partner, gradient_rows
from gapkernels.backends.triton.matrix import HALF_UNIT
from gapkernels.backends.triton.pair_weights import pair_weights, scale_gradient
from gapkernels.backends.triton.row_gradients import row_gradients
from gapkernels.backends.triton.row_statistics import (
    RowStatistics,
    centroid_headroom,
    centroids,
    operands,
    padded,
)
from gapkernels.distributed import World
from gapkernels.plan import Saved
from gapkernels.spec import LossSpec

PRODUCT_BYTES = 48 * 2**20
"""Memory for products in float32."""


def backward_by_rows(
    upstream: Tensor,
    embeddings: list[Tensor],
    statistics: RowStatistics,
    logit_scale: Tensor,
    saved: Saved,
    spec: LossSpec,
    needs_grad: list[bool],
) -> tuple[list[Tensor | None], Tensor | None]:
    """As :func:`gapkernels.plan.backward`, for a single process; ``statistics`` are those of the forward pass."""
    *embedding_needs_grad, scale_needs_grad = needs_grad
    num_rows, dim = embeddings[0].shape
    dtype = embeddings[0].dtype
    unit = HALF_UNIT if dtype == torch.float16 else 1.0
    gradients = [
        e.new_empty(e.shape) if needed else None for e, needed in zip(embeddings, embedding_needs_grad, strict=True)
    ]
    pairs = spec.nce_pairs(len(embeddings)) if spec.nce_weight else []
    partners = walks(pairs, embedding_needs_grad, scale_needs_grad)
    c = headroom = None
    if spec.cu_weight and any(embedding_needs_grad):
        c = centroids(embeddings, statistics.sums, num_rows, spec, whole_rows=True)
        headroom = centroid_headroom(embeddings[0], num_rows, whole_rows=True)
    weights = pair_weights(saved, statistics.cosines, logit_scale, World(), headroom, whole_rows=True, unit=unit)

    row_bytes = 4 * padded(dim)
    modalities = sorted({partner.modality for partner in partners})
    in_one = (len(modalities) + (c is not None)) * num_rows * row_bytes <= PRODUCT_BYTES
    centroid_products = None
    if c is not None and not (in_one and partners and c.rows.dtype.itemsize == dtype.itemsize):
        rounded = dtype if dtype == torch.bfloat16 and not in_one else torch.float32
        everything = slice(0, num_rows)
        centroid_products = gradient_rows(None, [], c, weights, logit_scale, everything, 1.0, False, rounded).centroids
        c = None
    own = operands(embeddings, spec) if partners else None

    def finish(m: int, rows: slice, products: Tensor | None) -> None:
        gradient = gradients[m]
        if gradient is not None:
            row_gradients(
                m, rows.start, embeddings, statistics, None if own is None else own.factors[m, rows], products,
                centroid_products, saved.wrong_share, saved.centroid, weights.centroid_reference, upstream,
                logit_scale, unit, spec, 1, gradient[rows],
            )  # fmt: skip

    scale_partials = []
    rows_at_once = num_rows if in_one else max(1, PRODUCT_BYTES // row_bytes)
    for group in [modalities] if in_one and partners else [[m] for m in modalities]:
        members = [p._replace(target=group.index(p.modality)) for p in partners if p.modality in group]
        for start in range(0, num_rows, rows_at_once):
            rows = slice(start, min(start + rows_at_once, num_rows))
            products = gradient_rows(own, members, c, weights, logit_scale, rows, unit, scale_needs_grad)
            centroid_products = products.centroids if c is not None else centroid_products
            for place, m in enumerate(group):
                finish(m, rows, products.pairs[place])
            if products.scale_partials is not None:
                scale_partials.append(products.scale_partials)
    if not partners:
        for m in range(len(embeddings)):
            finish(m, slice(0, num_rows), None)
    if not scale_needs_grad:
        return gradients, None
    if not scale_partials:
        return gradients, torch.zeros_like(logit_scale)
    partials = scale_partials[0] if len(scale_partials) == 1 else torch.cat(scale_partials)
    return gradients, scale_gradient(partials, weights, upstream, logit_scale, num_rows, World())


def walks(pairs: list[tuple[int, int]], embedding_needs_grad: list[bool], scale_needs_grad: bool) -> list[Partner]:
    """Whose rows walk along whose, modality by modality, ``target`` left at zero.

    Each pair is walked for the gradient of either modality; the logit scale takes its part from one of the two walks,
    that of the rows if there is one, and is a reason to walk by itself.
    """
    partners = []
    for p, (m, k) in enumerate(pairs):
        for modality, other, line in ((m, k, 2 * p), (k, m, 2 * p + 1)):
            has_moment = scale_needs_grad and (
                modality == m if embedding_needs_grad[m] or not embedding_needs_grad[k] else modality == k
            )
            if embedding_needs_grad[modality] or has_moment:
                partners.append(Partner(0, modality, other, line, int(has_moment)))
    return sorted(partners, key=lambda partner: partner.modality)
