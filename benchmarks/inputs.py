"""The embeddings that every implementation is measured on."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case


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
