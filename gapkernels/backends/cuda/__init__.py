"""The CUDA backend: tensor-core kernels for Hopper (H100, H200) from ``csrc/``, compiled on the user's machine.

Only the three steps that cost N² differ from the Triton backend, whose other functions it inherits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gapkernels.backends import triton as triton_backend

if TYPE_CHECKING:
    from gapkernels.backends.cuda.kernels import CudaBackend

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
BUILD_COMMAND = "python -m gapkernels.backends.cuda.build"
"""Compiles the kernels ahead of time."""


def unusable_because(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why the backend cannot run here, with the remedy; None if it can, perhaps after compiling its kernels.

    Args:
        device: where the embeddings are; None asks about any device of this machine.
        dtype: of the embeddings.
    """
    if dtype is not None and dtype not in DTYPES:
        return f"it takes bfloat16 and float16 embeddings, not {str(dtype).removeprefix('torch.')}"
    reason = triton_backend.unusable_because(device)
    if reason is not None:
        return reason
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return "its kernels are for compute capability {}.{} (Hopper), not {}.{}".format(*CAPABILITY, *capability)
    from gapkernels.backends.cuda import build

    return None if is_compiled() else build.missing_tool()


def is_compiled() -> bool:
    """Whether the kernels of this version have been compiled on this machine."""
    from gapkernels.backends.cuda import build

    return build.is_loaded() or build.library().exists()  # the name of the library costs reading all sources


def create() -> CudaBackend:
    """An instance of the backend; compiles its kernels first where that has not been done yet.

    Raises:
        BuildError: the kernels cannot be compiled here.
    """
    from gapkernels.backends.cuda import build
    from gapkernels.backends.cuda.kernels import CudaBackend

    build.load()
    return CudaBackend()
