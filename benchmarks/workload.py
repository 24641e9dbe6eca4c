"""What is measured: the embeddings that everybody gets, and one step on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Case

Loss = Callable[[Sequence[Tensor]], Tensor]


def embeddings(case: Case, device: torch.device) -> list[Tensor]:
    """M random tensors ``[N, D]``, the same for everybody; matching rows have a cosine of about one half."""
    generator = torch.Generator(device).manual_seed(case.samples * 31 + case.width)
    shape = (case.samples, case.width)
    dtype = getattr(torch, case.dtype)
    common = torch.randn(shape, generator=generator, device=device)
    return [
        (common + torch.randn(shape, generator=generator, device=device)).to(dtype).requires_grad_(case.backward)
        for _ in range(case.modalities)
    ]


def step(function: Loss, inputs: Sequence[Tensor], backward: bool) -> Tensor:
    """The loss, and its gradients if asked for."""
    if not backward:
        with torch.no_grad():
            return function(inputs)
    loss = function(inputs)
    loss.backward()
    return loss.detach()


def clear_gradients(inputs: Sequence[Tensor]) -> None:
    """Forget the gradients of an earlier step, as an optimiser does between two."""
    for z in inputs:
        z.grad = None
