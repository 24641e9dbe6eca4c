"""Backends: interchangeable ways to compute the same loss, and which of them can run here."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from gapkernels import cpu as processor
from gapkernels.backends import cpu as cpu_backend
from gapkernels.backends import cuda as cuda_backend
from gapkernels.backends import triton as triton_backend
from gapkernels.backends.contract import Backend
from gapkernels.backends.cuda import speed_record
from gapkernels.backends.tiled import TiledBackend
from gapkernels.spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor

    from gapkernels.backends.cuda.speed_record import Region

NAMES = ("reference", "torch", "cpu", "triton", "cuda")
"""Names accepted for ``backend``, besides ``"auto"``."""


class Status(NamedTuple):
    """Whether a backend can run here, and why."""

    name: str
    usable: bool
    reason: str


def available() -> list[Status]:
    """Every backend with whether it is usable here, in the order of ``NAMES``.

    Examples:
        >>> [status.name for status in available()]
        ['reference', 'torch', 'cpu', 'triton', 'cuda']
    """
    return [
        Status("reference", True, "dense autograd, O(N²) memory, any device: the definition; never chosen by auto"),
        Status("torch", True, f"tiled, O(N·D) memory, any device ({_cpu_products()})"),
        _cpu_status(),
        _triton_status(),
        _cuda_status(),
    ]


def select(name: str, like: Tensor, spec: LossSpec) -> Backend:
    """The backend of a name for embeddings like these; ``"auto"`` takes the fastest that is known to be.

    That is Triton on a GPU it runs on, the CUDA kernels where a recorded measurement says so
    (``gapkernels.backends.cuda.speed_record``) and they have been compiled; on a CPU the C++ kernels, which the first
    call compiles (GAPKERNELS_BUILD=0 forbids that); else, and for centroids of any length, the tiled backend. It
    never starts a compilation by nvcc.

    Args:
        name: of ``NAMES`` but ``"reference"``, or ``"auto"``.
        like: ``[N, D]``; its device, type and size decide.
        spec: what is to be computed.

    Raises:
        TypeError: the backend does not compute in this type.
        RuntimeError: the backend cannot be used here; says why and what to choose instead.
    """
    if name == "auto":
        name = _fastest(like, spec)
    return _create(name, like.device, like.dtype)


def in_multiplied_type(embeddings: list[Tensor], name: str) -> list[Tensor]:
    """The embeddings, rounded to bfloat16 where torch's switch asks for it and the backend does not do it itself.

    That is the case for float32 in the CPU kernels after ``torch.set_float32_matmul_precision("medium")``, on
    processors that multiply bfloat16. Autograd gives their gradients in float32.

    Args:
        embeddings: of one type, on one device.
        name: of the backend, or ``"auto"``.
    """
    first = embeddings[0]
    if first.dtype == torch.float32 and first.device.type == "cpu" and _rounds_float32(name):
        return [e.to(torch.bfloat16) for e in embeddings]
    return embeddings


def _rounds_float32(name: str) -> bool:
    asked = processor.multiplies_bfloat16() and torch.get_float32_matmul_precision() == "medium"
    return asked and (name == "cpu" or (name == "auto" and cpu_backend.ready()))


# What torch.compile cannot trace: as it is when the caller is compiled. This is torch.compiler.assume_constant_result
# without the second that importing torch._dynamo takes.
_rounds_float32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select_for_sums(name: str, like: Tensor, needs: frozenset[str]) -> Backend:
    """The backend of a name for sums along one matrix; ``"auto"`` takes the fastest that computes what they need.

    Args:
        name, like: as for ``select``.
        needs: see ``gapkernels.backends.contract.Backend.sums_of``.

    Raises:
        TypeError, RuntimeError: as ``select``.
        ValueError: the backend of this name does not compute what is needed; names one that does.
    """
    backend = select(name, like, LossSpec())
    if needs <= backend.sums_of:
        return backend
    on_gpu = like.device.type == "cuda" and triton_backend.unusable_because(like.device, like.dtype) is None
    instead = "triton" if on_gpu else "torch"
    if name == "auto":
        return _create(instead, like.device, like.dtype)
    missing = ", ".join(sorted(needs - backend.sums_of))
    raise ValueError(f"backend={name!r} does not compute sums with {missing}; choose backend={instead!r}")


def _fastest(like: Tensor, spec: LossSpec) -> str:
    if spec.cu and not spec.normalize and not spec.normalize_centroids:
        return "torch"  # centroids of any length take float64 where they lie far apart, which the tiled backend has
    if like.device.type == "cpu" and cpu_backend.ready():
        return "cpu"
    if like.device.type != "cuda":
        return "torch"
    usable, cuda_faster = _known_of(like.device, like.dtype)
    if not usable:
        return "torch"
    return "cuda" if cuda_faster is not None and cuda_faster.holds(*like.shape) else "triton"


@functools.cache
def _known_of(device: torch.device, dtype: torch.dtype) -> tuple[bool, Region | None]:
    """Whether Triton can be used, and where the CUDA kernels are to be preferred to it.

    Asked twice in every training step, it is found out once: that takes 0.1 ms.
    """
    usable = triton_backend.unusable_because(device, dtype) is None
    ready = cuda_backend.unusable_because(device, dtype) is None and cuda_backend.is_compiled()
    return usable, speed_record.region(dtype) if ready else None


@functools.cache
def _create(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend, checked and made once for each type on each device."""
    if name == "torch":
        return TiledBackend()
    backend, instead = {
        "cpu": (cpu_backend, "torch"),
        "triton": (triton_backend, "torch"),
        "cuda": (cuda_backend, "triton"),
    }[name]
    if dtype not in backend.DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in backend.DTYPES)
        given, other = str(dtype).removeprefix("torch."), "torch" if dtype == torch.float64 else instead
        raise TypeError(f"backend={name!r} takes {accepted} embeddings, got {given}; choose backend={other!r}")
    reason = backend.unusable_because(device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot be used here: {reason}; choose backend={instead!r}")
    return backend.create()


def _cpu_products() -> str:
    from gapkernels.backends.tiled.tiles import onednn_is_faster

    library = "oneDNN" if onednn_is_faster() else "torch.mm"
    return f"float32 products on this CPU by {library}"


def _cpu_status() -> Status:
    reason = cpu_backend.unusable_because()
    if reason is not None:
        return Status("cpu", False, reason)
    from gapkernels.backends.cpu import build

    command = cpu_backend.BUILD_COMMAND
    how = "" if cpu_backend.is_compiled() else f", not compiled yet ({build.COMPILE_TIME}: {command}, or first use)"
    return Status("cpu", True, f"fused C++ kernels for {build.instruction_set()}{how}; auto's choice on a CPU")


def _triton_status() -> Status:
    reason = triton_backend.unusable_because()
    if reason is not None:
        return Status("triton", False, reason)
    from gapkernels.backends.triton.launch import described as launches

    cuda_is_faster = cuda_backend.unusable_because() is None and cuda_backend.is_compiled() and speed_record.regions()
    choice = "auto's choice there" + (" but where cuda is faster" if cuda_is_faster else "")
    return Status("triton", True, f"fused kernels on {triton_backend.device_name()}, {launches()}; {choice}")


def _cuda_status() -> Status:
    reason = cuda_backend.unusable_because()
    if reason is not None:
        return Status("cuda", False, reason)
    compiled = cuda_backend.is_compiled()
    how = "" if compiled else f", not compiled yet (about a minute: {cuda_backend.BUILD_COMMAND}, or first use by name)"
    choice = "by name only: no measurement shows them faster than Triton's"
    if faster := "; ".join(speed_record.described(speed_record.regions())):
        choice = f"auto's choice{'' if compiled else ' once compiled'} for {faster}"
    return Status("cuda", True, f"tensor-core kernels for Hopper{how}; {choice}")
