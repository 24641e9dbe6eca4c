"""Terms of a loss that the fused plan does not compute alone: with a contrast of its own, or by the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gapkernels import contrast, ops
from gapkernels.backends import reference
from gapkernels.backends.contract import Scalars, compute_dtype
from gapkernels.checks import check_rows
from gapkernels.collectives import agreed, mean_of_gradients, mean_over_processes
from gapkernels.contrast import How
from gapkernels.distributed import DTYPES, MODES, NEEDS_GRAD, mode_of, spec_numbers
from gapkernels.spec import Candidates, Contrast, LossSpec, SimilaritySums, contrast_numbers, pairs_of


class GapLossTerms(NamedTuple):
    """The parts of a loss. All are 0-dim tensors; float64 for float64 embeddings, else float32.

    Attributes:
        loss: the weighted sum; differentiable.
        info_nce: the contrastive term, unweighted; differentiable. None if its weight is zero.
        align_true_pairs: likewise.
        centroid_uniformity: likewise.
        modality_gap: ‖mean of x − mean of y‖ of the normalised embeddings, averaged over unordered pairs of
            modalities; detached.
        true_pair_cosine: mean cosine of matching rows, averaged likewise; detached.
    """

    loss: Tensor
    info_nce: Tensor | None
    align_true_pairs: Tensor | None
    centroid_uniformity: Tensor | None
    modality_gap: Tensor
    true_pair_cosine: Tensor


def with_contrast(
    embeddings: list[Tensor],
    scalars: Scalars,
    spec: LossSpec,
    chosen: Contrast,
    given: Candidates,
    how: How,
    different_only: bool,
    needs_all: bool,
) -> GapLossTerms | Tensor:
    """The loss with a contrast of its own: the other terms come from the fused plan without InfoNCE.

    Args:
        embeddings, scalars, spec: as for the plan.
        chosen, given: the contrast.
        how: how sums are computed.
        different_only: centroid uniformity over samples of different ids only.
        needs_all: return all terms, else the loss alone.
    """
    dtype = compute_dtype(embeddings[0].dtype)
    term = uniformity = None
    if different_only and not spec.normalize_centroids:
        raise ValueError("`uniformity_of_equal_ids`=False needs normalize_centroids=True, got False")
    scale = agreed_scale(embeddings, scalars, spec, chosen, given, how, different_only=different_only)
    if spec.nce:
        losses, _ = contrast_per_sample(embeddings, scale, spec, chosen, given, how)
        term = mean_over_samples(losses, how)
    if spec.cu and different_only:
        uniformity = _uniformity_of_different(embeddings, scalars.uniformity_t, given, how)
    rest = spec._replace(nce=False, cu=spec.cu and uniformity is None)
    parts = [scalars.weights[0] * term] if term is not None else []
    parts += [scalars.weights[2] * uniformity] if uniformity is not None else []
    if parts and not (rest.atp or rest.cu or needs_all):
        return torch.stack(parts).sum().to(dtype)
    if how.backend == "reference":
        others = by_definition(embeddings, scalars, rest, how.world_size)
    else:
        value, values = ops.loss(embeddings, scalars, rest, how.backend, how.group, how.world_size)
        others = GapLossTerms(value, *values.unbind())
    loss = torch.stack([others.loss.to(scalars.weights.dtype), *parts]).sum().to(dtype)
    if not needs_all:
        return loss
    return GapLossTerms(
        loss,
        None if term is None else term.to(dtype),
        others.align_true_pairs if spec.atp else None,
        uniformity.to(dtype) if uniformity is not None else others.centroid_uniformity if spec.cu else None,
        others.modality_gap.detach(),
        others.true_pair_cosine.detach(),
    )


def agreed_scale(
    embeddings: list[Tensor],
    scalars: Scalars,
    spec: LossSpec,
    chosen: Contrast,
    given: Candidates,
    how: How,
    *,
    different_only: bool = False,
    per_sample: bool = False,
) -> Tensor:
    """The logit scale as ``contrast_per_sample`` takes it, after the processes have compared what they evaluate.

    Raises:
        ValueError: they evaluate different things, or nothing, or the backend takes no group.
    """
    if how.world_size == 1:
        return scalars.logit_scale
    if how.backend == "reference":
        _refuse_group(how.world_size)
    rows, dim = embeddings[0].shape
    inputs = *embeddings, scalars.logit_scale, given.negatives, given.bias
    description = {
        "number of rows": rows,
        "dimension D": dim,
        "number of embeddings": len(embeddings),
        "dtype": DTYPES.index(embeddings[0].dtype),
        **contrast_numbers(chosen, given),
        "uniformity_of_equal_ids": not different_only,
        "reduction": per_sample,
        **spec_numbers(spec),
        NEEDS_GRAD: sum(2**place for place, x in enumerate(inputs) if x is not None and x.requires_grad),
        "group_mode": MODES.index(mode_of(how.group)),
    }
    told = [*scalars] if given.bias is None else [*scalars, given.bias]
    scale = agreed(scalars.logit_scale, told, description, how.group, how.world_size)
    check_rows("embedding 0", embeddings[0])
    return scale


def contrast_per_sample(
    embeddings: list[Tensor], scale: Tensor, spec: LossSpec, chosen: Contrast, given: Candidates, how: How
) -> tuple[Tensor, list[SimilaritySums | None]]:
    """The contrastive term of each own sample ``[n]``, averaged over pairs, and the sums of each pair."""
    device = embeddings[0].device.type
    if given.bias is not None:
        given = given._replace(bias=mean_of_gradients(given.bias, how.group, how.world_size))
    if how.backend == "reference":
        dtype = compute_dtype(embeddings[0].dtype)
        vectors = [contrast.vectors_of(e, how) for e in embeddings]
        negatives = None if given.negatives is None else contrast.vectors_of(given.negatives, how)
        bias = None if given.bias is None else given.bias.to(dtype)
        given = given._replace(negatives=negatives, bias=bias)
    losses: list[Tensor] = []
    sums: list[SimilaritySums | None] = []
    with torch.autocast(device, enabled=False):  # which would round logits
        for m, k in pairs_of(spec, len(embeddings)):
            anchor, other = (k, m) if k == spec.anchor else (m, k)
            if how.backend == "reference":
                result = reference.contrast_per_sample(vectors[anchor], vectors[other], scale.to(dtype), chosen, given)
            else:
                result = contrast.per_sample(embeddings[anchor], embeddings[other], scale, chosen, given, how)
            losses.append(result[0])
            sums.append(result[1])
    return torch.stack(losses).mean(dim=0), sums


def _uniformity_of_different(embeddings: list[Tensor], t: Tensor, given: Candidates, how: How) -> Tensor:
    assert given.ids is not None
    dtype = compute_dtype(embeddings[0].dtype)
    with torch.autocast(embeddings[0].device.type, enabled=False):
        c = reference.centroids([contrast.vectors_of(e, how) for e in embeddings], normalize=True)
        if how.backend == "reference":
            return reference.centroid_uniformity(c, t.to(dtype), given.ids)
        return mean_over_processes(contrast.uniformity_of_different(c, t, given.ids, how), how.group, how.world_size)


def mean_over_samples(losses: Tensor, how: How) -> Tensor:
    return mean_over_processes(losses.mean(), how.group, how.world_size)


def by_definition(embeddings: list[Tensor], scalars: Scalars, spec: LossSpec, world_size: int) -> GapLossTerms:
    """All terms from ``gapkernels.backends.reference``."""
    _refuse_group(world_size)
    dtype = compute_dtype(embeddings[0].dtype)
    embeddings = [e.to(dtype) for e in embeddings]
    with torch.autocast(embeddings[0].device.type, enabled=False):  # which would round the cosines
        terms = reference.loss_terms(embeddings, Scalars(*(number.to(dtype) for number in scalars)), spec)
        loss = reference.total(terms, scalars.weights.to(dtype), embeddings)
        return GapLossTerms(loss, *terms, *reference.diagnostics(embeddings))


def _refuse_group(world_size: int) -> None:
    if world_size > 1:
        raise ValueError('`group` is not supported by backend="reference"; gather the embeddings first')
