"""sentence-transformers' in-batch-negatives losses, computed here.

    from gapkernels.integrations.sentence_transformers import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, train_dataset=pairs_or_triplets, loss=loss).train()

``CachedMultipleNegativesRankingLoss`` caches gradients, ``MultipleNegativesSymmetricRankingLoss`` is a name the library
has deprecated for two options of the first.

Signature and behaviour: ``sentence_transformers.sentence_transformer.losses``, version 6.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gapkernels.backends.contract import compute_dtype
from gapkernels.collectives import mean_over_processes
from gapkernels.distributed import group_name_and_size
from gapkernels.functional import gap_loss
from gapkernels.integrations._shared import replaced_class
from gapkernels.modules import centroid_weight, is_on
from gapkernels.similarity import similarity_logsumexp

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]

_LOSSES = "sentence_transformers.sentence_transformer.losses"
_BOTH_DIRECTIONS = ("query_to_doc", "doc_to_query")
_DIRECTIONS = (*_BOTH_DIRECTIONS, "query_to_query", "doc_to_doc")
_PARTITION_MODES = ("joint", "per_direction")
_HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
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
    """Drop-in for the class of this name: in-batch negatives and hard negatives, in O(N·D) memory.

    Where sentence-transformers is installed it is a subclass of that class. Columns are anchors, positives and any
    number of hard negatives. With weights for the other two terms it is the paper's loss, where anchors and positives
    are the modalities. All options are attributes, read at every call: a schedule may assign them. In a batch of one
    pair, which the last of an epoch may be, only hard negatives are left to compare with, and the centroid uniformity
    is left out with one warning.

    Args:
        model: the SentenceTransformer; any module that maps features to a dictionary with ``"sentence_embedding"``.
        scale: logit scale, 1/temperature.
        similarity_fct: None or sentence-transformers' ``cos_sim`` for cosines, its ``dot_score`` for inner products.
            Others are refused: only of inner products is a sum over all pairs computed without storing each.
        gather_across_devices: take the batch of all processes of ``torch.distributed`` (each an equal number of
            pairs); every process then returns its loss, while the library's returns that of its own pairs. Under
            DistributedDataParallel the gradients are the same.
        directions: what a pair is compared with: ``"query_to_doc"`` (always), ``"doc_to_query"``, ``"query_to_query"``,
            ``"doc_to_doc"``.
        partition_mode: ``"joint"``, one soft-max over all directions, or ``"per_direction"``, the mean of one for each.
        hardness_mode: which negatives' logits are raised by ``hardness_strength`` times their similarity, through which
            no gradient flows: None, ``"in_batch_negatives"``, ``"hard_negatives"`` or ``"all_negatives"``.
        hardness_strength: not negative.
        atp_weight, cu_weight, uniformity_t, backend, group_mode: as for ``gapkernels.gap_loss``.

    Raises:
        ValueError: an option out of its range, options that contradict each other, or another similarity.

    Examples:
        >>> loss = MultipleNegativesRankingLoss(nn.Identity(), scale=100.0)
        >>> anchors, negatives = {"sentence_embedding": torch.eye(4)}, {"sentence_embedding": -torch.eye(4)}
        >>> loss([anchors, {"sentence_embedding": 2 * torch.eye(4)}, negatives]).item() < 1e-6
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
        group_mode: str = "auto",
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
        self.group_mode = group_mode
        self._check_options()

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Encode the columns and return the loss, 0-dim; `labels` are not needed."""
        return self.compute_loss_from_embeddings(_embed(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """Return the loss of embeddings ``[N, D]`` of anchors, positives and any number of hard negatives.

        Raises:
            ValueError: fewer than two columns, or an option that was assigned since and is out of its range.
        """
        if len(embeddings) < 2:
            raise ValueError(f"the data must have columns of anchors and positives, got {len(embeddings)} column(s)")
        self._check_options()
        group = "world" if self.gather_across_devices else None
        _, processes = group_name_and_size(group)
        # Both directions of pairs alone are one term of the fused plan.
        fused = (
            len(embeddings) == 2
            and {*self.directions} == {*_BOTH_DIRECTIONS}
            and self.partition_mode == "per_direction"
            and not self._is_hardened()
        )
        contrast = None if fused else self._contrast(embeddings, group)
        cu_weight = centroid_weight(self, self.cu_weight, len(embeddings[0]) * processes)
        if contrast is not None and not (is_on(self.atp_weight) or is_on(cu_weight)):
            return contrast
        rest = gap_loss(
            *embeddings[:2],
            logit_scale=self.scale,
            nce_weight=1.0 if contrast is None else 0.0,
            atp_weight=self.atp_weight,
            cu_weight=cu_weight,
            uniformity_t=self.uniformity_t,
            normalize=self._is_normalised(),
            backend=self.backend,
            group=group,
            group_mode=self.group_mode,
        )
        return rest if contrast is None else contrast + rest

    def _contrast(self, embeddings: Sequence[Tensor], group: str | None) -> Tensor:
        """The library's term from sums along one similarity matrix at a time.

        For query i, with x_ij its logit with document j, x_ii that of its positive: ln Σ exp(what the directions name)
        − x_ii, where a joint soft-max in both directions counts the positive in each of them.
        """
        queries, positives, *hard_negatives = embeddings
        scale, directions = self.scale, {*self.directions}
        strength = self.hardness_strength if self._is_hardened() else 0.0
        for_others = strength if self.hardness_mode in ("in_batch_negatives", "all_negatives") else 0.0
        for_own = strength if self.hardness_mode in ("hard_negatives", "all_negatives") else 0.0
        log_sums = functools.partial(
            similarity_logsumexp,
            normalize=self._is_normalised(),
            backend=self.backend,
            group=group,
            group_mode=self.group_mode,
        )
        pairs = log_sums(queries, positives, logit_scale=scale)
        positive = pairs.positives

        to_docs = [positive]
        if for_others:
            harder = log_sums(queries, positives, logit_scale=scale + for_others).rows
            to_docs.append(_with_gradient_times(scale / (scale + for_others), harder))
        else:
            to_docs.append(pairs.rows)
        for column in hard_negatives:
            found = log_sums(queries, column, logit_scale=scale + for_others)
            own = found.positives * (scale / (scale + for_others))
            to_docs.append(_with_gradient_times(scale / (scale + for_others), found.rows) if for_others else found.rows)
            to_docs.append(own + for_own / scale * own.detach() if for_own else own)
        to_queries = [positive, pairs.cols] if "doc_to_query" in directions else []

        if self.partition_mode == "joint":
            parts = to_docs + to_queries
            if "query_to_query" in directions:
                parts.append(log_sums(queries, queries, logit_scale=scale).rows)
            if "doc_to_doc" in directions:
                parts += [log_sums(positives, docs, logit_scale=scale).rows for docs in embeddings[1:]]
            log_partition = _log_sum(parts)
        else:
            softmaxes = [_log_sum(parts) for parts in (to_docs, to_queries) if parts]
            log_partition = torch.stack(softmaxes).mean(dim=0)
        loss = mean_over_processes((log_partition - positive).mean(), *group_name_and_size(group))
        return loss.to(compute_dtype(queries.dtype))

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
            **self._terms(),
        }

    def _terms(self) -> dict[str, float]:
        """What the library's loss does not have, where it is on."""
        terms = {"atp_weight": float(self.atp_weight)} if is_on(self.atp_weight) else {}
        if is_on(self.cu_weight):
            terms |= {"cu_weight": float(self.cu_weight), "uniformity_t": float(self.uniformity_t)}
        return terms

    def _is_hardened(self) -> bool:
        return self.hardness_mode is not None and self.hardness_strength > 0

    def _is_normalised(self) -> bool:
        return _similarity_name(self.similarity_fct) == "cos_sim"

    def _check_options(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"Scale must be a positive value, got `scale`={self.scale}")
        _check_similarity(self.similarity_fct)
        unknown = {*self.directions} - {*_DIRECTIONS}
        if unknown or "query_to_doc" not in self.directions:
            raise ValueError(
                f"`directions` must be some of {_DIRECTIONS}, 'query_to_doc' among them, got {self.directions}"
            )
        if self.partition_mode not in _PARTITION_MODES:
            raise ValueError(f"`partition_mode` must be one of {_PARTITION_MODES}, got {self.partition_mode!r}")
        if self.partition_mode == "per_direction" and {*self.directions} - {*_BOTH_DIRECTIONS}:
            raise ValueError(
                f"`partition_mode`='per_direction' and `directions`={self.directions} contradict: 'query_to_query' and "
                "'doc_to_doc' hold no positive; take partition_mode='joint'"
            )
        if self.hardness_mode not in _HARDNESS_MODES:
            raise ValueError(f"`hardness_mode` must be one of {_HARDNESS_MODES}, got {self.hardness_mode!r}")
        if not self.hardness_strength >= 0:
            raise ValueError(f"`hardness_strength` must not be negative, got {self.hardness_strength}")
        if self._is_hardened() and isinstance(self.scale, Tensor) and self.scale.requires_grad:
            raise ValueError(f"`hardness_mode`={self.hardness_mode!r} and a `scale` that requires gradient contradict")


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # to derive from a deprecated class warns as using it does

    class MultipleNegativesSymmetricRankingLoss(
        MultipleNegativesRankingLoss,
        replaced_class(_LOSSES, "MultipleNegativesSymmetricRankingLoss"),  # type: ignore[misc]
    ):
        """Drop-in for the class of this name: ``MultipleNegativesRankingLoss`` with its two options set.

        Args:
            model, scale, similarity_fct, gather_across_devices, atp_weight, cu_weight, uniformity_t, backend,
                group_mode: as there.

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


class CachedMultipleNegativesRankingLoss(
    replaced_class(_LOSSES, "CachedMultipleNegativesRankingLoss")  # type: ignore[misc]
):
    """Drop-in for the class of this name: gradient caching around ``MultipleNegativesRankingLoss``.

    The library's own code encodes the mini-batches twice; the loss between the two passes is computed here, of the
    whole batch at once in O(N·D) memory.

    Args:
        *arguments: those of the library's class.
        atp_weight, cu_weight, uniformity_t, backend, group_mode: as for ``gapkernels.gap_loss``.
        **options: those of the library's class.

    Raises:
        RuntimeError: sentence-transformers is not installed.
        ValueError: as ``MultipleNegativesRankingLoss``.
    """

    def __init__(
        self,
        *arguments: Any,
        atp_weight: float | Tensor = 0.0,
        cu_weight: float | Tensor = 0.0,
        uniformity_t: float | Tensor = 2.0,
        backend: str = "auto",
        group_mode: str = "auto",
        **options: Any,
    ) -> None:
        if CachedMultipleNegativesRankingLoss.__base__ is nn.Module:
            raise RuntimeError("gradient caching is sentence-transformers' own: pip install sentence-transformers")
        super().__init__(*arguments, **options)
        of_pairs: Any = self.loss
        self.loss: MultipleNegativesRankingLoss = MultipleNegativesRankingLoss(
            self.model,
            of_pairs.scale,
            of_pairs.similarity_fct,
            of_pairs.gather_across_devices,
            of_pairs.directions,
            of_pairs.partition_mode,
            of_pairs.hardness_mode,
            of_pairs.hardness_strength,
            atp_weight=atp_weight,
            cu_weight=cu_weight,
            uniformity_t=uniformity_t,
            backend=backend,
            group_mode=group_mode,
        )

    def calculate_loss(
        self, reps: Sequence[Sequence[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of the embeddings of every column's mini-batches, 0-dim.

        Args:
            reps: by column, then by mini-batch, ``[n, D]``.
            labels: not needed.
            with_backward: back-propagate to the embeddings, and return the value alone.
        """
        loss = self.loss.compute_loss_from_embeddings([torch.cat(list(column)) for column in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    @property
    def citation(self) -> str:
        """BibTeX for model cards."""
        return super().citation + _CITATION

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, as model cards show them."""
        return super().get_config_dict() | self.loss.get_config_dict()


def _embed(model: nn.Module, columns: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """Encode every column; in one forward pass where the installed library knows how."""
    try:
        from sentence_transformers.base.losses.merged_forward import embed_columns
    except ImportError:
        return [model(features)["sentence_embedding"] for features in columns]
    return list(embed_columns(model, columns))


def _with_gradient_times(factor: float, log_sum: Tensor) -> Tensor:
    """The value itself with another gradient: similarities that raise a logit are constants in it."""
    fixed = log_sum.detach()
    return torch.where(fixed == -torch.inf, fixed, fixed + (log_sum - fixed) * factor)


def _log_sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).logsumexp(dim=0)


def _similarity_name(function: Similarity | None) -> str:
    if function is None:
        return "cos_sim"
    if isinstance(function, functools.partial) and not (function.args or function.keywords):
        function = function.func
    return getattr(function, "__name__", repr(function))


def _check_similarity(function: Similarity | None) -> None:
    name = _similarity_name(function)
    origin = function.func if isinstance(function, functools.partial) else function
    is_theirs = "sentence_transformers" in getattr(origin, "__module__", "")
    if function is not None and not (is_theirs and name in ("cos_sim", "dot_score")):
        raise ValueError(
            f"`similarity_fct` must be None or sentence_transformers.util's cos_sim or dot_score, got {name}: only of "
            "inner products are all pairs summed without storing each; train the library's own class with it"
        )
