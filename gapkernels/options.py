"""Options of the contrastive term, as keyword arguments and as what they mean.

They are written once, here: ``gap_loss``, ``info_nce`` and their modules take them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from gapkernels.checks import as_tensor, check_number, check_scalar, check_vector, name_of
from gapkernels.spec import Candidates, Contrast

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_LOGIT_BIAS = -10.0  # SigLIP's initial value


class ContrastOptions(TypedDict, total=False):
    """Keyword arguments that choose another contrast than the symmetric InfoNCE of the batch.

    The anchor's rows are queries, those of the other modality their documents. Memory stays O(N·D).

    Attributes:
        negatives: more candidates for the anchor's rows: ``[K, D]`` for every row (of all processes' rows, with
            ``group``), or ``[N, K, D]``, K of its own for each. In the type of the embeddings; they may require
            gradient.
        ids: ``[N]`` int64. Samples of equal ids are not each other's negatives.
        negative_ids: ``[K]`` int64: a negative of equal id is left out of a row. Needs ``ids``.
        duplicates: what samples of equal ids are to each other: ``"mask"`` (default), left out; or ``"positive"``, all
            of them positives: the loss is the mean of their cross-entropies (arXiv 2004.11362, L_out).
        false_negative_margin: not below zero. A candidate whose cosine exceeds that of the row's positive by more is
            left out of that row's, or in the other direction that column's, denominator (arXiv 2402.16829, whose guide
            is the model itself).
        directions: ``"both"`` (default, their mean), ``"from_anchor"`` (each anchor row finds its partner among the
            others' rows), ``"to_anchor"``, or a pair of weights for the two.
        same_side: True: the other rows of a row's own modality are its negatives too, which for two views is NT-Xent
            (arXiv 2002.05709). ``"anchor"``, ``"other"``: only on that side.
        partition: ``"per_direction"`` (default), or ``"joint"``: everything chosen by ``directions`` and ``same_side``
            in one denominator per sample (arXiv 2308.03281).
        decoupled: take the positive out of the denominator (arXiv 2110.06848).
        label_smoothing: in [0, 1), the share of the target spread evenly over all candidates.
        contrast: ``"softmax"`` (default) or ``"sigmoid"``: every pair is classified by itself (arXiv 2303.15343), with
            ``logit_bias``; takes ``negatives``, ``ids`` and ``duplicates`` of the options above.
        logit_bias: of the sigmoid, a number (default -10) or a tensor of one element, which may require gradient.
        uniformity_of_equal_ids: False leaves pairs of samples of equal ids out of the centroid uniformity, which else
            pushes them apart as all others. Needs ``ids`` and normalised centroids.
    """

    negatives: Tensor | None
    ids: Tensor | None
    negative_ids: Tensor | None
    duplicates: Literal["mask", "positive"]
    false_negative_margin: float | None
    directions: str | tuple[float, float]
    same_side: bool | Literal["anchor", "other"]
    partition: Literal["per_direction", "joint"]
    decoupled: bool
    label_smoothing: float
    contrast: Literal["softmax", "sigmoid"]
    logit_bias: float | Tensor | None
    uniformity_of_equal_ids: bool


DEFAULTS: dict[str, Any] = {
    "negatives": None,
    "ids": None,
    "negative_ids": None,
    "duplicates": "mask",
    "false_negative_margin": None,
    "directions": "both",
    "same_side": False,
    "partition": "per_direction",
    "decoupled": False,
    "label_smoothing": 0.0,
    "contrast": "softmax",
    "logit_bias": None,
    "uniformity_of_equal_ids": True,
}

_DIRECTIONS = {"both": (0.5, 0.5), "from_anchor": (1.0, 0.0), "to_anchor": (0.0, 1.0)}
_ONLY_SOFTMAX = ("directions", "same_side", "partition", "decoupled", "label_smoothing", "false_negative_margin")


def refuse_unknown(function: str, options: Iterable[str]) -> None:
    """Raise the TypeError of an unexpected keyword argument."""
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(
                f"{function} got an unexpected keyword argument {name!r}; its options are {', '.join(DEFAULTS)}"
            )


def parse(like: Tensor, total_rows: int, **options: Unpack[ContrastOptions]) -> tuple[Contrast, Candidates]:
    """What options mean for embeddings like ``like``, ``[N, D]``.

    Raises:
        TypeError: an option is of another type.
        ValueError: it is out of range, has another shape or device, or contradicts another.
    """
    given = {**DEFAULTS, **options}
    chosen = {
        name for name, value in given.items() if value is not DEFAULTS[name] and not _equal(value, DEFAULTS[name])
    }
    _one_of(given, "duplicates", ("mask", "positive"))
    _one_of(given, "partition", ("per_direction", "joint"))
    _one_of(given, "contrast", ("softmax", "sigmoid"))
    _one_of(given, "same_side", (False, True, "anchor", "other"))
    for name in ("decoupled", "uniformity_of_equal_ids"):
        if not isinstance(given[name], bool):
            raise TypeError(f"`{name}` must be True or False, got {given[name]!r}")
    weights = _weights(given["directions"])
    smoothing = check_number("label_smoothing", given["label_smoothing"])
    if not 0 <= smoothing < 1:
        raise ValueError(f"`label_smoothing` must be in [0, 1), got {smoothing}")
    margin = given["false_negative_margin"]
    if margin is not None and check_number("false_negative_margin", margin) < 0:
        raise ValueError(f"`false_negative_margin` must not be negative, got {margin}")
    _check_tensors(like, given)
    positive, sigmoid = given["duplicates"] == "positive", given["contrast"] == "sigmoid"

    def refuse(one: str, other: str, why: str) -> None:
        if one in chosen and other in chosen:
            raise ValueError(f"`{one}`={_shown(given[one])} and `{other}`={_shown(given[other])} contradict: {why}")

    if sigmoid:
        for name in _ONLY_SOFTMAX:
            refuse(name, "contrast", "the sigmoid loss has no denominator")
    elif "logit_bias" in chosen:
        raise ValueError(f"`logit_bias` needs contrast='sigmoid', got contrast={given['contrast']!r}")
    for name, needed in (
        ("duplicates", "ids"),
        ("uniformity_of_equal_ids", "ids"),
        ("negative_ids", "ids"),
        ("negative_ids", "negatives"),
    ):
        if name in chosen and given[needed] is None:
            raise ValueError(f"`{name}`={_shown(given[name])} needs `{needed}`, got None")
    if given["negative_ids"] is not None and given["negatives"].dim() == 3:
        raise ValueError("`negative_ids` needs `negatives` of shape [K, D], got negatives of a row's own [N, K, D]")
    if positive:
        refuse("duplicates", "negative_ids", "whether a negative of equal id were a positive is not defined")
        refuse("duplicates", "false_negative_margin", "a positive could be left out")
        refuse("duplicates", "partition", "a joint denominator has one positive")
    elif smoothing and given["ids"] is not None:
        raise ValueError("`label_smoothing` and `ids` contradict: the target would be spread over what is left out")
    for name in ("false_negative_margin", "same_side", "partition", "decoupled"):
        refuse("label_smoothing", name, "which candidates the target is spread over is not defined")
    if given["partition"] == "joint" and not isinstance(given["directions"], str):
        raise ValueError("`partition`='joint' and weights as `directions` contradict: there is one denominator")
    if given["negatives"] is not None and not weights[0]:
        raise ValueError("`negatives` and `directions`='to_anchor' contradict: only the anchor's rows see them")
    if given["decoupled"] and given["negatives"] is None and total_rows < 2:
        raise ValueError("`decoupled` needs a negative: at least 2 samples, or `negatives`; got 1 sample")
    bias = DEFAULT_LOGIT_BIAS if given["logit_bias"] is None else given["logit_bias"]
    side = given["same_side"]
    contrast = Contrast(
        sigmoid=sigmoid,
        from_anchor=weights[0],
        to_anchor=weights[1],
        same_anchor=side in (True, "anchor"),
        same_other=side in (True, "other"),
        joint=given["partition"] == "joint",
        decoupled=given["decoupled"],
        label_smoothing=smoothing,
        equal_are_positive=positive,
        margin=margin,
    )
    if contrast.same_anchor and not contrast.from_anchor and side != True:  # noqa: E712 (True, not any text)
        raise ValueError("`same_side`='anchor' and `directions`='to_anchor' contradict: the anchor's rows have no loss")
    if contrast.same_other and not contrast.to_anchor and side != True:  # noqa: E712
        raise ValueError("`same_side`='other' and `directions`='from_anchor' contradict: the others' rows have no loss")
    return contrast, Candidates(
        ids=given["ids"],
        negatives=given["negatives"],
        negative_ids=given["negative_ids"],
        bias=as_tensor(check_scalar("logit_bias", bias, positive=False), like.device) if sigmoid else None,
    )


def is_plain(contrast: Contrast, given: Candidates) -> bool:
    """Whether this is the symmetric InfoNCE of the batch, which the fused plan computes."""
    return contrast == Contrast() and all(x is None for x in given)


def _check_tensors(like: Tensor, given: dict[str, Any]) -> None:
    rows, dim = like.shape
    negatives = given["negatives"]
    if negatives is not None:
        if not isinstance(negatives, Tensor):
            raise TypeError(f"`negatives` must be a torch.Tensor, got {type(negatives).__name__}")
        shape = list(negatives.shape)
        fits = len(shape) == 2 or (len(shape) == 3 and shape[0] == rows)
        if not fits or shape[-1] != dim or 0 in shape:
            raise ValueError(
                f"`negatives` must have shape [K, {dim}] or [{rows}, K, {dim}] with K ≥ 1, as the embeddings have "
                f"{[rows, dim]}, got {shape}"
            )
        if negatives.dtype != like.dtype:
            if not torch.is_autocast_enabled(like.device.type):
                raise TypeError(
                    f"`negatives` must have the embeddings' dtype {name_of(like.dtype)}, got {name_of(negatives.dtype)}"
                )
            given["negatives"] = negatives.to(like.dtype)
        if negatives.device != like.device:
            raise ValueError(f"`negatives` must be on the embeddings' device {like.device}, got {negatives.device}")
    for name, length in (("ids", rows), ("negative_ids", None if negatives is None else negatives.shape[0])):
        if given[name] is not None and length is not None:
            check_vector(name, given[name], length, like, integer=True)


def _weights(directions: str | tuple[float, float]) -> tuple[float, float]:
    if isinstance(directions, str):
        if directions not in _DIRECTIONS:
            names = ", ".join(map(repr, _DIRECTIONS))
            raise ValueError(f"`directions` must be one of {names} or a pair of weights, got {directions!r}")
        return _DIRECTIONS[directions]
    if not isinstance(directions, (tuple, list)) or len(directions) != 2:
        raise TypeError(f"`directions` must be a text or a pair of weights (from, to the anchor), got {directions!r}")
    first, second = (check_number("directions", weight) for weight in directions)
    if first < 0 or second < 0 or first + second == 0 or math.isinf(first + second):
        raise ValueError(f"weights of `directions` must not be negative, nor both zero, got {directions!r}")
    return first, second


def _one_of(given: dict[str, Any], name: str, accepted: tuple[Any, ...]) -> None:
    if not any(type(given[name]) is type(value) and given[name] == value for value in accepted):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, accepted))}, got {given[name]!r}")


def _equal(value: object, default: object) -> bool:
    return type(value) is type(default) and not isinstance(value, Tensor) and value == default


def _shown(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
