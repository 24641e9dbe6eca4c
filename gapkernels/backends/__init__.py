"""Backends: interchangeable ways to compute the same loss, and which of them can run here."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gapkernels.backends.exponential import Backend
from gapkernels.backends.tiled import TiledBackend

NAMES = ("reference", "torch")
"""Names accepted for ``backend``, besides ``"auto"``."""


class Status(NamedTuple):
    """Whether a backend can run here, and why."""

    name: str
    usable: bool
    reason: str


def available() -> list[Status]:
    """Every backend with whether it is usable here, in the order of :data:`NAMES`.

    Example:
        >>> [status.name for status in available()]
        ['reference', 'torch']
    """
    return [
        Status("reference", True, "dense autograd, O(N²) memory, any device: the definition; never chosen by auto"),
        Status("torch", True, f"tiled, O(N·D) memory, any device ({_cpu_products()})"),
    ]


def select(name: str, device: torch.device) -> Backend:
    """The tiled backend of a name for embeddings on a device; ``"auto"`` takes the fastest usable."""
    assert name in ("auto", "torch"), name
    return TiledBackend()


def _cpu_products() -> str:
    from gapkernels.backends.tiled import onednn_is_faster

    library = "oneDNN" if onednn_is_faster() else "torch.mm"
    return f"float32 products on this CPU by {library}"
