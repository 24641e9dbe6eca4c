"""Which backward pass runs: by blocks of gradients (:mod:`.backend`) or by whole rows (:mod:`.row_backward`).

Both compute the same products. By blocks, a pair takes 6·N²·D operations and N² exponentials, and its N² numbers are
written to the L2 cache and read twice; by rows, 8·N²·D operations and 2·N² exponentials, nothing else and few launches.
So rows win where they are short or few. The rule is a count, made before any measurement; set GAPKERNELS_BACKWARD to
``rows`` or ``blocks`` to measure both.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from gapkernels.backends.triton import device, tuning
from gapkernels.backends.triton.gradient_rows import row_length
from gapkernels.backends.triton.row_statistics import padded
from gapkernels.distributed import World
from gapkernels.spec import LossSpec

VARIABLE = "GAPKERNELS_BACKWARD"
EXPONENTIALS = 16  # per clock and processor, on all NVIDIA parts since sm_70 and, nearly, on gfx942
FLOAT32_OPERATIONS = 256  # per clock and processor, outside of the tensor cores
CLOCK = 1.7e9
LAUNCHES_SAVED = 10  # 9 against 19, for two modalities and all terms up to N = 4096
LAUNCH_SECONDS = 3e-6  # from one small kernel to the next when Python launches them one by one


class Rates(NamedTuple):
    """What one processor does in a clock.

    Attributes:
        operations: of dense 16-bit matrix products, from the vendors' documentation.
        bytes: that it gets from the L2 cache when all processors do; an estimate, half of what is documented for sm_80.
    """

    operations: float
    bytes: float


RATES = {"sm_80": Rates(2048, 24), "sm_90": Rates(4096, 24), "sm_100": Rates(8192, 24), "gfx942": Rates(2048, 16)}


def by_rows(embeddings: list[Tensor], spec: LossSpec, world: World) -> bool:
    """Whether the backward pass of these embeddings goes by whole rows.

    By blocks always: several processes, whose matrices are not square; rows that do not fit the registers.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen not in ("", "rows", "blocks"):
        raise ValueError(f"{VARIABLE} must be 'rows', 'blocks' or empty, got {chosen!r}")
    like = embeddings[0]
    arch = device.architecture(like.device)
    if world.size > 1 or not tuning.candidates("gradient_rows", arch, like.dtype, padded(like.shape[1])):
        return False
    if chosen or device.INTERPRETED:
        return chosen == "rows"
    pairs = len(spec.nce_pairs(len(embeddings))) if spec.nce_weight else 0
    matrices = pairs + (0.5 if spec.cu_weight else 0.0)  # a triangle of centroids: 4 against 3, half of a pair's
    return (
        seconds_lost(arch, like.dtype, like.shape[0], like.shape[1], matrices, device.num_processors(like.device)) <= 0
    )


def seconds_lost(arch: str, dtype: torch.dtype, num_rows: int, dim: int, matrices: float, processors: int) -> float:
    """What going by rows costs more than going by blocks, by the count; negative where it costs less."""
    rows, blocks = clocks_per_entry(arch, dtype, padded(dim))
    entries = matrices * num_rows * num_rows
    return entries * (rows - blocks) / (processors * CLOCK) - LAUNCHES_SAVED * LAUNCH_SECONDS


def clocks_per_entry(arch: str, dtype: torch.dtype, dim: int) -> tuple[float, float]:
    """The counted floor per entry of a pair's matrix, in clocks of one processor: ``(by rows, by blocks)``.

    By rows: 8·D operations beside two exponentials, D rounded up to what registers hold. By blocks: 2·D operations
    beside one exponential and a number written; then two products, 4·D operations beside reading it twice.
    """
    rates = RATES[tuning.nearest(arch)]
    operations = rates.operations
    if dtype == torch.float32:
        operations = FLOAT32_OPERATIONS if device.input_precision(dtype) == "ieee" else operations / 2
    rows = max(8 * row_length(dim) / operations, 2 / EXPONENTIALS)
    tiles = max(2 * dim / operations, 1 / EXPONENTIALS, dtype.itemsize / rates.bytes)
    products = max(4 * dim / operations, 2 * dtype.itemsize / rates.bytes)
    return rows, tiles + products
