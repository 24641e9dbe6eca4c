"""Images that lose what lies outside their first principal components, so that they do not tell everything."""

from typing import NamedTuple

import torch
from torch import Tensor


class Basis(NamedTuple):
    """Mean image [P] and the principal directions that are kept [P, k]."""

    mean: Tensor
    directions: Tensor


def principal_components(images: Tensor, energy: float) -> Basis:
    """Return the fewest principal components that hold the share `energy` of the images' variance."""
    pixels = images.flatten(1)
    mean = pixels.mean(dim=0)
    variances, directions = torch.linalg.eigh((pixels - mean).T.double() @ (pixels - mean).double())
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    share = variances.cumsum(0) / variances.sum()
    # A rounding error in the last share must not ask for a component that does not exist.
    count = min(int((share < energy - 1e-12).sum()) + 1, len(share))
    return Basis(mean, directions[:, :count].float())


def reduce_to(images: Tensor, basis: Basis) -> Tensor:
    """Project images onto the components."""
    coefficients = (images.flatten(1) - basis.mean) @ basis.directions
    return (coefficients @ basis.directions.T + basis.mean).view_as(images)
