"""Exact, memory-light losses for multimodal contrastive training that closes the modality gap."""

from gapkernels.functional import GapLossTerms, align_true_pairs, centroid_uniformity, gap_loss, info_nce
from gapkernels.modules import AlignTruePairsLoss, CentroidUniformityLoss, GapLoss, InfoNCELoss

__version__ = "0.1.0"

__all__ = [
    "AlignTruePairsLoss",
    "CentroidUniformityLoss",
    "GapLoss",
    "GapLossTerms",
    "InfoNCELoss",
    "align_true_pairs",
    "centroid_uniformity",
    "gap_loss",
    "info_nce",
]
