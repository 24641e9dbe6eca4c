"""What is to be computed: the settings of one loss evaluation, independent of how any backend computes it."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple


class LossSpec(NamedTuple):
    """Settings of the loss ``nce_weight·InfoNCE + atp_weight·ATP + cu_weight·CU``.

    A term whose weight is zero is neither computed nor differentiated. Field order is the argument order of the
    registered operators (see :mod:`gapkernels.ops`), so the specification travels as plain scalars.
    """

    anchor: int = 0
    all_pairs: bool = False
    nce_weight: float = 1.0
    atp_weight: float = 1.0
    cu_weight: float = 1.0
    uniformity_t: float = 2.0
    normalize: bool = True
    normalize_centroids: bool = True

    def anchor_pairs(self, num_modalities: int) -> list[tuple[int, int]]:
        """The pairs ``(m, anchor)`` that ATP always runs over."""
        return [(m, self.anchor) for m in range(num_modalities) if m != self.anchor]

    def nce_pairs(self, num_modalities: int) -> list[tuple[int, int]]:
        """The pairs ``(row modality, column modality)`` whose InfoNCE is averaged."""
        return unordered_pairs(num_modalities) if self.all_pairs else self.anchor_pairs(num_modalities)


def unordered_pairs(num_modalities: int) -> list[tuple[int, int]]:
    """All pairs of different modalities, each once."""
    return list(combinations(range(num_modalities), 2))
