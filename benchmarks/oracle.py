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

from benchmarks.cases import GAP, Case
from benchmarks.implementations import LOGIT_SCALE, UNIFORMITY_T

_BLOCK = 1024


def loss_and_gradients(case: Case, embeddings: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The exact loss of a case and its gradients, in float64.

    Args:
        case: what to compute.
        embeddings: M tensors ``[N, D]``.
    """
    z = [e.detach().double().requires_grad_(case.backward) for e in embeddings]
    with torch.set_grad_enabled(case.backward):
        anchor, *others = [F.normalize(e, dim=1) for e in z]
        loss = torch.stack([_info_nce(m, anchor) for m in others]).mean()
        if case.loss == GAP:
            loss = loss + torch.stack([(m - anchor).square().sum(dim=1).mean() for m in others]).mean()
            centroid = F.normalize(torch.stack([anchor, *others]).mean(dim=0), dim=1)
            loss = loss + _uniformity(centroid)
    if not case.backward:
        return loss.item(), []
    loss.backward()
    return loss.item(), [e.grad for e in z if e.grad is not None]


def relative_error(value: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm, all tensors together, on the device of the values."""
    exact = [e.to(v.device) for v, e in zip(value, exact, strict=True)]
    difference = sum((v.detach().double() - e).square().sum().item() for v, e in zip(value, exact, strict=True))
    return math.sqrt(difference / sum(e.square().sum().item() for e in exact))


def _info_nce(rows: Tensor, cols: Tensor) -> Tensor:
    col_log_sum = rows.new_full((len(cols),), -math.inf)
    row_log_sum = []
    for block in rows.split(_BLOCK):
        by_row, by_col = checkpoint(_log_sums, block, cols, use_reentrant=False)
        row_log_sum.append(by_row)
        col_log_sum = torch.logaddexp(col_log_sum, by_col)
    positive = LOGIT_SCALE * (rows * cols).sum(dim=1)
    return ((torch.cat(row_log_sum) + col_log_sum) / 2 - positive).mean()


def _log_sums(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    logits = LOGIT_SCALE * rows @ cols.T
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
