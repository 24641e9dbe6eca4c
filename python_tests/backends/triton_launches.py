"""What the Triton backend asks for, recorded instead of run, and compiled for any architecture: no GPU needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from oracle import random_embeddings
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from gapkernels import plan, similarity_ops
from gapkernels.backends import triton as triton_backend
from gapkernels.backends.contract import Scalars
from gapkernels.backends.triton import (
    device,
    gradient_tiles,
    launch,
    log_sums,
    products,
    row_gradients,
    row_statistics,
    softplus_sums,
    tile_sums,
    tuning,
)
from gapkernels.backends.triton.architectures import ARCHITECTURES
from gapkernels.distributed import World
from gapkernels.spec import LossSpec

ASK_FOR_PROCESSORS = (device, tile_sums, log_sums, softplus_sums, row_gradients, row_statistics)


class Launch(NamedTuple):
    """One launch of one kernel.

    Attributes:
        name: of the kernel.
        kernel: the kernel; None for a product by the vendor's library, which float32 takes.
        signature, constants, attributes, options: what its compilation depends on.
    """

    name: str
    kernel: Any = None
    signature: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    constants: dict[Any, Any] = {}  # noqa: RUF012
    attributes: dict[Any, Any] = {}  # noqa: RUF012
    options: Any = None

    @property
    def key(self) -> tuple[str, ...]:
        """Launches with one key share a binary."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return (self.name, *map(str, parts))


class Compiled(NamedTuple):
    """What a compiled kernel needs; registers and spilled bytes per thread."""

    registers: int
    spilled: int
    shared: int
    assembly: str


@contextmanager
def recorded(arch: str = "sm_90", all_candidates: bool = False) -> Iterator[list[Launch]]:
    """Record launches as on a GPU of this architecture; nothing runs.

    Args:
        arch: of ``ARCHITECTURES``.
        all_candidates: record every configuration of the tuning table instead of the default.
    """
    launches: list[Launch] = []
    target = make_backend(ARCHITECTURES[arch].target)

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, target)
        kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(target, kwargs, bound, specialization, options)
        launches.append(Launch(kernel.__name__, kernel, signature, constants, attributes, options))

    def choose(kernel: str, like: torch.Tensor, launch: Any, reset: Any = None) -> tuning.Config:
        options = tuning.candidates(kernel, arch, like.dtype, like.shape[1])
        for config in options[1:] if all_candidates else ():
            launch(config)
        return options[0]

    def product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
        launches.append(Launch("product"))

    with ExitStack() as patches:
        for owner, name, replacement in (
            (JITFunction, "run", record),
            (tuning, "choose", choose),
            (launch, "_IS_KNOWN", False),  # nothing to remember where nothing is compiled
            (products, "_library_product", product),
            *((module, "num_processors", mock.Mock(return_value=132)) for module in ASK_FOR_PROCESSORS),
            *(
                (module, "architecture", mock.Mock(return_value=arch))
                for module in (device, tuning, gradient_tiles, products)
            ),
        ):
            patches.enter_context(mock.patch.object(owner, name, replacement))
        yield launches


def evaluate(
    n: int,
    dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    modalities: int = 2,
    needs_grad: tuple[bool, ...] = (True, True, True),
    world: World | None = None,
    spec: LossSpec | None = None,
    offset: int = 0,
    keep: bool = True,
) -> None:
    """Forward and backward pass of the Triton backend, as the plan drives it; rows begin ``offset`` numbers late."""
    embeddings = [
        torch.cat([e.new_zeros(offset), e.flatten()])[offset:].view(n, dim)
        for e in random_embeddings(n, dim, modalities, dtype=dtype)
    ]
    numbers = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 1.0, 1.0], 2.0))
    scalars = Scalars(torch.tensor(14.3, requires_grad=needs_grad[-1]), *numbers)
    implementation, spec, world = triton_backend.create(), spec or LossSpec(), world or World()
    found = plan.forward(embeddings, scalars, spec, implementation, world, keep=keep)
    upstream = torch.ones(3, dtype=torch.float64)
    plan.backward(upstream, embeddings, scalars, found.saved, spec, implementation, world, list(needs_grad), found.kept)


def evaluate_sums(
    n: int,
    dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    ids: bool = False,
    limits: tuple[bool, bool] = (False, False),
    softplus: bool = False,
    matched: bool = True,
    offset: int = 0,
) -> None:
    """Sums along the rows and columns of one matrix, and their gradients; all but the rows begin ``offset`` late."""

    def vector(wanted: bool, kind: torch.dtype = torch.float64) -> torch.Tensor | None:
        return torch.zeros(n + offset, dtype=kind)[offset:] if wanted else None

    rows, cols = random_embeddings(n, dim, dtype=dtype)
    mask = similarity_ops.Mask(*(vector(ids, torch.int64) for _ in range(2)), *map(vector, limits))
    spec = LossSpec(anchor=1, atp=False, cu=False)
    p = similarity_ops._Problem(rows, cols, torch.tensor(14.3), mask, matched, spec, triton_backend.create(), World())
    weights = vector(True), vector(True), vector(matched)
    needs = [True, True, True]
    if softplus:
        bias = torch.tensor(-2.0, dtype=torch.float64)
        operands, _ = p.operands()
        ((matrix, _),) = p.matrices(operands)
        sums = p.backend.softplus_sums(matrix, bias)
        similarity_ops._softplus_gradients(p, weights[1:] if matched else (weights[0], None), bias, sums.sigmoid, needs)
    else:
        row_sums, col_sums, _, all_cols = similarity_ops._log_sums(p)
        similarity_ops._log_sum_gradients(p, weights, row_sums, col_sums, all_cols, needs)


def compile_for(launch: Launch, arch: str) -> Compiled:
    """Compile what one launch asks for."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=ARCHITECTURES[arch].target, options=launch.options.__dict__)
    shared = compiled.metadata.shared
    if arch.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{what}:\s+(\d+)", assembly)[1]) for what in ("vgpr_count", "vgpr_spill_count")
        )
        return Compiled(registers, spilled, shared, assembly)
    return Compiled(*_resource_usage(compiled.asm["cubin"]), shared, compiled.asm["ptx"])


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of the largest function in a binary."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", text)))
    memory = max(int(stack) + int(local) for stack, local in re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", text))
    return registers, memory
