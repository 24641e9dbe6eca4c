"""Exact, memory-light losses for multimodal contrastive training that closes the modality gap."""

from gapkernels.functional import (
    GapLossTerms,
    align_true_pairs,
    centroid_uniformity,
    gap_loss,
    info_nce,
    sigmoid_loss,
)
from gapkernels.gradient_cache import GradientCache
from gapkernels.memory_bank import MemoryBank
from gapkernels.modules import AlignTruePairsLoss, CentroidUniformityLoss, GapLoss, InfoNCELoss, SigmoidLoss
from gapkernels.options import ContrastOptions
from gapkernels.similarity import similarity_logsumexp, similarity_softplus
from gapkernels.spec import SimilaritySums

__version__ = "0.1.0"

__all__ = [
    "AlignTruePairsLoss",
    "CentroidUniformityLoss",
    "ContrastOptions",
    "GapLoss",
    "GapLossTerms",
    "GradientCache",
    "InfoNCELoss",
    "MemoryBank",
    "SigmoidLoss",
    "SimilaritySums",
    "align_true_pairs",
    "centroid_uniformity",
    "gap_loss",
    "info_nce",
    "sigmoid_loss",
    "similarity_logsumexp",
    "similarity_softplus",
]
