"""The Triton backend: fused kernels for NVIDIA and AMD GPUs. Imports Triton only when it is used."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gapkernels.backends.triton.backend import TritonBackend

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unusable_because(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why the backend cannot run here, with the remedy; None if it can.

    Args:
        device: where the embeddings are; None asks about any device of this machine.
        dtype: of the embeddings.
    """
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed (pip install "gapkernels[triton]")'
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {triton.__version__} is older than {oldest} (pip install 'triton>={oldest}')"
    if dtype == torch.float64:
        return "float64 embeddings need backend='torch'"
    if triton.knobs.runtime.interpret:
        return None if device is None or device.type == "cpu" else "Triton's interpreter takes tensors on the CPU"
    if device is not None and device.type != "cuda":
        return f"it runs on CUDA and ROCm devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA or ROCm device"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return "compute capability {}.{} is below {}.{}".format(*capability, *OLDEST_CAPABILITY)
    return None


def create() -> TritonBackend:
    """An instance of the backend."""
    from gapkernels.backends.triton.backend import TritonBackend

    return TritonBackend()


def device_name() -> str:
    """What the kernels run on, for reports; call only where the backend can run."""
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton's interpreter (TRITON_INTERPRET=1; for tests, slow)"
    return torch.cuda.get_device_name()
