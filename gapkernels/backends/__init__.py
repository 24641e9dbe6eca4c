"""Backends: interchangeable ways to compute the same loss, and which of them can run here."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from gapkernels.backends import cuda as cuda_backend
from gapkernels.backends import triton as triton_backend
from gapkernels.backends.exponential import Backend
from gapkernels.backends.tiled import TiledBackend

if TYPE_CHECKING:
    from gapkernels.plan import FusedBackend

NAMES = ("reference", "torch", "triton", "cuda")
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
        ['reference', 'torch', 'triton', 'cuda']
    """
    return [
        Status("reference", True, "dense autograd, O(N²) memory, any device: the definition; never chosen by auto"),
        Status("torch", True, f"tiled, O(N·D) memory, any device ({_cpu_products()})"),
        _triton_status(),
        _cuda_status(),
    ]


@functools.cache
def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend | FusedBackend:
    """The backend of a name for embeddings of a type on a device; ``"auto"`` takes the fastest usable.

    Asked twice in every training step, it answers each question once: finding out takes 0.1 ms.

    ``"auto"`` does not take ``"cuda"``: no measurement yet shows by how much it is faster, or where.

    Raises:
        TypeError: the backend does not compute in this type.
        RuntimeError: the backend cannot be used here; says why and what to choose instead.
    """
    if name == "torch":
        return TiledBackend()
    if name == "auto":
        usable = device.type == "cuda" and triton_backend.unusable_because(device, dtype) is None
        return triton_backend.create() if usable else TiledBackend()
    backend, instead = {"triton": (triton_backend, "torch"), "cuda": (cuda_backend, "triton")}[name]
    if dtype not in backend.DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in backend.DTYPES)
        given, other = str(dtype).removeprefix("torch."), "torch" if dtype == torch.float64 else instead
        raise TypeError(f"backend={name!r} takes {accepted} embeddings, got {given}; choose backend={other!r}")
    reason = backend.unusable_because(device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot be used here: {reason}; choose backend={instead!r}")
    return backend.create()


def _cpu_products() -> str:
    from gapkernels.backends.tiled import onednn_is_faster

    library = "oneDNN" if onednn_is_faster() else "torch.mm"
    return f"float32 products on this CPU by {library}"


def _triton_status() -> Status:
    reason = triton_backend.unusable_because()
    return Status(
        "triton", reason is None, reason or f"fused kernels on {triton_backend.device_name()}; auto's choice there"
    )


def _cuda_status() -> Status:
    reason = cuda_backend.unusable_because()
    if reason is None and not cuda_backend.is_compiled():
        return Status("cuda", True, "tensor-core kernels for Hopper, to be compiled at first use (about a minute)")
    return Status("cuda", reason is None, reason or "tensor-core kernels for Hopper; ask for it by name")
