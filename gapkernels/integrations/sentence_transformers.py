"""sentence-transformers' in-batch-negatives loss in both directions, computed here.

    from gapkernels.integrations.sentence_transformers import MultipleNegativesSymmetricRankingLoss

    loss = MultipleNegativesSymmetricRankingLoss(model)
    SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()

Its value is that of the library's class of this name, and of its ``MultipleNegativesRankingLoss`` with
``directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"``, whose default is one direction only:
another loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gapkernels.modules import GapLoss


class MultipleNegativesSymmetricRankingLoss(nn.Module):
    """Drop-in for the class of this name: InfoNCE of (anchor, positive) pairs, in O(N·D) memory.

    With weights for the other two terms it is the paper's loss, where anchors and positives are the modalities.

    Args:
        model: the SentenceTransformer; any module that maps features to a dictionary with ``"sentence_embedding"``.
        scale: logit scale, 1/temperature.
        similarity_fct: None or sentence-transformers' ``cos_sim`` for cosines, its ``dot_score`` for inner products.
        gather_across_devices: take the batch of all processes of ``torch.distributed`` (each an equal number of
            pairs); every process then returns its loss, while the library's returns that of its own pairs. Under
            DistributedDataParallel the gradients are the same.
        atp_weight, cu_weight, uniformity_t, backend: as for ``gapkernels.GapLoss``, which computes the loss
            (attribute ``loss``).

    Raises:
        ValueError: a scale that is not positive, or another similarity.

    Examples:
        >>> loss = MultipleNegativesSymmetricRankingLoss(nn.Identity(), scale=100.0)
        >>> loss([{"sentence_embedding": torch.eye(4)}, {"sentence_embedding": 2 * torch.eye(4)}]).item() < 1e-6
        True
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_across_devices: bool = False,
        *,
        atp_weight: float = 0.0,
        cu_weight: float = 0.0,
        uniformity_t: float = 2.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"`scale` must be positive, got {scale}")
        self.model = model
        self.scale = scale
        self.similarity = _similarity_name(similarity_fct)
        self.gather_across_devices = gather_across_devices
        self.loss = GapLoss(
            1 / scale,
            atp_weight=atp_weight,
            cu_weight=cu_weight,
            uniformity_t=uniformity_t,
            normalize=self.similarity == "cos_sim",
            backend=backend,
        )

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Encode the two columns and return the loss, 0-dim; `labels` are not needed."""
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """Return the loss of embeddings ``[N, D]`` of anchors and positives.

        Raises:
            ValueError: another number of columns: hard negatives have no place in a loss that is symmetric.
        """
        if len(embeddings) != 2:
            raise ValueError(f"the data must have two columns, anchors and positives, got {len(embeddings)}")
        # Often the loss is made before the processes are.
        distributed = self.gather_across_devices and torch.distributed.is_initialized()
        self.loss.group = torch.distributed.group.WORLD if distributed else None
        return self.loss(*embeddings)

    @property
    def temperature(self) -> float:
        return 1 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, as model cards show them."""
        return {
            "scale": self.scale,
            "similarity_fct": self.similarity,
            "gather_across_devices": self.gather_across_devices,
            "atp_weight": self.loss.atp_weight,
            "cu_weight": self.loss.cu_weight,
            "uniformity_t": self.loss.uniformity_t,
        }


def _similarity_name(function: Callable[[Tensor, Tensor], Tensor] | None) -> str:
    if function is None:
        return "cos_sim"
    name = getattr(function, "__name__", repr(function))
    if name not in ("cos_sim", "dot_score") or "sentence_transformers" not in getattr(function, "__module__", ""):
        raise ValueError(
            f"`similarity_fct` must be None or sentence_transformers.util's cos_sim or dot_score, got {name}"
        )
    return name
