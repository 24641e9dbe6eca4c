"""What is to be computed: the settings of one loss evaluation, independent of how any backend computes it."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import NamedTuple

Pairs = tuple[tuple[int, int], ...]


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

    @cache  # noqa: B019 (settings are few, and asked for these several times a step)
    def anchor_pairs(self, num_modalities: int) -> Pairs:
        """The pairs ``(m, anchor)`` that ATP always runs over."""
        return tuple((m, self.anchor) for m in range(num_modalities) if m != self.anchor)

    @cache  # noqa: B019
    def nce_pairs(self, num_modalities: int) -> Pairs:
        """The pairs ``(row modality, column modality)`` whose InfoNCE is averaged; none where it is off."""
        if not self.nce:
            return ()
        return unordered_pairs(num_modalities) if self.all_pairs else self.anchor_pairs(num_modalities)


@cache
def unordered_pairs(num_modalities: int) -> Pairs:
    """All pairs of different modalities, each once."""
    return tuple(combinations(range(num_modalities), 2))
