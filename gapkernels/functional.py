"""The loss as functions: arguments are checked here, and nowhere below."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from gapkernels import backends, evaluation, ops, options
from gapkernels.backends.contract import Scalars, Terms, compute_dtype
from gapkernels.checks import (
    as_tensor,
    check_backend,
    check_number,
    check_rows,
    check_scalar,
    constant,
    is_tracing,
    logit_scale_of,
    name_of,
)
from gapkernels.contrast import How
from gapkernels.distributed import DTYPES, group_name_and_size, heard_by_all
from gapkernels.evaluation import GapLossTerms
from gapkernels.options import ContrastOptions
from gapkernels.spec import KEPT_SIMILARITY_BYTES, LossSpec, SimilaritySums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_SIGMOID_SCALE = 10.0  # SigLIP's initial value


if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(ContrastOptions, total=False):
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
        keep_similarities: bool | None
        backend: str
        group: ProcessGroup | str | None
        group_mode: str

    class _NCEOptions(ContrastOptions, total=False):
        """Likewise, of ``info_nce``."""

        logit_scale: float | Tensor | None
        temperature: float | Tensor | None
        anchor: int
        pairs: str
        normalize: bool
        keep_similarities: bool | None
        backend: str
        group: ProcessGroup | str | None
        group_mode: str
        reduction: str


@overload
def gap_loss(*embeddings: Tensor, return_terms: Literal[False] = ..., **options: Unpack[_Options]) -> Tensor: ...


@overload
def gap_loss(*embeddings: Tensor, return_terms: Literal[True], **options: Unpack[_Options]) -> GapLossTerms: ...


@overload
def gap_loss(*embeddings: Tensor, return_terms: bool, **options: Unpack[_Options]) -> Tensor | GapLossTerms: ...


@heard_by_all
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
    keep_similarities: bool | None = None,
    backend: str = "auto",
    return_terms: bool = False,
    group: ProcessGroup | str | None = None,
    group_mode: str = "auto",
    **contrast_options: Unpack[ContrastOptions],
) -> Tensor | GapLossTerms:
    """Contrastive loss that closes the modality gap: InfoNCE + align true pairs + centroid uniformity.

    Row i of every modality belongs to sample i. Extra memory is O(N·D) beyond N of a few thousand, see
    ``keep_similarities``.

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
        keep_similarities: keep the N² similarities of the forward pass for the backward pass, which then multiplies a
            quarter less. None: as many as fit into 32 MiB. True: all of them, 4 bytes each (N² a pair; on a CPU N²/2
            for the centroids; on a GPU 2 bytes of bfloat16 embeddings whose logit scale has no gradient). False: none,
            O(N·D) memory at any N. Compiled functions (``torch.compile``) keep none, nor does the ring of
            ``group_mode``, nor another contrast than the plain one.
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
        group_mode: ``"gather"``: every process holds the columns' rows of all processes, O(N·D) memory, and sends the
            least. ``"ring"``: they go around the circle of processes, O(N·D/W) memory for W processes.
            ``"auto"``: gather up to 1 GiB of them, see ``docs/scaling.md``.
        **contrast_options: another contrast than symmetric InfoNCE of the batch: negatives, ids, directions, sigmoid
            and more, see ``gapkernels.ContrastOptions``.

    Returns:
        The loss, a 0-dim tensor: float64 for float64 embeddings, else float32. With ``return_terms`` a
        ``GapLossTerms``.

    Raises:
        TypeError: an embedding is no floating tensor, or types differ outside autocast.
        ValueError: shapes or devices differ, an option is out of its range, or options contradict each other.

    Source:
        Grassucci et al., "Closing the Modality Gap Aligns Group-Wise Semantics", arXiv 2601.18525. The centroid
        uniformity averages over pairs, where the paper's formula sums over j ≠ i: a constant log(N − 1) apart.

    Examples:
        >>> image, text = torch.randn(8, 4), torch.randn(8, 4)
        >>> terms = gap_loss(image, text, temperature=0.1, return_terms=True)
        >>> bool(terms.loss == gap_loss(image, text, logit_scale=10.0))
        True
    """
    tensors = backends.in_multiplied_type(_check_embeddings(embeddings, may_be_empty=group is not None), backend)
    device = tensors[0].device
    numbers = nce_weight, atp_weight, cu_weight, uniformity_t
    settings = (anchor, pairs, *numbers, normalize, normalize_centroids, len(tensors), device, keep_similarities)
    # Eager calls with the same numbers are checked once: small batches are bound by what the host does.
    spec, weights, t = _kept_settings(*settings) if _are_plain(settings) else _settings(*settings)
    check_backend(backend)
    group_name, world_size = group_name_and_size(group, group_mode)
    if spec.cu and tensors[0].shape[0] * world_size < 2:
        raise ValueError(
            "the centroid uniformity needs at least 2 samples, got embeddings of shape "
            f"{list(tensors[0].shape)}; use a larger batch or cu_weight=0"
        )
    scalars = Scalars(logit_scale_of(logit_scale, temperature, device), weights, t)
    if contrast_options:
        options.refuse_unknown("gap_loss()", contrast_options)
        chosen = options.parse(tensors[0], tensors[0].shape[0] * world_size, **contrast_options)
        if not options.is_plain(*chosen):
            how = How(spec.normalize, backend, group_name, world_size)
            different_only = not contrast_options.get("uniformity_of_equal_ids", True)
            return evaluation.with_contrast(tensors, scalars, spec, *chosen, how, different_only, return_terms)
    if backend == "reference":
        terms = evaluation.by_definition(tensors, scalars, spec, world_size)
        return terms if return_terms else terms.loss
    if not return_terms:
        return ops.loss_alone(tensors, scalars, spec, backend, group_name, world_size)
    loss, values = ops.loss(tensors, scalars, spec, backend, group_name, world_size)
    parts = Terms(*values.unbind())
    return GapLossTerms(
        loss,
        parts.info_nce if spec.nce else None,
        parts.align_true_pairs if spec.atp else None,
        parts.centroid_uniformity if spec.cu else None,
        parts.modality_gap.detach(),
        parts.true_pair_cosine.detach(),
    )


@overload
def info_nce(*embeddings: Tensor, return_sums: Literal[False] = ..., **options: Unpack[_NCEOptions]) -> Tensor: ...


@overload
def info_nce(
    *embeddings: Tensor, return_sums: Literal[True], **options: Unpack[_NCEOptions]
) -> tuple[Tensor, tuple[SimilaritySums, ...]]: ...


@heard_by_all
def info_nce(
    *embeddings: Tensor,
    logit_scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    anchor: int = 0,
    pairs: str = "anchor",
    normalize: bool = True,
    keep_similarities: bool | None = None,
    backend: str = "auto",
    group: ProcessGroup | str | None = None,
    group_mode: str = "auto",
    reduction: str = "mean",
    return_sums: bool = False,
    **contrast_options: Unpack[ContrastOptions],
) -> Tensor | tuple[Tensor, tuple[SimilaritySums, ...]]:
    """Symmetric InfoNCE (the CLIP loss), averaged over pairs of modalities.

    Args:
        *embeddings: as for ``gap_loss``; of two the anchor is the query, the other its positive.
        logit_scale, temperature, anchor, pairs, normalize, keep_similarities, backend, group, group_mode: as for
            ``gap_loss``.
        reduction: ``"mean"``; ``"none"``: the losses of this process's samples, ``[N]``. With ``group`` gradients of
            the latter are those of the sum over the processes of what each makes of its own.
        return_sums: return the log sums that the loss is made of as well, one ``SimilaritySums`` per pair, rows being
            those of the anchor: for weights of one's own, gradient caching or distillation.
        **contrast_options: see ``gapkernels.ContrastOptions``.

    Returns:
        The loss, 0-dim or ``[N]``: float64 for float64 embeddings, else float32. With ``return_sums`` a tuple of it and
        the sums.

    Raises:
        TypeError, ValueError: as ``gap_loss``.

    Source:
        Oord et al., arXiv 1807.03748; symmetric form: Radford et al., arXiv 2103.00020.

    Examples:
        >>> info_nce(torch.eye(4), torch.eye(4), temperature=0.01).item() < 1e-6
        True
    """
    options.refuse_unknown("info_nce()", contrast_options)
    if reduction == "mean" and not return_sums:
        return gap_loss(
            *embeddings,
            logit_scale=logit_scale,
            temperature=temperature,
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
    scale = logit_scale, temperature
    loss, sums = _contrast(
        embeddings, scale, anchor, pairs, normalize, backend, group, group_mode, reduction, contrast_options
    )
    if not return_sums:
        return loss
    if None in sums:
        raise ValueError("`return_sums` and `contrast`='sigmoid' contradict: the sigmoid loss has no log sums")
    return loss, tuple(s for s in sums if s is not None)


@heard_by_all
def sigmoid_loss(
    *embeddings: Tensor,
    logit_scale: float | Tensor = DEFAULT_SIGMOID_SCALE,
    logit_bias: float | Tensor = options.DEFAULT_LOGIT_BIAS,
    anchor: int = 0,
    pairs: str = "anchor",
    normalize: bool = True,
    backend: str = "auto",
    group: ProcessGroup | str | None = None,
    group_mode: str = "auto",
    reduction: str = "mean",
    negatives: Tensor | None = None,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    duplicates: Literal["mask", "positive"] = "mask",
) -> Tensor:
    """The sigmoid loss of SigLIP: every pair of samples is classified by itself, 1/N Σ_ij softplus(−y_ij(s·cos_ij +
    b)).

    Args:
        *embeddings: as for ``gap_loss``.
        logit_scale: s, a positive number or a tensor of one element, which may require gradient.
        logit_bias: b, likewise, of any sign.
        anchor, pairs, normalize, backend, group, group_mode: as for ``gap_loss``.
        reduction: as for ``info_nce``.
        negatives, ids, negative_ids, duplicates: see ``gapkernels.ContrastOptions``.

    Returns:
        The loss, 0-dim or ``[N]``: float64 for float64 embeddings, else float32.

    Raises:
        TypeError, ValueError: as ``gap_loss``.

    Source:
        Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, whose initial values are the
        defaults here.

    Examples:
        >>> sigmoid_loss(torch.eye(4), torch.eye(4), logit_scale=40.0, logit_bias=-20.0).item() < 1e-6
        True
    """
    loss, _ = _contrast(
        embeddings,
        (logit_scale, None),
        anchor,
        pairs,
        normalize,
        backend,
        group,
        group_mode,
        reduction,
        {
            "contrast": "sigmoid",
            "logit_bias": logit_bias,
            "negatives": negatives,
            "ids": ids,
            "negative_ids": negative_ids,
            "duplicates": duplicates,
        },
    )
    return loss


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
    group_mode: str = "auto",
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
        group_mode=group_mode,
    )


def _contrast(
    embeddings: tuple[Tensor, ...],
    scale: tuple[float | Tensor | None, float | Tensor | None],
    anchor: int,
    pairs: str,
    normalize: bool,
    backend: str,
    group: ProcessGroup | str | None,
    group_mode: str,
    reduction: str,
    contrast_options: ContrastOptions,
) -> tuple[Tensor, list[SimilaritySums | None]]:
    """The contrastive term alone, reduced, and its sums."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"`reduction` must be 'mean' or 'none', got {reduction!r}")
    tensors = backends.in_multiplied_type(_check_embeddings(embeddings, may_be_empty=group is not None), backend)
    device = tensors[0].device
    spec, weights, t = _settings(anchor, pairs, 1.0, 0.0, 0.0, 1.0, normalize, True, len(tensors), device)
    group_name, world_size = group_name_and_size(group, group_mode)
    how = How(spec.normalize, check_backend(backend), group_name, world_size)
    chosen, given = options.parse(tensors[0], tensors[0].shape[0] * world_size, **contrast_options)
    scalars = Scalars(logit_scale_of(*scale, device), weights, t)
    per_sample = reduction == "none"
    logit_scale = evaluation.agreed_scale(tensors, scalars, spec, chosen, given, how, per_sample=per_sample)
    losses, sums = evaluation.contrast_per_sample(tensors, logit_scale, spec, chosen, given, how)
    loss = losses if per_sample else evaluation.mean_over_samples(losses, how)
    return loss.to(compute_dtype(tensors[0].dtype)), sums


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
    keep_similarities: bool | None = None,
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
        kept_bytes=_kept_bytes(keep_similarities),
    )
    weights = (nce_weight, atp_weight, cu_weight)
    numbers = tuple(weight for weight in weights if not isinstance(weight, Tensor))
    if len(numbers) == len(weights):
        return spec, constant(numbers, device), _uniformity_t(uniformity_t, device)
    return spec, torch.stack([as_tensor(weight, device) for weight in weights]), _uniformity_t(uniformity_t, device)


def _kept_bytes(keep_similarities: bool | None) -> int:
    if keep_similarities is None:
        return KEPT_SIMILARITY_BYTES
    if not isinstance(keep_similarities, bool):
        raise TypeError(f"`keep_similarities` must be True, False or None, got {keep_similarities!r}")
    return 2**62 if keep_similarities else 0


_kept_settings = functools.lru_cache(maxsize=256, typed=True)(_settings)


def _are_plain(settings: tuple[object, ...]) -> bool:
    """Whether settings can be looked up: no tensors, and nobody traces this call."""
    return not is_tracing() and _PLAIN.issuperset(map(type, settings))


_PLAIN = {bool, int, float, str, torch.device, type(None)}


def _check_embeddings(embeddings: tuple[Tensor, ...], may_be_empty: bool) -> list[Tensor]:
    """``may_be_empty``: no rows are an error that all processes of a group must hear of, which the plan sees to."""
    if len(embeddings) > 1 and _are_alike(embeddings):
        return list(embeddings)
    if len(embeddings) < 2:
        raise ValueError(f"at least 2 embeddings (one per modality) are needed, got {len(embeddings)}")
    for index, e in enumerate(embeddings):
        check_rows(f"embedding {index}", e, may_be_empty)
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
            raise TypeError(f"embeddings must have one dtype, got {', '.join(map(name_of, dtypes))}")
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


def _uniformity_t(value: float | Tensor, device: torch.device) -> Tensor:
    value = check_scalar("uniformity_t", value)
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError('`uniformity_t` must not require grad; only backend="reference" could differentiate it')
    return as_tensor(value, device)


def _is_on(name: str, weight: float | Tensor) -> bool:
    """Whether a term is computed: its weight is a tensor, or a number that is not zero.

    A number that changes between calls of a compiled function is a symbol there, whose value must not be asked for.
    """
    if isinstance(weight, Tensor):
        check_scalar(name, weight, positive=False)
        return True
    if torch.compiler.is_compiling():
        return not statically_known_true(check_number(name, weight) == 0)
    return check_number(name, weight) != 0


def _check_pairs(pairs: str) -> bool:
    if pairs not in ("anchor", "all"):
        raise ValueError(f"`pairs` must be 'anchor' or 'all', got {pairs!r}")
    return pairs == "all"


def _check_anchor(anchor: int, modalities: int) -> None:
    if isinstance(anchor, bool) or not isinstance(anchor, int):
        raise TypeError(f"`anchor` must be an integer, got {type(anchor).__name__}")
    if not 0 <= anchor < modalities:
        raise ValueError(f"`anchor` must be in [0, {modalities - 1}] for {modalities} embeddings, got {anchor}")
