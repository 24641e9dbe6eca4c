"""The loss as functions: arguments are checked here, and nowhere below."""

from __future__ import annotations

import functools
import math
from numbers import Real
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from gapkernels import backends, ops
from gapkernels.backends import reference
from gapkernels.backends.contract import Scalars, Terms, statistics_dtype
from gapkernels.distributed import DTYPES, group_name_and_size
from gapkernels.spec import LossSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_TEMPERATURE = 0.07  # CLIP's initial value


class GapLossTerms(NamedTuple):
    """The parts of a loss. All are 0-dim tensors; float64 for float64 embeddings, else float32.

    Attributes:
        loss: the weighted sum; differentiable.
        info_nce: unweighted; differentiable. None if its weight is zero.
        align_true_pairs: likewise.
        centroid_uniformity: likewise.
        modality_gap: ‖mean of x − mean of y‖ of the normalised embeddings, averaged over unordered pairs of
            modalities; detached.
        true_pair_cosine: mean cosine of matching rows, averaged likewise; detached.
    """

    loss: Tensor
    info_nce: Tensor | None
    align_true_pairs: Tensor | None
    centroid_uniformity: Tensor | None
    modality_gap: Tensor
    true_pair_cosine: Tensor


if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        """The keyword arguments that all three overloads of ``gap_loss`` take, written once."""

        logit_scale: float | Tensor | None
        temperature: float | Tensor | None
        anchor: int
        pairs: str
        nce_weight: float | Tensor
        atp_weight: float | Tensor
        cu_weight: float | Tensor
        uniformity_t: float | Tensor
        normalize: bool
        normalize_centroids: bool
        backend: str
        group: ProcessGroup | str | None


@overload
def gap_loss(*embeddings: Tensor, return_terms: Literal[False] = ..., **options: Unpack[_Options]) -> Tensor: ...


@overload
def gap_loss(*embeddings: Tensor, return_terms: Literal[True], **options: Unpack[_Options]) -> GapLossTerms: ...


@overload
def gap_loss(*embeddings: Tensor, return_terms: bool, **options: Unpack[_Options]) -> Tensor | GapLossTerms: ...


def gap_loss(
    *embeddings: Tensor,
    logit_scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    anchor: int = 0,
    pairs: str = "anchor",
    nce_weight: float | Tensor = 1.0,
    atp_weight: float | Tensor = 1.0,
    cu_weight: float | Tensor = 1.0,
    uniformity_t: float | Tensor = 2.0,
    normalize: bool = True,
    normalize_centroids: bool = True,
    backend: str = "auto",
    return_terms: bool = False,
    group: ProcessGroup | str | None = None,
) -> Tensor | GapLossTerms:
    """Contrastive loss that closes the modality gap: InfoNCE + align true pairs + centroid uniformity.

    Row i of every modality belongs to sample i. Extra memory is O(N·D); no N×N matrix is stored.

    Args:
        *embeddings: two or more ``[N, D]`` tensors of one floating type on one device, one per modality.
        logit_scale: factor of the cosines in InfoNCE, 1/temperature; a positive number or a tensor of one element,
            which may require gradient and is copied if it is on another device. Give this or ``temperature``; with
            neither the temperature is 0.07.
        temperature: as a number or a tensor of one element.
        anchor: index of the modality that the others are aligned with.
        pairs: ``"anchor"``: InfoNCE of every other modality with the anchor. ``"all"``: of every two modalities. The
            alignment of true pairs is always with the anchor.
        nce_weight: weight of InfoNCE, a number or a tensor of one element. A term whose weight is the number zero
            costs nothing.
        atp_weight: weight of the alignment of true pairs.
        cu_weight: weight of the centroid uniformity.
        uniformity_t: sharpness t of the centroid uniformity.
        normalize: divide rows by their norm first. False takes them as they are.
        normalize_centroids: put centroids back on the unit sphere, as the paper's code does and its formula does not.
        backend: ``"cuda"`` (tensor-core kernels for Hopper, bfloat16 and float16, compiled at first use), ``"triton"``
            (fused kernels for NVIDIA and AMD GPUs; no float64), ``"cpu"`` (fused C++ kernels, compiled at first use),
            ``"torch"`` (tiled, any device), ``"reference"`` (dense, O(N²) memory), or ``"auto"``: the first of
            ``"triton"``, ``"cpu"`` and ``"torch"`` that can be used, and ``"cuda"`` where it has been compiled and a
            recorded measurement shows it faster. Raw centroids (neither rows nor centroids normalised) go to
            ``"torch"``, which multiplies in float64 those that lie far apart.
        return_terms: return all parts instead of the loss alone; costs no extra N² work.
        group: the ``torch.distributed`` process group that holds the batch, each process an equal number of rows;
            ``"world"`` means all processes there are at the time of the call.
            Every process then returns the loss of the whole batch; gradients are scaled such that their mean over
            processes, which DistributedDataParallel takes, is the gradient of that loss.

    Returns:
        The loss, a 0-dim tensor: float64 for float64 embeddings, else float32. With ``return_terms`` a
        ``GapLossTerms``.

    Raises:
        TypeError: an embedding is no floating tensor, or types differ outside autocast.
        ValueError: shapes or devices differ, or an option is out of its range.

    Source:
        Grassucci et al., "Closing the Modality Gap Aligns Group-Wise Semantics", arXiv 2601.18525. The centroid
        uniformity averages over pairs, where the paper's formula sums over j ≠ i: a constant log(N − 1) apart.

    Examples:
        >>> image, text = torch.randn(8, 4), torch.randn(8, 4)
        >>> terms = gap_loss(image, text, temperature=0.1, return_terms=True)
        >>> bool(terms.loss == gap_loss(image, text, logit_scale=10.0))
        True
    """
    tensors = _check_embeddings(embeddings, may_be_empty=group is not None)
    device = tensors[0].device
    terms = nce_weight, atp_weight, cu_weight, uniformity_t
    settings = (anchor, pairs, *terms, normalize, normalize_centroids, len(tensors), device)
    # Eager calls with the same numbers are checked once: small batches are bound by what the host does.
    spec, weights, t = _kept_settings(*settings) if _are_plain(settings) else _settings(*settings)
    if backend != "auto" and backend not in backends.NAMES:
        raise ValueError(f"`backend` must be 'auto' or one of {', '.join(map(repr, backends.NAMES))}, got {backend!r}")
    group_name, world_size = group_name_and_size(group)
    if spec.cu and tensors[0].shape[0] * world_size < 2:
        raise ValueError(
            "the centroid uniformity needs at least 2 samples, got embeddings of shape "
            f"{list(tensors[0].shape)}; use a larger batch or cu_weight=0"
        )
    scalars = Scalars(_logit_scale(logit_scale, temperature, device), weights, t)
    if backend == "reference":
        return _by_definition(tensors, scalars, spec, return_terms, world_size)
    loss, values = ops.loss(tensors, scalars, spec, backend, group_name, world_size)
    if not return_terms:
        return loss
    parts = Terms(*values.unbind())
    return GapLossTerms(
        loss,
        parts.info_nce if spec.nce else None,
        parts.align_true_pairs if spec.atp else None,
        parts.centroid_uniformity if spec.cu else None,
        parts.modality_gap.detach(),
        parts.true_pair_cosine.detach(),
    )


def info_nce(
    *embeddings: Tensor,
    logit_scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    anchor: int = 0,
    pairs: str = "anchor",
    normalize: bool = True,
    backend: str = "auto",
    group: ProcessGroup | str | None = None,
) -> Tensor:
    """Symmetric InfoNCE (the CLIP loss), averaged over pairs of modalities.

    Args, Returns, Raises:
        as ``gap_loss``.

    Source:
        Oord et al., arXiv 1807.03748; symmetric form: Radford et al., arXiv 2103.00020.

    Examples:
        >>> info_nce(torch.eye(4), torch.eye(4), temperature=0.01).item() < 1e-6
        True
    """
    return gap_loss(
        *embeddings,
        logit_scale=logit_scale,
        temperature=temperature,
        anchor=anchor,
        pairs=pairs,
        atp_weight=0.0,
        cu_weight=0.0,
        normalize=normalize,
        backend=backend,
        group=group,
    )


def align_true_pairs(
    *embeddings: Tensor,
    anchor: int = 0,
    normalize: bool = True,
    backend: str = "auto",
    group: ProcessGroup | str | None = None,
) -> Tensor:
    """Mean squared distance of every sample's embeddings to its anchor embedding.

    Args, Returns, Raises:
        as ``gap_loss``.

    Source:
        Grassucci et al., arXiv 2601.18525, the alignment of true pairs.

    Examples:
        >>> align_true_pairs(torch.eye(3), -torch.eye(3)).item()
        4.0
    """
    return gap_loss(
        *embeddings,
        anchor=anchor,
        nce_weight=0.0,
        cu_weight=0.0,
        normalize=normalize,
        backend=backend,
        group=group,
    )


def centroid_uniformity(
    *embeddings: Tensor,
    uniformity_t: float = 2.0,
    normalize: bool = True,
    normalize_centroids: bool = True,
    backend: str = "auto",
    group: ProcessGroup | str | None = None,
) -> Tensor:
    """Logarithm of the mean Gaussian potential exp(−t‖c_i − c_j‖²) between the centroids of different samples.

    Args, Returns, Raises:
        as ``gap_loss``.

    Source:
        Grassucci et al., arXiv 2601.18525; the potential: Wang and Isola, arXiv 2005.10242.

    Examples:
        >>> round(centroid_uniformity(torch.eye(3), torch.eye(3)).item(), 6)
        -4.0
    """
    return gap_loss(
        *embeddings,
        nce_weight=0.0,
        atp_weight=0.0,
        uniformity_t=uniformity_t,
        normalize=normalize,
        normalize_centroids=normalize_centroids,
        backend=backend,
        group=group,
    )


def _by_definition(
    embeddings: list[Tensor], scalars: Scalars, spec: LossSpec, return_terms: bool, world_size: int
) -> Tensor | GapLossTerms:
    if world_size > 1:
        raise ValueError('`group` is not supported by backend="reference"; gather the embeddings first')
    dtype = torch.promote_types(embeddings[0].dtype, torch.float32)
    embeddings = [e.to(dtype) for e in embeddings]
    with torch.autocast(embeddings[0].device.type, enabled=False):  # which would round the cosines
        terms = reference.loss_terms(embeddings, Scalars(*(number.to(dtype) for number in scalars)), spec)
        loss = reference.total(terms, scalars.weights.to(dtype), embeddings)
        return GapLossTerms(loss, *terms, *reference.diagnostics(embeddings)) if return_terms else loss


def _settings(
    anchor: int,
    pairs: str,
    nce_weight: float | Tensor,
    atp_weight: float | Tensor,
    cu_weight: float | Tensor,
    uniformity_t: float | Tensor,
    normalize: bool,
    normalize_centroids: bool,
    modalities: int,
    device: torch.device,
) -> tuple[LossSpec, Tensor, Tensor]:
    """What is computed, the weights of the terms ``[3]`` and the sharpness, checked."""
    _check_anchor(anchor, modalities)
    spec = LossSpec(
        anchor=anchor,
        all_pairs=_check_pairs(pairs),
        nce=_is_on("nce_weight", nce_weight),
        atp=_is_on("atp_weight", atp_weight),
        cu=_is_on("cu_weight", cu_weight),
        normalize=bool(normalize),
        normalize_centroids=bool(normalize_centroids),
    )
    weights = (nce_weight, atp_weight, cu_weight)
    numbers = tuple(weight for weight in weights if not isinstance(weight, Tensor))
    if len(numbers) == len(weights):
        return spec, _constant(numbers, device), _uniformity_t(uniformity_t, device)
    return spec, torch.stack([_as_tensor(weight, device) for weight in weights]), _uniformity_t(uniformity_t, device)


_kept_settings = functools.lru_cache(maxsize=256, typed=True)(_settings)


def _are_plain(settings: tuple[object, ...]) -> bool:
    """Whether settings can be looked up: no tensors, and nobody traces this call."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(setting) in _PLAIN for setting in settings)


_PLAIN = {bool, int, float, str, torch.device}


def _check_embeddings(embeddings: tuple[Tensor, ...], may_be_empty: bool) -> list[Tensor]:
    """``may_be_empty``: no rows are an error that all processes of a group must hear of, which the plan sees to."""
    if len(embeddings) > 1 and _are_alike(embeddings):
        return list(embeddings)
    if len(embeddings) < 2:
        raise ValueError(f"at least 2 embeddings (one per modality) are needed, got {len(embeddings)}")
    for index, e in enumerate(embeddings):
        if not isinstance(e, Tensor):
            raise TypeError(f"embedding {index} must be a torch.Tensor, got {type(e).__name__}")
        _refuse_dtensor(
            f"embedding {index}", e, "its local rows (to_local()) with group= its mesh's group (get_group())"
        )
        if not e.is_floating_point() or e.dtype.itemsize < 2:
            raise TypeError(f"embedding {index} must be float16, bfloat16, float32 or float64, got {_name(e.dtype)}")
        if e.dim() != 2 or e.shape[1] == 0 or (e.shape[0] == 0 and not may_be_empty):
            raise ValueError(f"embedding {index} must have shape [N, D] with N, D ≥ 1, got {list(e.shape)}")
    first = embeddings[0]
    for index, e in enumerate(embeddings):
        if e.shape != first.shape:
            raise ValueError(
                f"embeddings must have one shape, got {list(first.shape)} for embedding 0 and "
                f"{list(e.shape)} for embedding {index}"
            )
        if e.device != first.device:
            raise ValueError(
                f"embeddings must be on one device, got {first.device} for embedding 0 and {e.device} for {index}"
            )
    dtypes = [e.dtype for e in embeddings]
    if any(dtype != first.dtype for dtype in dtypes):
        # Under autocast one tower may end in a layer that keeps float32: take the wider type, as autocast itself does.
        if not torch.is_autocast_enabled(first.device.type):
            raise TypeError(f"embeddings must have one dtype, got {', '.join(map(_name, dtypes))}")
        widest = dtypes[0]
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return [e.to(widest) for e in embeddings]
    return list(embeddings)


def _are_alike(embeddings: tuple[Tensor, ...]) -> bool:
    """Whether there is nothing to say about them: the usual case, looked at in a few microseconds."""
    first = embeddings[0]
    if type(first) not in _TENSORS or first.dim() != 2 or 0 in first.shape or first.dtype not in DTYPES:
        return False
    return all(
        type(e) in _TENSORS and e.shape == first.shape and e.dtype == first.dtype and e.device == first.device
        for e in embeddings[1:]
    )


_TENSORS = {Tensor, torch.nn.Parameter}


def _logit_scale(
    logit_scale: float | Tensor | None, temperature: float | Tensor | None, device: torch.device
) -> Tensor:
    if logit_scale is not None and temperature is not None:
        raise ValueError("give `logit_scale` or `temperature` (its inverse), not both")
    if temperature is None:
        value = 1 / DEFAULT_TEMPERATURE if logit_scale is None else _check_scalar("logit_scale", logit_scale)
        return value.reshape(()).to(device) if isinstance(value, Tensor) else _constant(value, device)
    value = _check_scalar("temperature", temperature)
    if isinstance(value, Tensor):  # inverted in the statistics type: a bfloat16 quotient would be off by 0.4 %
        return value.reshape(()).to(device, statistics_dtype(device)).reciprocal()
    return _constant(1 / value, device)


def _uniformity_t(value: float | Tensor, device: torch.device) -> Tensor:
    value = _check_scalar("uniformity_t", value)
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError('`uniformity_t` must not require grad; only backend="reference" could differentiate it')
    return _as_tensor(value, device)


def _as_tensor(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(()).to(device, statistics_dtype(device))
    return _constant(value, device)


def _constant(value: float | tuple[float, ...], device: torch.device) -> Tensor:
    """A number or some as a tensor in the statistics type. Eager calls keep it: on a GPU it is copied from the host."""
    if not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0):
        return _kept_constant(value, device)
    # A number that changes between calls is a symbol here: a product takes it as one, torch.full and torch.tensor
    # would compile anew for every value or, without gradients, keep an old one.
    one = torch.ones((), dtype=statistics_dtype(device), device=device)
    return torch.stack([one * v for v in value]) if isinstance(value, tuple) else one * value


@functools.lru_cache(maxsize=256)
def _kept_constant(value: float | tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or no later call could differentiate through it
        return torch.tensor(value, dtype=statistics_dtype(device), device=device)


def _check_scalar(name: str, value: float | Tensor, positive: bool = True) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"`{name}` must be a number or a floating tensor of one element, got {_name(value.dtype)} of shape "
                f"{list(value.shape)}"
            )
        _refuse_dtensor(f"`{name}`", value, "its full_tensor()")
        if positive and _is_readable(value):
            number = value.item()
            if number <= 0 or number == math.inf:  # not a number passes: a training that diverged says so in its loss
                which = f"`{name}`" if name == "uniformity_t" else "the logit scale (1/temperature)"
                raise ValueError(f"{which} must be {'positive' if number <= 0 else 'finite'}, got {number}")
        return value
    return _check_number(name, value, positive=positive)


def _refuse_dtensor(name: str, tensor: Tensor, instead: str) -> None:
    if type(tensor).__name__ == "DTensor":
        raise TypeError(f"{name} must be an ordinary tensor, got a DTensor; pass {instead}")


def _is_readable(tensor: Tensor) -> bool:
    """Whether a value can be looked at without waiting for a device, and without a tracer or transform in the way."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _check_number(name: str, value: float, positive: bool = False) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf or (positive and value <= 0):  # comparisons, which torch.compile can trace
        raise ValueError(f"`{name}` must be {'positive and ' if positive else ''}finite, got {value}")
    return value if torch.compiler.is_compiling() else float(value)


def _is_on(name: str, weight: float | Tensor) -> bool:
    """Whether a term is computed: its weight is a tensor, or a number that is not zero.

    A number that changes between calls of a compiled function is a symbol there, whose value must not be asked for.
    """
    if isinstance(weight, Tensor):
        _check_scalar(name, weight, positive=False)
        return True
    if torch.compiler.is_compiling():
        return not statically_known_true(_check_number(name, weight) == 0)
    return _check_number(name, weight) != 0


def _check_pairs(pairs: str) -> bool:
    if pairs not in ("anchor", "all"):
        raise ValueError(f"`pairs` must be 'anchor' or 'all', got {pairs!r}")
    return pairs == "all"


def _check_anchor(anchor: int, modalities: int) -> None:
    if isinstance(anchor, bool) or not isinstance(anchor, int):
        raise TypeError(f"`anchor` must be an integer, got {type(anchor).__name__}")
    if not 0 <= anchor < modalities:
        raise ValueError(f"`anchor` must be in [0, {modalities - 1}] for {modalities} embeddings, got {anchor}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
