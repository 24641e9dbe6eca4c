"""The loss functions of the authors' training script (the public repository ispamm/ModGap), computed here.

One line below the script's own import replaces them, the rest of the script stays:

    from losses import *
    from gapkernels.integrations.modgap import *

Same names, arguments and values; no N×N matrix and no N(N−1)/2 distances. A batch whose terms are all wanted is
evaluated faster by one call of ``gapkernels.gap_loss``, which shares work between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gapkernels.functional import align_true_pairs, centroid_uniformity, info_nce

__all__ = ["ClipLoss", "contrastive_loss", "lalign_loss", "lunif_loss"]


class ClipLoss(nn.Module):
    """InfoNCE of rows normalised here.

    Args:
        temperature: a number, or a parameter to learn it.
    """

    def __init__(self, temperature: float | Tensor = 0.07) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Args: ``[N, D]`` each, any floating type. Returns: a 0-dim tensor."""
        return info_nce(image_features, text_features, temperature=self.temperature)


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """InfoNCE of rows as they are.

    Args:
        image_embeds, text_embeds: ``[N, D]``, any floating type.
        temperature: a number or a tensor of one element, which may require gradient.

    Examples:
        >>> contrastive_loss(torch.eye(4), torch.eye(4), temperature=0.01).item() < 1e-6
        True
    """
    return info_nce(image_embeds, text_embeds, temperature=temperature, normalize=False)


def lunif_loss(x: Tensor, t: float = 2) -> Tensor:
    """Logarithm of the mean of exp(−t‖x_i − x_j‖²) over the pairs of rows, as they are.

    Args:
        x: ``[N, D]`` with N ≥ 2, any floating type.
        t: sharpness.

    Examples:
        >>> round(lunif_loss(torch.eye(3)).item(), 6)
        -4.0
    """
    # The centroid of two equal modalities is either of them.
    return centroid_uniformity(x, x, uniformity_t=t, normalize=False, normalize_centroids=False)


def lalign_loss(x: Tensor, y: Tensor, alpha: float = 2) -> Tensor:
    """Mean of ‖x_i − y_i‖^alpha over the rows, as they are.

    Args:
        x, y: ``[N, D]``, any floating type.
        alpha: power; 2 in the paper.

    Examples:
        >>> lalign_loss(torch.eye(3), -torch.eye(3)).item()
        4.0
    """
    if alpha == 2:
        return align_true_pairs(x, y, normalize=False)
    return torch.linalg.vector_norm(x - y, dim=1).pow(alpha).mean()
