"""The loss as modules: the functions with their options kept, and a temperature that can be learned."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gapkernels import functional

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_LOGIT_SCALE = 100.0  # "clipped to prevent scaling the logits by more than 100": CLIP, arXiv 2103.00020, section 2.5


class _Temperature(nn.Module):
    """A temperature, fixed or learned as CLIP does: the parameter is the logarithm of its inverse."""

    def __init__(self, temperature: float, learn: bool) -> None:
        super().__init__()
        self._initial = functional._check_number("temperature", temperature, positive=True)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(self._initial))) if learn else None

    def forward(self) -> float | Tensor:
        """The logit scale: a number if fixed, a differentiable 0-dim tensor if learned."""
        if self.log_scale is None:
            return 1 / self._initial
        with torch.no_grad():  # the parameter itself, as CLIP does: a clamped output alone would leave no way back
            self.log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        return self.log_scale.exp()

    def extra_repr(self) -> str:
        return f"{self._initial}, learned={self.log_scale is not None}"


class GapLoss(nn.Module):
    """Contrastive loss that closes the modality gap, :func:`gapkernels.gap_loss` as a module.

    Args:
        temperature: of InfoNCE; the initial value if it is learned.
        learn_temperature: make it a parameter (``temperature.log_scale``), with CLIP's clamp at scale 100.
        anchor, pairs, nce_weight, atp_weight, cu_weight, uniformity_t, normalize, normalize_centroids, backend, group:
            as for the function. The weights are plain attributes: a schedule may assign them between steps.

    Raises:
        TypeError, ValueError: as for the function.

    Example:
        >>> loss = GapLoss(temperature=0.07)
        >>> image, text = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
        >>> loss(image, text).backward()
    """

    def __init__(
        self,
        temperature: float = functional.DEFAULT_TEMPERATURE,
        *,
        learn_temperature: bool = False,
        anchor: int = 0,
        pairs: str = "anchor",
        nce_weight: float = 1.0,
        atp_weight: float = 1.0,
        cu_weight: float = 1.0,
        uniformity_t: float = 2.0,
        normalize: bool = True,
        normalize_centroids: bool = True,
        backend: str = "auto",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.temperature = _Temperature(temperature, learn_temperature)
        self.anchor = anchor
        self.pairs = pairs
        self.nce_weight = nce_weight
        self.atp_weight = atp_weight
        self.cu_weight = cu_weight
        self.uniformity_t = uniformity_t
        self.normalize = normalize
        self.normalize_centroids = normalize_centroids
        self.backend = backend
        self.group = group

    def forward(self, *embeddings: Tensor, return_terms: bool = False) -> Tensor | functional.GapLossTerms:
        """The loss of two or more ``[N, D]`` embeddings, or all its terms."""
        return functional.gap_loss(
            *embeddings,
            return_terms=return_terms,
            logit_scale=self.temperature(),
            anchor=self.anchor,
            pairs=self.pairs,
            nce_weight=self.nce_weight,
            atp_weight=self.atp_weight,
            cu_weight=self.cu_weight,
            uniformity_t=self.uniformity_t,
            normalize=self.normalize,
            normalize_centroids=self.normalize_centroids,
            backend=self.backend,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"anchor={self.anchor}, pairs={self.pairs!r}, nce_weight={self.nce_weight}, "
            f"atp_weight={self.atp_weight}, cu_weight={self.cu_weight}"
        )


class InfoNCELoss(GapLoss):
    """Symmetric InfoNCE, :func:`gapkernels.info_nce` as a module; options as :class:`GapLoss`.

    Example:
        >>> loss = InfoNCELoss(learn_temperature=True)
        >>> sorted(name for name, _ in loss.named_parameters())
        ['temperature.log_scale']
    """

    def __init__(
        self,
        temperature: float = functional.DEFAULT_TEMPERATURE,
        *,
        learn_temperature: bool = False,
        anchor: int = 0,
        pairs: str = "anchor",
        normalize: bool = True,
        backend: str = "auto",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            temperature,
            learn_temperature=learn_temperature,
            anchor=anchor,
            pairs=pairs,
            atp_weight=0.0,
            cu_weight=0.0,
            normalize=normalize,
            backend=backend,
            group=group,
        )


class AlignTruePairsLoss(GapLoss):
    """Mean squared distance of true pairs, :func:`gapkernels.align_true_pairs` as a module.

    Example:
        >>> AlignTruePairsLoss()(torch.eye(3), -torch.eye(3)).item()
        4.0
    """

    def __init__(
        self, *, anchor: int = 0, normalize: bool = True, backend: str = "auto", group: ProcessGroup | None = None
    ) -> None:
        super().__init__(
            anchor=anchor, nce_weight=0.0, cu_weight=0.0, normalize=normalize, backend=backend, group=group
        )


class CentroidUniformityLoss(GapLoss):
    """Uniformity of centroids, :func:`gapkernels.centroid_uniformity` as a module; options as :class:`GapLoss`.

    Example:
        >>> round(CentroidUniformityLoss()(torch.eye(3), torch.eye(3)).item(), 6)
        -4.0
    """

    def __init__(
        self,
        *,
        uniformity_t: float = 2.0,
        normalize: bool = True,
        normalize_centroids: bool = True,
        backend: str = "auto",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            nce_weight=0.0,
            atp_weight=0.0,
            uniformity_t=uniformity_t,
            normalize=normalize,
            normalize_centroids=normalize_centroids,
            backend=backend,
            group=group,
        )
