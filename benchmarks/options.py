"""The options of the contrastive term, each with tensors to measure it on and its dense form.

A case of loss ``info_nce+NAME`` is InfoNCE with the option NAME of ``benchmarks.cases.OPTIONS``. The dense form is what
one writes without this library: torch's functions on the N×N matrix, differentiated by autograd, nothing in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gapkernels
from benchmarks.cases import OPTIONS, Case, option_of
from benchmarks.workload import Loss

OWN_NEGATIVES = 8
_SAMPLES_PER_ID = 4
_MARGIN = 0.0
_SMOOTHING = 0.1
_BIAS = -10.0

Dense = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Option:
    """One way to call ``gapkernels.info_nce``.

    Args:
        title: for tables.
        options: makes the keyword arguments of a case, tensors on torch's default device.
        dense: the loss from unit vectors x and y ``[N, D]``, their logits ``[N, N]`` and the keyword arguments.
    """

    title: str
    options: Callable[[Case], dict[str, Any]]
    dense: Dense


def ours(case: Case, backend: str, logit_scale: float) -> Loss:
    """``gapkernels.info_nce`` with the option of a case."""
    given = ALL[option_of(case.loss)].options(case)
    return lambda z: gapkernels.info_nce(*z, logit_scale=logit_scale, backend=backend, **given)


def dense(case: Case, logit_scale: float) -> Loss:
    """The dense form of the option of a case; logits in float32, as autocast has them where a soft-max follows."""
    option = ALL[option_of(case.loss)]
    given = option.options(case)
    if given.get("negatives") is not None:
        given["negatives"] = F.normalize(given["negatives"], dim=-1)

    def loss(z: Sequence[Tensor]) -> Tensor:
        x, y = (F.normalize(e, dim=1) for e in z)
        return option.dense(x, y, _logits(x, y, logit_scale), {**given, "scale": logit_scale})

    return loss


def exact(
    embeddings: Sequence[Tensor], logit_scale: float, case: Case, backward: bool = True
) -> tuple[float, list[Tensor]]:
    """Loss and gradients by the definition in float64, dense: for small N."""
    z = [e.detach().double().requires_grad_(backward) for e in embeddings]
    with z[0].device:
        options = ALL[option_of(case.loss)].options(case)
    given = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    loss = gapkernels.info_nce(*z, logit_scale=logit_scale, backend="reference", **given)
    if backward:
        loss.backward()
    return loss.item(), [e.grad for e in z if e.grad is not None]


# ---- what each is measured on ---------------------------------------------------------------------------------------


def _random(case: Case, *shape: int) -> Tensor:
    device = torch.get_default_device()
    generator = torch.Generator(device).manual_seed(case.samples + case.width)
    return torch.randn(*shape, case.width, generator=generator, device=device).to(getattr(torch, case.dtype))


def _bank(case: Case) -> dict[str, Any]:
    """As many negatives as there are samples, from earlier steps: no gradient."""
    return {"negatives": _random(case, case.samples)}


def _own(case: Case) -> dict[str, Any]:
    return {"negatives": _random(case, case.samples, OWN_NEGATIVES)}


def _ids(case: Case) -> Tensor:
    device = torch.get_default_device()
    generator = torch.Generator(device).manual_seed(case.samples)
    ids = max(1, case.samples // _SAMPLES_PER_ID)
    return torch.randint(ids, (case.samples,), generator=generator, device=device)


def _fixed(**given: Any) -> Callable[[Case], dict[str, Any]]:
    return lambda case: dict(given)


# ---- dense forms ----------------------------------------------------------------------------------------------------


def _logits(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return (scale * x @ y.T).float()


def _one_way(logits: Tensor, **given: Any) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), **given)


def _both(logits: Tensor, **given: Any) -> Tensor:
    return (_one_way(logits, **given) + _one_way(logits.T, **given)) / 2


def _diagonal(logits: Tensor) -> Tensor:
    return torch.eye(len(logits), dtype=torch.bool, device=logits.device)


def _dense_bank(x: Tensor, y: Tensor, logits: Tensor, given: dict[str, Any]) -> Tensor:
    wide = torch.cat([logits, _logits(x, given["negatives"], given["scale"])], dim=1)
    return (_one_way(wide) + _one_way(logits.T)) / 2


def _dense_own(x: Tensor, y: Tensor, logits: Tensor, given: dict[str, Any]) -> Tensor:
    own = given["scale"] * torch.einsum("nd,nkd->nk", x, given["negatives"]).float()
    return (_one_way(torch.cat([logits, own], dim=1)) + _one_way(logits.T)) / 2


def _dense_mask(x: Tensor, y: Tensor, logits: Tensor, given: dict[str, Any]) -> Tensor:
    ids = given["ids"]
    others = (ids[:, None] == ids[None, :]) & ~_diagonal(logits)
    return _both(logits.masked_fill(others, -torch.inf))


def _dense_positive(x: Tensor, y: Tensor, logits: Tensor, given: dict[str, Any]) -> Tensor:
    ids = given["ids"]
    target = (ids[:, None] == ids[None, :]).float()
    target = target / target.sum(dim=1, keepdim=True)  # symmetric, so rows of it are its columns too
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _dense_margin(x: Tensor, y: Tensor, logits: Tensor, given: dict[str, Any]) -> Tensor:
    limit = logits.detach().diagonal() + given["scale"] * given["false_negative_margin"]
    rows = logits.masked_fill(logits > limit[:, None], -torch.inf)
    cols = logits.masked_fill(logits > limit[None, :], -torch.inf)
    return (_one_way(rows) + _one_way(cols.T)) / 2


def _dense_same_side(x: Tensor, y: Tensor, logits: Tensor, given: dict[str, Any]) -> Tensor:
    diagonal = _diagonal(logits)
    of_x, of_y = (_logits(e, e, given["scale"]).masked_fill(diagonal, -torch.inf) for e in (x, y))
    return (_one_way(torch.cat([logits, of_x], dim=1)) + _one_way(torch.cat([logits.T, of_y], dim=1))) / 2


def _dense_joint(x: Tensor, y: Tensor, logits: Tensor, given: dict[str, Any]) -> Tensor:
    diagonal = _diagonal(logits)
    others = (logits.T, _logits(x, x, given["scale"]), _logits(y, y, given["scale"]))
    return _one_way(torch.cat([logits, *(e.masked_fill(diagonal, -torch.inf) for e in others)], dim=1))


def _dense_decoupled(x: Tensor, y: Tensor, logits: Tensor, given: dict[str, Any]) -> Tensor:
    negatives = logits.masked_fill(_diagonal(logits), -torch.inf)
    return ((negatives.logsumexp(dim=1) + negatives.logsumexp(dim=0)) / 2 - logits.diagonal()).mean()


def _dense_sigmoid(x: Tensor, y: Tensor, logits: Tensor, given: dict[str, Any]) -> Tensor:
    labels = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(labels * (logits + given["logit_bias"])).sum() / len(logits)


ALL: dict[str, Option] = {
    "negatives": Option("`negatives`, N of a bank", _bank, _dense_bank),
    "own-negatives": Option(f"`negatives`, {OWN_NEGATIVES} per row", _own, _dense_own),
    "ids": Option("`ids`, mask", lambda case: {"ids": _ids(case)}, _dense_mask),
    "ids-positive": Option(
        "`ids`, positive",
        lambda case: {"ids": _ids(case), "duplicates": "positive"},
        _dense_positive,
    ),
    "margin": Option("`false_negative_margin`", _fixed(false_negative_margin=_MARGIN), _dense_margin),
    "from-anchor": Option(
        '`directions="from_anchor"`',
        _fixed(directions="from_anchor"),
        lambda x, y, logits, given: _one_way(logits),
    ),
    "same-side": Option("`same_side`", _fixed(same_side=True), _dense_same_side),
    "joint": Option('`same_side`, `partition="joint"`', _fixed(same_side=True, partition="joint"), _dense_joint),
    "decoupled": Option("`decoupled`", _fixed(decoupled=True), _dense_decoupled),
    "smoothing": Option(
        "`label_smoothing`",
        _fixed(label_smoothing=_SMOOTHING),
        lambda x, y, logits, given: _both(logits, label_smoothing=_SMOOTHING),
    ),
    "sigmoid": Option('`contrast="sigmoid"`', _fixed(contrast="sigmoid", logit_bias=_BIAS), _dense_sigmoid),
}
assert list(ALL) == list(OPTIONS)
