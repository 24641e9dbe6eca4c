"""Launching a kernel again and again: what follows from the kind of the arguments is looked up, not found out anew.

Triton finds out at every launch which of a kernel's binaries serves: it looks at the type and alignment of every
argument and puts a key together, 8 to 23 µs each time. A small batch has nothing to hide that behind. Here a launcher
says itself what its arguments are like (their *kind*), once for all of them, and a second launch of the same kind goes
straight to the binary of the first. The kind has to tell apart whatever Triton would tell apart; a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gapkernels.backends.triton import recording
from gapkernels.backends.triton.device import INTERPRETED

_bound: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

_IS_KNOWN = not INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6), (3, 7))
"""Whether a compiled kernel is run in the way below; another version's goes through Triton's own launcher."""


def launch(
    kernel: Any, grid: tuple[int, ...], kind: Hashable, args: tuple[Any, ...], constants: Callable[[], dict[str, Any]]
) -> recording.Launch | None:
    """``kernel[grid](*args, **constants())``.

    Args:
        kernel: a function under ``triton.jit`` whose compile-time parameters come last.
        grid: numbers of programs.
        kind: with the kernel and the device decides which binary runs: of ``args`` the types of tensors, whether their
            addresses are multiples of 16, values of numbers where Triton looks at them, and ``constants``.
        args: for the parameters that are not compile-time ones.
        constants: makes compile-time parameters and options; asked where the kind is new.

    Returns:
        The launch, where it went straight to a binary.
    """
    recorder = recording.active()
    if recorder is not None:
        named = constants()
        recorder.launch(kernel, grid, args, tuple(named[name] for name in kernel.arg_names[len(args) :]), named)
        return None
    if not is_direct():
        kernel[grid](*args, **constants())
        return None
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    key = (kernel.__name__, device, kind)
    found = _bound.get(key)
    if found is None:
        named = constants()
        compiled = kernel[grid](*args, **named)
        if compiled is not None:
            _bound[key] = compiled, tuple(named[name] for name in kernel.arg_names[len(args) :])
        return None
    compiled, compile_time = found
    compiled.run(
        grid[0],
        grid[1] if len(grid) > 1 else 1,
        1,
        driver.get_current_stream(device),
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *args,
        *compile_time,
    )
    return recording.Launch(kernel, compiled, grid, args, compile_time, {})


def is_direct() -> bool:
    """Whether launches go straight to binaries: this Triton is known, no profiler listens, and nothing is recorded."""
    return _IS_KNOWN and recording.active() is None and recording.launches_directly()


def described() -> str:
    """How kernels are launched here, for reports."""
    if _IS_KNOWN:
        return "launched directly, small batches without the plan"
    if INTERPRETED:
        return "interpreted"
    return f"launched by Triton {triton.__version__}, whose binaries only 3.6 and 3.7 let launch directly"


def can_repeat() -> bool:
    """Whether recorded launches can be repeated: this Triton is known, and no profiler listens."""
    return INTERPRETED or (_IS_KNOWN and recording.launches_directly())


def descriptor(tensor: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """``TensorDescriptor.from_tensor`` of a tensor that is known to suit the copy engine, without the checks."""
    result: TensorDescriptor = object.__new__(TensorDescriptor)
    result.base, result.shape, result.strides = tensor, tensor.shape, tensor.stride()
    result.block_shape, result.padding, result.round_f32_to_tf32 = block_shape, "zero", False
    return result


def layout(tensors: list[Tensor]) -> tuple[Any, ...]:
    """The kind of tensors that come from outside: all else is allocated here and aligned."""
    return (tensors[0].dtype, *((t.stride(0), t.data_ptr() % 16 == 0) for t in tensors))
