"""Backends: interchangeable ways to compute the same loss, and which of them can run here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from gapkernels.backends import triton as triton_backend
from gapkernels.backends.exponential import Backend
from gapkernels.backends.tiled import TiledBackend

if TYPE_CHECKING:
    from gapkernels.plan import FusedBackend

NAMES = ("reference", "torch", "triton")
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
        ['reference', 'torch', 'triton']
    """
    return [
        Status("reference", True, "dense autograd, O(N²) memory, any device: the definition; never chosen by auto"),
        Status("torch", True, f"tiled, O(N·D) memory, any device ({_cpu_products()})"),
        _triton_status(),
    ]


def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend | FusedBackend:
    """The backend of a name for embeddings of a type on a device; ``"auto"`` takes the fastest usable."""
    assert name in ("auto", "torch", "triton"), name
    if name == "torch":
        return TiledBackend()
    reason = triton_backend.unusable_because(device, dtype)
    if reason is None and (name == "triton" or device.type == "cuda"):
        return triton_backend.create()
    if name == "triton" and dtype == torch.float64:
        raise TypeError(
            "backend='triton' takes float32, bfloat16 and float16 embeddings, got float64; choose backend='torch'"
        )
    if name == "triton":
        raise RuntimeError(f"backend='triton' cannot be used here: {reason}; choose backend='torch'")
    return TiledBackend()


def _cpu_products() -> str:
    from gapkernels.backends.tiled import onednn_is_faster

    library = "oneDNN" if onednn_is_faster() else "torch.mm"
    return f"float32 products on this CPU by {library}"


def _triton_status() -> Status:
    reason = triton_backend.unusable_because()
    return Status(
        "triton", reason is None, reason or f"fused kernels on {triton_backend.device_name()}; auto's choice there"
    )
