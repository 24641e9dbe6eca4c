"""What is to be computed: the settings of one loss evaluation, independent of how any backend computes it."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple


class LossSpec(NamedTuple):
    """Settings of the loss ``w_nce·InfoNCE + w_atp·ATP + w_cu·CU`` that are fixed when it is compiled.

    A term that is off is neither computed nor differentiated. What may change from step to step, the weights, the
    logit scale and the sharpness t, travels as tensors instead (``gapkernels.backends.contract.Scalars``). Field
    order is the argument order of the registered operators (see ``gapkernels.ops``).
    """

    anchor: int = 0
    all_pairs: bool = False
    nce: bool = True
    atp: bool = True
    cu: bool = True
    normalize: bool = True
    normalize_centroids: bool = True

    def anchor_pairs(self, num_modalities: int) -> list[tuple[int, int]]:
        """The pairs ``(m, anchor)`` that ATP always runs over."""
        return [(m, self.anchor) for m in range(num_modalities) if m != self.anchor]

    def nce_pairs(self, num_modalities: int) -> list[tuple[int, int]]:
        """The pairs ``(row modality, column modality)`` whose InfoNCE is averaged; none where it is off."""
        if not self.nce:
            return []
        return unordered_pairs(num_modalities) if self.all_pairs else self.anchor_pairs(num_modalities)


def unordered_pairs(num_modalities: int) -> list[tuple[int, int]]:
    """All pairs of different modalities, each once."""
    return list(combinations(range(num_modalities), 2))
