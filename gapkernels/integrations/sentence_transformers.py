"""sentence-transformers' in-batch-negatives loss in both directions, computed here.

    from gapkernels.integrations.sentence_transformers import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(
        model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()

The library's default is one direction only, which is another loss; it and hard-negative columns are refused here. The
same loss without the two options is ``MultipleNegativesSymmetricRankingLoss``, a name the library has deprecated.

Signature and behaviour: ``sentence_transformers.sentence_transformer.losses``, version 6.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from gapkernels.functional import gap_loss
from gapkernels.integrations._shared import centroid_weight, replaced_class

__all__ = ["MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss"]

_LOSSES = "sentence_transformers.sentence_transformer.losses"
_BOTH_DIRECTIONS = ("query_to_doc", "doc_to_query")
_CITATION = """
@inproceedings{grassucci2026closing,
    title = {Closing the Modality Gap Aligns Group-Wise Semantics},
    author = {Grassucci, Eleonora and Cicchetti, Giordano and Frasca, Emanuele and Uncini, Aurelio and
              Comminiello, Danilo},
    booktitle = {International Conference on Learning Representations},
    year = {2026},
    eprint = {2601.18525},
    archivePrefix = {arXiv},
}
"""

Similarity = Callable[[Tensor, Tensor], Tensor]


class MultipleNegativesRankingLoss(replaced_class(_LOSSES, "MultipleNegativesRankingLoss")):  # type: ignore[misc]
    """Drop-in for the class of this name in both directions: InfoNCE of (anchor, positive) pairs, in O(N·D) memory.

    Where sentence-transformers is installed it is a subclass of that class. With weights for the other two terms it is
    the paper's loss, where anchors and positives are the modalities. All options are attributes, read at every call:
    a schedule may assign them. In a batch of one pair, which the last of an epoch may be, InfoNCE is zero and the
    centroid uniformity is left out with one warning.

    Args:
        model: the SentenceTransformer; any module that maps features to a dictionary with ``"sentence_embedding"``.
        scale: logit scale, 1/temperature.
        similarity_fct: None or sentence-transformers' ``cos_sim`` for cosines, its ``dot_score`` for inner products.
        gather_across_devices: take the batch of all processes of ``torch.distributed`` (each an equal number of
            pairs); every process then returns its loss, while the library's returns that of its own pairs. Under
            DistributedDataParallel the gradients are the same.
        directions: must be given as ``("query_to_doc", "doc_to_query")``; the library's default is refused.
        partition_mode: must be given as ``"per_direction"``.
        hardness_mode, hardness_strength: None and anything; other modes are refused.
        atp_weight, cu_weight, uniformity_t, backend: as for ``gapkernels.gap_loss``.

    Raises:
        ValueError: a scale that is not positive, or a loss that is not computed here.

    Examples:
        >>> loss = MultipleNegativesRankingLoss(
        ...     nn.Identity(), 100.0, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        ... )
        >>> loss([{"sentence_embedding": torch.eye(4)}, {"sentence_embedding": 2 * torch.eye(4)}]).item() < 1e-6
        True
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Similarity | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        atp_weight: float | Tensor = 0.0,
        cu_weight: float | Tensor = 0.0,
        uniformity_t: float | Tensor = 2.0,
        backend: str = "auto",
    ) -> None:
        nn.Module.__init__(self)  # the library's sets the same attributes, and versions differ in what they accept
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        self.atp_weight = atp_weight
        self.cu_weight = cu_weight
        self.uniformity_t = uniformity_t
        self.backend = backend
        self._check_options()

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Encode the two columns and return the loss, 0-dim; `labels` are not needed."""
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """Return the loss of embeddings ``[N, D]`` of anchors and positives.

        Raises:
            ValueError: another number of columns, or an option that was assigned since and is not computed here.
        """
        if len(embeddings) != 2:
            raise ValueError(
                f"the data must have two columns, anchors and positives, got {len(embeddings)}: hard negatives are not "
                f"computed here; remove their columns (dataset.select_columns), or train {_LOSSES}."
                "MultipleNegativesRankingLoss, which takes them"
            )
        self._check_options()
        processes = dist.get_world_size() if self._group() and dist.is_available() and dist.is_initialized() else 1
        return gap_loss(
            *embeddings,
            logit_scale=self.scale,
            atp_weight=self.atp_weight,
            cu_weight=centroid_weight(self, self.cu_weight, len(embeddings[0]) * processes),
            uniformity_t=self.uniformity_t,
            normalize=_similarity_name(self.similarity_fct) == "cos_sim",
            backend=self.backend,
            group=self._group(),
        )

    @property
    def temperature(self) -> float:
        return 1 / self.scale

    @property
    def citation(self) -> str:
        """BibTeX for model cards: what the library cites for this loss, and the paper of the other two terms."""
        return getattr(super(), "citation", "") + _CITATION

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, as model cards show them."""
        return {
            "scale": float(self.scale),
            "similarity_fct": _similarity_name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
            "atp_weight": float(self.atp_weight),
            "cu_weight": float(self.cu_weight),
            "uniformity_t": float(self.uniformity_t),
        }

    def _group(self) -> str | None:
        return "world" if self.gather_across_devices else None

    def _check_options(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"`scale` must be positive, got {self.scale}")
        _similarity_name(self.similarity_fct)
        instead = f"; train {_LOSSES}.MultipleNegativesRankingLoss for the others"
        if {*self.directions} != {*_BOTH_DIRECTIONS} or self.partition_mode != "per_direction":
            raise ValueError(
                f"`directions` must be {_BOTH_DIRECTIONS} and `partition_mode` 'per_direction', the combination that "
                f"is computed here, got {tuple(self.directions)} and {self.partition_mode!r}{instead}"
            )
        if self.hardness_mode is not None:
            raise ValueError(f"`hardness_mode` must be None, got {self.hardness_mode!r}{instead}")


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # to derive from a deprecated class warns as using it does

    class MultipleNegativesSymmetricRankingLoss(
        MultipleNegativesRankingLoss,
        replaced_class(_LOSSES, "MultipleNegativesSymmetricRankingLoss"),  # type: ignore[misc]
    ):
        """Drop-in for the class of this name: ``MultipleNegativesRankingLoss`` with its two options set.

        Args:
            model, scale, similarity_fct, gather_across_devices, atp_weight, cu_weight, uniformity_t, backend: as there.

        Examples:
            >>> loss = MultipleNegativesSymmetricRankingLoss(nn.Identity(), scale=100.0)
            >>> loss([{"sentence_embedding": torch.eye(4)}, {"sentence_embedding": 2 * torch.eye(4)}]).item() < 1e-6
            True
        """

        def __init__(
            self,
            model: nn.Module,
            scale: float = 20.0,
            similarity_fct: Similarity | None = None,
            gather_across_devices: bool = False,
            **options: Any,
        ) -> None:
            super().__init__(
                model,
                scale,
                similarity_fct,
                gather_across_devices,
                directions=_BOTH_DIRECTIONS,
                partition_mode="per_direction",
                **options,
            )


def _similarity_name(function: Similarity | None) -> str:
    if function is None:
        return "cos_sim"
    name = getattr(function, "__name__", repr(function))
    if name not in ("cos_sim", "dot_score") or "sentence_transformers" not in getattr(function, "__module__", ""):
        raise ValueError(
            f"`similarity_fct` must be None or sentence_transformers.util's cos_sim or dot_score, got {name}"
        )
    return name
