"""The loss as modules: the functions with their options kept, and a temperature that can be learned."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gapkernels import functional, options
from gapkernels.checks import DEFAULT_TEMPERATURE, check_number
from gapkernels.distributed import group_name_and_size
from gapkernels.options import ContrastOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

MAX_LOGIT_SCALE = 100.0  # "clipped to prevent scaling the logits by more than 100": CLIP, arXiv 2103.00020, section 2.5


class Temperature(nn.Module):
    """A temperature, fixed or learned as CLIP does: the parameter is the logarithm of its inverse.

    Assigning a number to ``loss.temperature`` sets it, also where it is learned.

    Args:
        temperature: positive.
        learn: make it a parameter, whose scale is clamped at ``MAX_LOGIT_SCALE``, or where it starts if
            that is more.

    Raises:
        TypeError, ValueError: the temperature is no such number.
    """

    def __init__(self, temperature: float, learn: bool) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(1)) if learn else None  # one dimension: FSDP refuses none
        self.set(temperature)

    def set(self, temperature: float) -> None:
        """Set the temperature; where it is learned, the value training goes on from."""
        self._value = check_number("temperature", temperature, positive=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameter to the value last given."""
        if self.log_scale is not None:
            with torch.no_grad():
                self.log_scale.fill_(-math.log(self._value))

    def forward(self) -> float | Tensor:
        """The logit scale: a number if fixed, a differentiable 0-dim tensor if learned."""
        if self.log_scale is None:
            return 1 / self._value
        # Clamped in value only: the gradient passes, so that a parameter beyond the bound finds the way back.
        largest = max(MAX_LOGIT_SCALE, 1 / self._value)
        excess = (self.log_scale - math.log(largest)).clamp_min(0).detach()
        return (self.log_scale - excess).exp().reshape(())

    def __float__(self) -> float:
        scale = self()
        return 1 / (scale.item() if isinstance(scale, Tensor) else scale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        saved = state_dict.get(f"{prefix}log_scale")
        if isinstance(saved, Tensor) and saved.dim() == 0:  # as it was saved up to version 0.1
            state_dict[f"{prefix}log_scale"] = saved.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"{float(self):g}, learned={self.log_scale is not None}" if self._readable() else "learned=True"

    def _readable(self) -> bool:
        return self.log_scale is None or (self.log_scale.device.type != "meta" and type(self.log_scale) is nn.Parameter)


class _Group:
    """A process group as a module keeps it: copies of the module share it, and a saved one finds its own again."""

    def __init__(self, group: ProcessGroup | str | None) -> None:
        self.group = group
        self.before_init = group is None and not (dist.is_available() and dist.is_initialized())

    def resolved(self) -> ProcessGroup | str | None:
        """The group to use now."""
        if self.before_init and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                "this loss was built with group=None before torch.distributed.init_process_group (dist.group.WORLD is "
                'None until then) and takes the rows of this process alone; pass group="world" to take those of all '
                "processes, or build it with group=None afterwards if that is meant",
                stacklevel=3,
            )
            self.before_init = False
        return self.group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is None or isinstance(self.group, str):
            return _Group, (self.group,)
        if self.group == dist.group.WORLD:
            return _Group, ("world",)
        return _group_by_name, (self.group.group_name,)


def _group_by_name(name: str) -> _Group:
    try:
        return _Group(dist.distributed_c10d._resolve_process_group(name))  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(
            f"this loss was saved with the process group {name!r}, which does not exist here; create it before loading "
            '(torch.distributed.new_group), or save the loss with group="world"'
        ) from error


def is_on(weight: float | Tensor) -> bool:
    """Whether a term with this weight is computed."""
    return isinstance(weight, Tensor) or weight != 0


def centroid_weight(loss: nn.Module, cu_weight: float | Tensor, samples: int) -> float | Tensor:
    """The weight of the centroid uniformity in a batch of so many samples of all processes.

    Trainers keep the last incomplete batch, where one sample may be left. InfoNCE is zero for it; the centroid
    uniformity, a mean over pairs, does not exist. It is left out of that batch, and `loss` warns once.
    """
    if samples > 1 or not is_on(cu_weight):
        return cu_weight
    if not getattr(loss, "_warned_of_one_sample", False):
        loss._warned_of_one_sample = True  # type: ignore[assignment]
        warnings.warn(
            "the batch holds one sample: the centroid uniformity, which is over pairs of samples, is left out of it; "
            "drop the last incomplete batch to avoid that",
            stacklevel=3,
        )
    return 0.0


class GapLoss(nn.Module):
    """Contrastive loss that closes the modality gap, ``gapkernels.gap_loss`` as a module.

    In a batch of one sample, which the last of an epoch may be, the function raises; here InfoNCE is zero and the
    centroid uniformity is left out (zero among the terms) with one warning.

    Args:
        temperature: of InfoNCE; the initial value if it is learned. ``loss.temperature = 0.1`` sets it later.
        learn_temperature: make it a parameter (``temperature.log_scale``), with CLIP's clamp at scale 100.
        anchor, pairs, nce_weight, atp_weight, cu_weight, uniformity_t, normalize, normalize_centroids,
            keep_similarities, backend, group, group_mode: as for the function. The weights are plain attributes: a
            schedule may assign them between steps.
        learn_bias: make the logit bias of the sigmoid a parameter (``logit_bias``).
        **contrast_options: see ``gapkernels.ContrastOptions``; those that change from batch to batch, ids and
            negatives, are given to the call.

    Raises:
        TypeError, ValueError: as for the function.

    Examples:
        >>> loss = GapLoss(temperature=0.07)
        >>> image, text = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
        >>> loss(image, text).backward()
    """

    temperature: Temperature

    def __init__(
        self,
        temperature: float = DEFAULT_TEMPERATURE,
        *,
        learn_temperature: bool = False,
        anchor: int = 0,
        pairs: str = "anchor",
        nce_weight: float | Tensor = 1.0,
        atp_weight: float | Tensor = 1.0,
        cu_weight: float | Tensor = 1.0,
        uniformity_t: float | Tensor = 2.0,
        normalize: bool = True,
        normalize_centroids: bool = True,
        keep_similarities: bool | None = None,
        backend: str = "auto",
        group: ProcessGroup | str | None = None,
        group_mode: str = "auto",
        learn_bias: bool = False,
        **contrast_options: Unpack[ContrastOptions],
    ) -> None:
        super().__init__()
        options.refuse_unknown(f"{type(self).__name__}()", contrast_options)
        self.temperature = Temperature(temperature, learn_temperature)
        self.contrast_options: dict[str, Any] = dict(contrast_options)
        self.logit_bias = None
        if learn_bias:
            if contrast_options.get("contrast") != "sigmoid":
                raise ValueError("`learn_bias`=True needs contrast='sigmoid': a soft-max has no bias")
            start = self.contrast_options.pop("logit_bias", None)
            value = options.DEFAULT_LOGIT_BIAS if start is None else check_number("logit_bias", start)
            self.logit_bias = nn.Parameter(torch.full((1,), value))
        self.anchor = anchor
        self.pairs = pairs
        self.nce_weight = nce_weight
        self.atp_weight = atp_weight
        self.cu_weight = cu_weight
        self.uniformity_t = uniformity_t
        self.normalize = normalize
        self.normalize_centroids = normalize_centroids
        self.keep_similarities = keep_similarities
        self.backend = backend
        self.group = group
        self.group_mode = group_mode

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature" and not isinstance(value, nn.Module):
            self.temperature.set(value)
        else:
            super().__setattr__(name, value)

    @property
    def group(self) -> ProcessGroup | str | None:
        """The processes that hold the batch."""
        return self._group.group

    @group.setter
    def group(self, group: ProcessGroup | str | None) -> None:
        self._group = _Group(group)

    if TYPE_CHECKING:  # nn.Module's own takes anything and returns Any

        @overload
        def __call__(
            self, *embeddings: Tensor, return_terms: Literal[False] = ..., **candidates: Unpack[ContrastOptions]
        ) -> Tensor: ...
        @overload
        def __call__(
            self, *embeddings: Tensor, return_terms: Literal[True], **candidates: Unpack[ContrastOptions]
        ) -> functional.GapLossTerms: ...
        @overload
        def __call__(
            self, *embeddings: Tensor, return_terms: bool, **candidates: Unpack[ContrastOptions]
        ) -> Tensor | functional.GapLossTerms: ...
        def __call__(
            self, *embeddings: Tensor, return_terms: bool = False, **candidates: Unpack[ContrastOptions]
        ) -> Tensor | functional.GapLossTerms: ...

    def forward(
        self, *embeddings: Tensor, return_terms: bool = False, **candidates: Unpack[ContrastOptions]
    ) -> Tensor | functional.GapLossTerms:
        """The loss of two or more ``[N, D]`` embeddings, or all its terms; ``candidates``: ids and negatives."""
        contrast_options = {**self.contrast_options, **candidates}
        if self.logit_bias is not None:
            contrast_options["logit_bias"] = self.logit_bias
        group, cu_weight = self._group.resolved(), self.cu_weight
        if embeddings and isinstance(embeddings[0], Tensor) and embeddings[0].shape[:1] == (1,):
            cu_weight = centroid_weight(self, cu_weight, group_name_and_size(group)[1])
        result = functional.gap_loss(
            *embeddings,
            return_terms=return_terms,
            logit_scale=self.temperature(),
            anchor=self.anchor,
            pairs=self.pairs,
            nce_weight=self.nce_weight,
            atp_weight=self.atp_weight,
            cu_weight=cu_weight,
            uniformity_t=self.uniformity_t,
            normalize=self.normalize,
            normalize_centroids=self.normalize_centroids,
            keep_similarities=self.keep_similarities,
            backend=self.backend,
            group=group,
            group_mode=self.group_mode,
            **contrast_options,
        )
        if isinstance(result, functional.GapLossTerms) and is_on(self.cu_weight) and result.centroid_uniformity is None:
            return result._replace(centroid_uniformity=torch.zeros_like(result.loss))
        return result

    def extra_repr(self) -> str:
        text = (
            f"anchor={self.anchor}, pairs={self.pairs!r}, nce_weight={self.nce_weight}, "
            f"atp_weight={self.atp_weight}, cu_weight={self.cu_weight}"
        )
        return "".join([text, *(f", {name}={value!r}" for name, value in self.contrast_options.items())])


class InfoNCELoss(GapLoss):
    """Symmetric InfoNCE, ``gapkernels.info_nce`` as a module; options as ``GapLoss``.

    Examples:
        >>> loss = InfoNCELoss(learn_temperature=True)
        >>> sorted(name for name, _ in loss.named_parameters())
        ['temperature.log_scale']
    """

    def __init__(
        self,
        temperature: float = DEFAULT_TEMPERATURE,
        *,
        learn_temperature: bool = False,
        anchor: int = 0,
        pairs: str = "anchor",
        normalize: bool = True,
        keep_similarities: bool | None = None,
        backend: str = "auto",
        group: ProcessGroup | str | None = None,
        group_mode: str = "auto",
        **contrast_options: Unpack[ContrastOptions],
    ) -> None:
        super().__init__(
            temperature,
            learn_temperature=learn_temperature,
            anchor=anchor,
            pairs=pairs,
            atp_weight=0.0,
            cu_weight=0.0,
            normalize=normalize,
            keep_similarities=keep_similarities,
            backend=backend,
            group=group,
            group_mode=group_mode,
            **contrast_options,
        )


class SigmoidLoss(GapLoss):
    """The sigmoid loss of SigLIP, ``gapkernels.sigmoid_loss`` as a module; SigLIP learns temperature and bias.

    Args:
        temperature, logit_bias: fixed, or the initial values where they are learned.
        learn_temperature, learn_bias: make them parameters.
        anchor, pairs, normalize, backend, group, group_mode, duplicates: as for the function.

    Raises:
        TypeError, ValueError: as for the function.

    Examples:
        >>> loss = SigmoidLoss(learn_temperature=True, learn_bias=True)
        >>> sorted(name for name, _ in loss.named_parameters())
        ['logit_bias', 'temperature.log_scale']
    """

    def __init__(
        self,
        temperature: float = 1 / functional.DEFAULT_SIGMOID_SCALE,
        logit_bias: float = options.DEFAULT_LOGIT_BIAS,
        *,
        learn_temperature: bool = False,
        learn_bias: bool = False,
        anchor: int = 0,
        pairs: str = "anchor",
        normalize: bool = True,
        backend: str = "auto",
        group: ProcessGroup | str | None = None,
        group_mode: str = "auto",
        duplicates: Literal["mask", "positive"] = "mask",
    ) -> None:
        super().__init__(
            temperature,
            learn_temperature=learn_temperature,
            learn_bias=learn_bias,
            anchor=anchor,
            pairs=pairs,
            atp_weight=0.0,
            cu_weight=0.0,
            normalize=normalize,
            backend=backend,
            group=group,
            group_mode=group_mode,
            contrast="sigmoid",
            logit_bias=logit_bias,
            duplicates=duplicates,
        )


class AlignTruePairsLoss(GapLoss):
    """Mean squared distance of true pairs, ``gapkernels.align_true_pairs`` as a module.

    Examples:
        >>> AlignTruePairsLoss()(torch.eye(3), -torch.eye(3)).item()
        4.0
    """

    def __init__(
        self, *, anchor: int = 0, normalize: bool = True, backend: str = "auto", group: ProcessGroup | str | None = None
    ) -> None:
        super().__init__(
            anchor=anchor, nce_weight=0.0, cu_weight=0.0, normalize=normalize, backend=backend, group=group
        )


class CentroidUniformityLoss(GapLoss):
    """Uniformity of centroids, ``gapkernels.centroid_uniformity`` as a module; options as ``GapLoss``.

    Examples:
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
        group: ProcessGroup | str | None = None,
        group_mode: str = "auto",
    ) -> None:
        super().__init__(
            nce_weight=0.0,
            atp_weight=0.0,
            uniformity_t=uniformity_t,
            normalize=normalize,
            normalize_centroids=normalize_centroids,
            backend=backend,
            group=group,
            group_mode=group_mode,
        )
