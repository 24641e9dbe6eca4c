"""The CPU backend: fused C++ kernels from ``csrc/cpu``, compiled on the user's machine for its processor.

Matrix products are those of torch's own library, called on tiles that are in cache; exponentials, sums and everything
that is O(N·D) are vector code. See ``csrc/cpu/kernels.h`` for what there is.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gapkernels.backends.cpu.backend import CpuBackend

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BUILD_COMMAND = "python -m gapkernels.backends.cpu.build"
"""Compiles the kernels ahead of time."""


def unusable_because(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why the backend cannot run here, with the remedy; None if it can, perhaps after compiling its kernels.

    Args:
        device: where the embeddings are; None asks about any device of this machine.
        dtype: of the embeddings.
    """
    if device is not None and device.type != "cpu":
        return f"it runs on CPUs, not on {device.type}"
    if dtype is not None and dtype not in DTYPES:
        return f"it takes float64, float32, bfloat16 and float16 embeddings, not {str(dtype).removeprefix('torch.')}"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"it needs a torch with DLPack's exchange table, which {torch.__version__} does not have"
    from gapkernels.backends.cpu import build

    if build.instruction_set() is None:
        return f"it needs AVX2 or AVX-512, and torch reports {torch.backends.cpu.get_cpu_capability()}"
    return None if is_compiled() else build.missing_tool()


def is_compiled() -> bool:
    """Whether the kernels of this version have been compiled on this machine."""
    from gapkernels.backends.cpu import build

    return build.is_loaded() or build.library().exists()  # the name of the library costs reading all sources


def create() -> CpuBackend:
    """An instance of the backend; compiles its kernels first where that has not been done yet.

    Raises:
        BuildError: the kernels cannot be compiled here.
    """
    from gapkernels.backends.cpu.backend import CpuBackend

    return CpuBackend()


@functools.cache
def ready() -> bool:
    """Whether ``"auto"`` may take this backend: compiles it where that is possible and allowed, and says so.

    A compilation that fails is reported once, as a warning; training goes on with another backend.
    """
    from gapkernels.backends import native_build

    if unusable_because() is not None or not (is_compiled() or native_build.may_compile()):
        return False
    try:
        create()
    except native_build.BuildError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return False
    return True
