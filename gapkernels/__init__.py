"""Exact, memory-light losses for multimodal contrastive training that closes the modality gap."""

from gapkernels.functional import GapLossTerms, align_true_pairs, centroid_uniformity, gap_loss, info_nce
from gapkernels.gradient_cache import GradientCache
from gapkernels.modules import AlignTruePairsLoss, CentroidUniformityLoss, GapLoss, InfoNCELoss

__version__ = "0.1.0"

__all__ = [
    "AlignTruePairsLoss",
    "CentroidUniformityLoss",
    "GapLoss",
    "GapLossTerms",
    "GradientCache",
    "InfoNCELoss",
    "align_true_pairs",
    "centroid_uniformity",
    "gap_loss",
    "info_nce",
]
