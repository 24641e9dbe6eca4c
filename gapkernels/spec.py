"""What is to be computed: the settings of one loss evaluation, independent of how any backend computes it."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Pairs = tuple[tuple[int, int], ...]

KEPT_SIMILARITY_BYTES = 32 * 2**20
"""Similarities up to this size are kept for the backward pass where the caller does not say."""


class LossSpec(NamedTuple):
    """Settings of the loss ``w_nce·InfoNCE + w_atp·ATP + w_cu·CU`` that are fixed when it is compiled.

    A term that is off is neither computed nor differentiated. What may change from step to step, the weights, the
    logit scale and the sharpness t, travels as tensors instead (``gapkernels.backends.contract.Scalars``). Field
    order is the argument order of the registered operators (see ``gapkernels.ops``).

    ``kept_bytes`` is how much of the similarities of the forward pass, N² a pair, may be kept for the backward pass.
    """

    anchor: int = 0
    all_pairs: bool = False
    nce: bool = True
    atp: bool = True
    cu: bool = True
    normalize: bool = True
    normalize_centroids: bool = True
    kept_bytes: int = KEPT_SIMILARITY_BYTES

    @cache  # noqa: B019 (settings are few, and asked for these several times a step)
    def anchor_pairs(self, num_modalities: int) -> Pairs:
        """The pairs ``(m, anchor)`` that ATP always runs over."""
        return _pairs_with(self.anchor, num_modalities)

    @cache  # noqa: B019
    def nce_pairs(self, num_modalities: int) -> Pairs:
        """The pairs ``(row modality, column modality)`` whose InfoNCE is averaged; none where it is off."""
        return pairs_of(self, num_modalities)


class Contrast(NamedTuple):
    """What the contrastive term is, besides its scale.

    Attributes:
        sigmoid: pairs are classified one by one (SigLIP, arXiv 2303.15343) instead of by soft-max.
        from_anchor, to_anchor: weights of the two directions; zero is not computed.
        same_anchor, same_other: rows of the anchor, or of the other modality, are negatives of each other.
        joint: one denominator per sample for everything, instead of one for each direction.
        decoupled: the positive is not in the denominator (arXiv 2110.06848).
        label_smoothing: share of the target that is spread evenly over all candidates.
        equal_are_positive: samples of equal ids are each other's positives, not merely no negatives.
        margin: candidates that exceed the positive's cosine by more are left out; None for none.
    """

    sigmoid: bool = False
    from_anchor: float = 0.5
    to_anchor: float = 0.5
    same_anchor: bool = False
    same_other: bool = False
    joint: bool = False
    decoupled: bool = False
    label_smoothing: float = 0.0
    equal_are_positive: bool = False
    margin: float | None = None


class Candidates(NamedTuple):
    """Tensors that come with the options.

    Attributes:
        ids: ``[n]`` int64 of the samples, or None.
        negatives: ``[K, D]`` that every anchor row sees, ``[n, K, D]`` own to each, or None.
        negative_ids: ``[K]`` int64, or None.
        bias: 0-dim, the logit bias of the sigmoid loss, or None.
    """

    ids: Tensor | None = None
    negatives: Tensor | None = None
    negative_ids: Tensor | None = None
    bias: Tensor | None = None


def contrast_numbers(contrast: Contrast, given: Candidates) -> dict[str, float]:
    """What processes must agree on of a contrast, by the names of its options."""
    negatives = given.negatives
    return {
        "contrast": contrast.sigmoid,
        "directions (weight from the anchor)": contrast.from_anchor,
        "directions (weight to the anchor)": contrast.to_anchor,
        "same_side (of the anchor)": contrast.same_anchor,
        "same_side (of the other)": contrast.same_other,
        "partition": contrast.joint,
        "decoupled": contrast.decoupled,
        "label_smoothing": contrast.label_smoothing,
        "duplicates": contrast.equal_are_positive,
        "false_negative_margin": -1.0 if contrast.margin is None else contrast.margin,
        "presence of ids": given.ids is not None,
        "presence of negative_ids": given.negative_ids is not None,
        "number of negatives": 0 if negatives is None else negatives.shape[-2],
        "dimensions of negatives": 0 if negatives is None else negatives.dim(),
    }


class SimilaritySums(NamedTuple):
    """Natural logarithms of sums of exponentials of logits, positives left out. Differentiable, in float64.

    Attributes:
        rows: ``[n]``, over the candidates of each row; −∞ where there are none.
        cols: ``[k]``, over the rows that a column is a candidate of.
        positives: ``[n]``, logits of matching rows and columns; ``[0]`` if they do not match.
    """

    rows: Tensor
    cols: Tensor
    positives: Tensor


def pairs_of(spec: LossSpec, num_modalities: int) -> Pairs:
    """``LossSpec.nce_pairs`` without its cache, which torch.compile does not look through."""
    if not spec.nce:
        return ()
    if spec.all_pairs:
        return tuple(combinations(range(num_modalities), 2))
    return _pairs_with(spec.anchor, num_modalities)


def _pairs_with(anchor: int, num_modalities: int) -> Pairs:
    return tuple((m, anchor) for m in range(num_modalities) if m != anchor)


@cache
def unordered_pairs(num_modalities: int) -> Pairs:
    """All pairs of different modalities, each once."""
    return tuple(combinations(range(num_modalities), 2))
