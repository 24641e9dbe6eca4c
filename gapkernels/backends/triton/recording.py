"""Repeating a pass: what the plan launched for arguments of one kind is launched again without the plan.

A small batch is bound by what the host does between launches: the plan, buffers, views, what follows from the kind of
each kernel's arguments. None of that depends on numbers in the batch. So the second evaluation of a kind is recorded,
and from the third on its launches follow one another with nothing in between but the addresses put in:

    recorded    launch k: binary, grid, arguments; each tensor as (base, offset) with the base an input, an output, or
                a place in one of two workspaces, of what is kept for the backward pass and of what is not
    repeated    allocate outputs and workspaces, add offsets to their addresses, launch

The order of launches is the plan's, and so is what they compute: there is no second one to maintain. Places in the
workspace of what is not kept are shared by buffers that are not in use at the same time. A pass in which torch itself
computes anything (a product by the vendor's library, a copy of rows without unit stride) is not repeated but planned
every time, as are all passes under Triton's profiling hooks and, but for tests, in its interpreter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from gapkernels.backends.triton.device import INTERPRETED

ALIGNMENT = 512
"""Of buffers in a workspace, as torch's allocator aligns them."""

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}
_active = threading.local()


class Place(NamedTuple):
    """A tensor argument: where it lies in the memory of a base, and what it looks like there.

    Attributes:
        base: number of the base.
        offset: bytes.
        dtype, size, stride: of the tensor.
    """

    base: int
    offset: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    def of(self, bases: Sequence[Tensor]) -> Tensor:
        """The tensor."""
        base = bases[self.base]
        if base.dtype != torch.uint8:  # no workspace
            return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset // base.itemsize)
        extent = 0 if 0 in self.size else 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        inside = base[self.offset : self.offset + extent * self.dtype.itemsize]
        return inside.view(self.dtype).as_strided(self.size, self.stride)


class Expression(NamedTuple):
    """An argument as ``as_function`` writes it: Python, of the function's parameters."""

    text: str


class DescriptorPlace(NamedTuple):
    """A tensor that the copy engine reads, by its descriptor."""

    place: Any
    shape: Any
    strides: Any
    block_shape: list[int]


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kernel: under ``triton.jit``.
        compiled: its binary; None in the interpreter.
        grid: numbers of programs.
        args: with places for tensors.
        compile_time: values of the compile-time parameters, which come last.
        constants: these and the options, by name.
    """

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    compile_time: tuple[Any, ...]
    constants: dict[str, Any]


class _Described(int):
    """An address that Triton's launcher takes for a descriptor, and for the tensor it is made from.

    Making one takes a tenth of the time of a ``TensorDescriptor``, and a block of gradients has four.
    """

    padding, round_f32_to_tf32 = "zero", False

    @property
    def base(self) -> _Described:
        return self

    def data_ptr(self) -> int:
        return int(self)


class Recorder(TorchDispatchMode):
    """Notes what a pass allocates and launches, while it runs as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []
        self.launches: list[Launch] = []
        self.refused = ""
        self._looks_away = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._looks_away:
            return result
        if func in _ALLOCATIONS:
            self.buffers.append(result)  # kept until the end: addresses then tell buffers apart
        elif not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.refused = self.refused or str(func)
        return result

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], compile_time: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        """Launch a kernel, see ``Launch``, and note it; what Triton does to that end is its own."""
        self._looks_away = True
        try:
            compiled = kernel[grid](*args, **constants)
        finally:
            self._looks_away = False
        if compiled is None and not INTERPRETED:
            self.refused = self.refused or "a kernel was not compiled"
        self.launches.append(Launch(kernel, compiled, grid, args, compile_time, constants))


def active() -> Recorder | None:
    """The recorder of this thread."""
    return getattr(_active, "recorder", None)


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Record what this thread launches."""
    recorder = _active.recorder = Recorder()
    try:
        with recorder:
            yield recorder
    finally:
        _active.recorder = None


class Recording:
    """The launches of a pass, to be repeated.

    Args:
        recorder: of the pass.
        inputs: tensors of the caller's, in the order in which their addresses will be given.
        saved: what an earlier pass has kept, as tensors and places in its workspace, the next base.
        outputs: what the pass returns; bases of their own.
        kept: what is kept for a later pass, in a workspace of its own.

    Attributes:
        refused: why the pass cannot be repeated; empty if it can.
        kept_bytes, scratch_bytes: sizes of the two workspaces.
        kept_places: of ``kept``, with 0 as their base.
        outputs: shapes and types of what is returned.
    """

    def __init__(
        self,
        recorder: Recorder,
        inputs: Sequence[Tensor],
        saved: Sequence[tuple[Tensor, Place]],
        outputs: Sequence[Tensor],
        kept: Sequence[Tensor | None],
    ) -> None:
        self.refused = recorder.refused
        self.outputs = [(tuple(o.shape), o.dtype) for o in outputs]
        self.kept_places: list[Place | None] = []
        self.kept_bytes = self.scratch_bytes = 0
        self._launches: list[Launch] = []
        self._written: Callable[[tuple[int, ...], int], None] | None = None
        exact = {tensor.data_ptr(): base for base, tensor in enumerate(inputs)}
        if len(exact) < len(inputs):
            self.refused = self.refused or "two inputs lie at one address"
        if self.refused:
            return
        saved_base = len(inputs)
        first_output = saved_base + bool(saved)
        kept_base = first_output + len(outputs)
        regions = [
            (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), saved_base, place.offset)
            for tensor, place in saved
        ]
        whose = [self._owner(buffer, outputs, kept) for buffer in recorder.buffers]
        for number, output in enumerate(outputs):
            if [b.nbytes for b, owner in zip(recorder.buffers, whose, strict=True) if owner == number] != [
                output.nbytes
            ]:
                self.refused = "an output was not allocated in the pass"
                return
        offsets = self._offsets(recorder, whose, len(outputs))
        for buffer, owner, offset in zip(recorder.buffers, whose, offsets, strict=True):
            start = buffer.data_ptr()
            regions.append((start, start + buffer.nbytes, first_output + owner, offset))

        def place(tensor: Tensor) -> Place:
            address = tensor.data_ptr()
            look = tensor.dtype, tensor.shape, tensor.stride()
            if address in exact:
                return Place(exact[address], 0, *look)
            for start, end, base, offset in regions:
                if start <= address < end:
                    return Place(base, offset + address - start, *look)
            if tensor.numel() == 0:
                return Place(kept_base + 1, 0, *look)  # never read
            self.refused = "a tensor is neither an input nor was it made in the pass"
            return Place(0, 0, *look)

        self.kept_places = [None if t is None else place(t)._replace(base=0) for t in kept]
        for launch in recorder.launches:
            self._launches.append(launch._replace(args=_mapped(launch.args, place)))

    @staticmethod
    def _owner(buffer: Tensor, outputs: Sequence[Tensor], kept: Sequence[Tensor | None]) -> int:
        """Which base a buffer becomes, counted from the first output: one of these, what is kept, or what is not."""
        inside = [
            buffer.data_ptr() <= tensor.data_ptr() < buffer.data_ptr() + buffer.nbytes
            for tensor in (*outputs, *(t for t in kept if t is not None))
        ]
        for number in range(len(outputs)):
            if inside[number]:
                return number
        return len(outputs) + (not any(inside[len(outputs) :]))

    def _offsets(self, recorder: Recorder, whose: list[int], num_outputs: int) -> list[int]:
        """Places of buffers in their bases; buffers in use at the same time do not overlap."""
        uses: list[list[int]] = [[] for _ in recorder.buffers]
        for number, launch in enumerate(recorder.launches):
            for tensor in _tensors(launch.args):
                address = tensor.data_ptr()
                for place, buffer in enumerate(recorder.buffers):
                    if buffer.data_ptr() <= address < buffer.data_ptr() + buffer.nbytes:
                        uses[place].append(number)
        offsets = []
        taken: list[tuple[int, int, int, int]] = []  # start, end, first and last launch
        for buffer, owner, launches in zip(recorder.buffers, whose, uses, strict=True):
            size = -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
            if owner < num_outputs:
                offset = 0
            elif owner == num_outputs:
                offset = self.kept_bytes
                self.kept_bytes += size
            else:
                offset = 0
                first, last = (min(launches), max(launches)) if launches else (0, 0)
                for start, end, since, until in sorted(taken):
                    if since <= last and first <= until and start < offset + size and offset < end:
                        offset = end
                taken.append((offset, offset + size, first, last))
                self.scratch_bytes = max(self.scratch_bytes, offset + size)
            offsets.append(offset)
        return offsets

    def run(self, addresses: tuple[int, ...], stream: int) -> None:
        """Launch everything.

        Args:
            addresses: of the inputs, of what was saved (if anything was), of the outputs, of the two workspaces.
            stream: to launch on.
        """
        if self._written is None:
            self._written = as_function(self._launches)
        self._written(addresses, stream)

    def run_by_triton(self, bases: Sequence[Tensor]) -> None:
        """The same through Triton's own launcher, with tensors for addresses: what its interpreter takes."""

        def argument(arg: Any) -> Any:
            if isinstance(arg, Place):
                return arg.of(bases)
            if isinstance(arg, DescriptorPlace):
                return _descriptor(arg.place.of(bases), arg)
            return tuple(map(argument, arg)) if type(arg) is tuple else arg

        for launch in self._launches:
            launch.kernel[launch.grid](*map(argument, launch.args), **launch.constants)


def as_function(launches: Sequence[Launch], parameters: Sequence[str] = ()) -> Callable[..., None]:
    """Launches written out as one function of addresses and a stream: additions of offsets are all that is left to do.

    A loop that puts addresses into the arguments takes longer than everything else of a step.

    Args:
        launches: their arguments with places among the addresses, and expressions, instead of tensors.
        parameters: of the function, after the two.
    """
    values: dict[str, Any] = {}
    bases: set[int] = set()

    def named(value: Any) -> str:
        name = f"v{len(values)}"
        values[name] = value
        return name

    def address(place: Place | Expression) -> str:
        if isinstance(place, Expression):
            return place.text
        bases.add(place.base)
        return f"b{place.base}+{place.offset}" if place.offset else f"b{place.base}"

    def written(arg: Any) -> str:
        if isinstance(arg, (Place, Expression)):
            return address(arg)
        if isinstance(arg, DescriptorPlace):
            look = {"shape": arg.shape, "strides": arg.strides, "block_shape": arg.block_shape}
            return f"{named(type('Described', (_Described,), look))}({address(arg.place)})"
        if type(arg) is tuple:
            return f"({''.join(written(a) + ', ' for a in arg)})"
        return repr(arg) if arg is None or type(arg) in (int, bool) else named(arg)

    lines = []
    for launch in launches:
        grid = (*launch.grid, 1, 1)[:3]
        known = [launch.compiled.function, launch.compiled.packed_metadata, None, None, None]
        args = [*map(written, grid), "stream", *map(written, (*known, *launch.args, *launch.compile_time))]
        lines.append(f" {named(launch.compiled.run)}({', '.join(args)})")
    lines = [
        f"def launch({', '.join(('addresses', 'stream', *parameters))}):",
        *(f" b{b} = addresses[{b}]" for b in sorted(bases)),
        *lines,
        " return",
    ]
    exec("\n".join(lines), values)
    return values["launch"]


def _descriptor(base: Any, place: DescriptorPlace) -> TensorDescriptor:
    result: TensorDescriptor = object.__new__(TensorDescriptor)
    result.base, result.shape, result.strides = base, place.shape, place.strides
    result.block_shape, result.padding, result.round_f32_to_tf32 = place.block_shape, "zero", False
    return result


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last number."""
    if tensor.numel() == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, TensorDescriptor):
            yield arg.base
        elif type(arg) is tuple:
            yield from _tensors(arg)


def _mapped(args: tuple[Any, ...], place: Callable[[Tensor], Place]) -> tuple[Any, ...]:
    def argument(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return place(arg)
        if isinstance(arg, TensorDescriptor):
            return DescriptorPlace(place(arg.base), arg.shape, arg.strides, arg.block_shape)
        return _mapped(arg, place) if type(arg) is tuple else arg

    return tuple(map(argument, args))


def launches_directly() -> bool:
    """Whether binaries are launched without asking Triton: no profiler wants to know of launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is None or not getattr(hook, "calls", True)
