"""Measures of a multimodal embedding space: modality gap, retrieval, clustering and classification.

Every rate (recall, V-measure, accuracy, ...) is a fraction in [0, 1], not a percentage. Embeddings may have any
floating dtype and live on any device; they are normalised here and all similarities are computed in float64.
"""

from gapkernels.metrics.geometry import (
    distribution_gap,
    modality_gap,
    true_pair_cosine,
    uniformity,
    within_modality_cosine,
)
from gapkernels.metrics.grouping import ClusteringResult, clustering, knn_accuracy, linear_probe
from gapkernels.metrics.ranking import DirectionResult, RetrievalResult, retrieval
from gapkernels.metrics.summary import evaluate

__all__ = [
    "ClusteringResult",
    "DirectionResult",
    "RetrievalResult",
    "clustering",
    "distribution_gap",
    "evaluate",
    "knn_accuracy",
    "linear_probe",
    "modality_gap",
    "retrieval",
    "true_pair_cosine",
    "uniformity",
    "within_modality_cosine",
]
