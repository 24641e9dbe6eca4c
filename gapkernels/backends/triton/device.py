"""What the launchers ask about devices."""

from __future__ import annotations

import functools

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when Triton is first imported)."""


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device; two stand for the interpreter."""
    if INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, …, the key of the tuning table; ``"interpreter"`` without a device."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def input_precision(dtype: torch.dtype) -> str:
    """What ``tl.dot`` does with float32 operands: torch's own switch. Means nothing for other types."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def cdiv(a: int, b: int) -> int:
    """⌈a/b⌉. Triton's own, made for kernels too, takes a hundred times as long here, several times a launch."""
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is not smaller; as ``triton.next_power_of_2``, see ``cdiv``."""
    return 1 << (x - 1).bit_length()


def row_block(dim: int, elements: int) -> tuple[int, int]:
    """``(rows, columns)`` of a block that holds whole rows of length ``dim`` and about ``elements`` numbers."""
    columns = next_power_of_2(dim)
    if INTERPRETED:
        elements *= 32  # each operation costs the same there, however many numbers it is on
    return max(1, elements // columns), columns
