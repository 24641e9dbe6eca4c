"""GPU architectures the kernels are tuned for: one table, one row each.

A GPU that is not listed goes by ``nearest``. Adding one is adding a row; the compilation tests then compile every
configuration for it ahead of time and fail where one spills or needs more shared memory than there is.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.backends.compiler import GPUTarget


class Config(NamedTuple):
    """How one kernel is tiled and scheduled.

    Attributes:
        tile_m, tile_n: the tile of the matrix.
        tile_k: elements of the shared dimension per step.
        num_warps, num_stages: warps per program, depth of the software pipeline.
        programs_per_processor: of a persistent kernel; more than one lets one program's exponentials run under
            another's products.
        group: row tiles walked together.
        tma: read operands through the tensor copy engine where their alignment allows it.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    programs_per_processor: int = 1
    group: int = 8
    tma: bool = False


class Architecture(NamedTuple):
    """What is known of one architecture.

    Attributes:
        target: what Triton compiles for.
        shared_memory: bytes that one program may use, from the vendor's documentation.
        matrix_instruction: what a product on the tensor cores becomes in the assembly.
        sums, gradients, products: configurations for 16-bit operands of the kernels that sum matrices, write blocks of
            H and multiply them; the first is the default.
        log_sums_parts: by how much the recomputation of log sums divides the width of its tile.
    """

    target: GPUTarget
    shared_memory: int
    matrix_instruction: str
    sums: list[Config]
    gradients: list[Config]
    products: list[Config]
    log_sums_parts: int = 2


# Two programs of 128×128 per processor on sm_90: the accumulators of both fit the registers, and while one is in its
# exponentials the other keeps the tensor cores busy. sm_100 accumulates in tensor memory. Descriptors for the copy
# engine are made on the host, which Triton does for an argument of its own only: kernels that take tuples of matrices,
# those of the sums, have none.
_HOPPER_PRODUCTS = [
    Config(128, 256, 64, 8, 4, tma=True),
    Config(128, 256, 64, 8, 3, tma=True),
    Config(128, 128, 64, 8, 4, tma=True),
    Config(128, 128, 64, 8, 3),
]
ARCHITECTURES = {
    "sm_80": Architecture(
        GPUTarget("cuda", 80, 32),
        163 * 1024,
        "mma.sync",
        sums=[Config(128, 128, 64, 8, 3), Config(128, 256, 32, 8, 3)],
        gradients=[Config(128, 128, 64, 8, 3)],
        products=[Config(128, 256, 32, 8, 3), Config(128, 128, 64, 8, 3)],
    ),
    "sm_90": Architecture(
        GPUTarget("cuda", 90, 32),
        227 * 1024,
        "wgmma.mma_async",
        sums=[Config(128, 128, 64, 4, 3, programs_per_processor=2), Config(128, 256, 64, 8, 3)],
        gradients=[
            Config(128, 128, 64, 4, 3),
            Config(128, 128, 64, 4, 3, tma=True),
            Config(128, 256, 64, 8, 3, tma=True),
        ],
        products=_HOPPER_PRODUCTS,
    ),
    "sm_100": Architecture(
        GPUTarget("cuda", 100, 32),
        227 * 1024,
        "tcgen05.mma",
        sums=[Config(128, 128, 64, 8, 3, programs_per_processor=2)],
        gradients=[Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 3, tma=True)],
        products=_HOPPER_PRODUCTS,
        log_sums_parts=4,
    ),
    "gfx942": Architecture(
        GPUTarget("hip", "gfx942", 64),
        64 * 1024,
        "v_mfma",
        sums=[Config(128, 128, 64, 8, 2, programs_per_processor=2)],
        gradients=[Config(128, 128, 64, 8, 2)],
        products=[Config(128, 128, 64, 8, 2)],
    ),
}


def nearest(arch: str) -> Architecture:
    """The row of an architecture, ``"sm_90"`` or ``"gfx942"``: its own, or that of the latest older one of its kind."""
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    if arch.startswith("gfx"):
        return ARCHITECTURES["gfx942"]
    number = int(arch.removeprefix("sm_"))
    if number >= 120:
        return ARCHITECTURES["sm_80"]  # desktop parts: neither wgmma nor tensor memory, and 99 KiB of shared memory
    older = [int(name[3:]) for name in ARCHITECTURES if name.startswith("sm_") and int(name[3:]) <= number]
    return ARCHITECTURES[f"sm_{max(older, default=80)}"]
