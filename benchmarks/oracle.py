"""Loss and gradients in float64, from the definition, one block of rows at a time.

Independent of the package's own arithmetic: autograd differentiates the formulas, and each block is computed again in
the backward pass, so that large batches fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import GAP

UNIFORMITY_T = 2.0
_BLOCK = 1024


def loss_and_gradients(
    embeddings: Sequence[Tensor], logit_scale: float, loss: str = GAP, backward: bool = True
) -> tuple[float, list[Tensor]]:
    """The exact loss and its gradients, in float64.

    Args:
        embeddings: M tensors ``[N, D]``; the first is the anchor.
        logit_scale: factor of the cosines in InfoNCE.
        loss: ``"gap"`` or ``"info_nce"``.
        backward: whether the gradients are wanted; without them the list is empty.
    """
    z = [e.detach().double().requires_grad_(backward) for e in embeddings]
    with torch.set_grad_enabled(backward):
        anchor, *others = [F.normalize(e, dim=1) for e in z]
        total = torch.stack([_info_nce(m, anchor, logit_scale) for m in others]).mean()
        if loss == GAP:
            total = total + torch.stack([(m - anchor).square().sum(dim=1).mean() for m in others]).mean()
            total = total + _uniformity(F.normalize(torch.stack([anchor, *others]).mean(dim=0), dim=1))
    if not backward:
        return total.item(), []
    total.backward()
    return total.item(), [e.grad for e in z if e.grad is not None]


def relative_error(value: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm, all tensors together, on the device of the values."""
    exact = [e.to(v.device) for v, e in zip(value, exact, strict=True)]
    difference = sum((v.detach().double() - e).square().sum().item() for v, e in zip(value, exact, strict=True))
    return math.sqrt(difference / sum(e.square().sum().item() for e in exact))


def _info_nce(rows: Tensor, cols: Tensor, logit_scale: float) -> Tensor:
    col_log_sum = rows.new_full((len(cols),), -math.inf)
    row_log_sum = []
    for block in rows.split(_BLOCK):
        by_row, by_col = checkpoint(_log_sums, logit_scale * block, cols, use_reentrant=False)
        row_log_sum.append(by_row)
        col_log_sum = torch.logaddexp(col_log_sum, by_col)
    positive = logit_scale * (rows * cols).sum(dim=1)
    return ((torch.cat(row_log_sum) + col_log_sum) / 2 - positive).mean()


def _log_sums(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    logits = rows @ cols.T
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0)


def _uniformity(centroid: Tensor) -> Tensor:
    count = len(centroid)
    total = centroid.new_zeros(())
    for start in range(0, count, _BLOCK):
        total = total + checkpoint(_potential, centroid, start, use_reentrant=False)
    return torch.log(total / (count * (count - 1) / 2))


def _potential(centroid: Tensor, start: int) -> Tensor:
    """Σ exp(−t‖c_i − c_j‖²) over the rows i of one block and all j > i."""
    rows = centroid[start : start + _BLOCK]
    later = centroid[start:]
    squared_distance = 2 - 2 * rows @ later.T
    return torch.exp(-UNIFORMITY_T * squared_distance).triu(diagonal=1).sum()
