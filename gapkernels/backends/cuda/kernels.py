"""The CUDA backend: the Triton backend with the three functions that cost N² from ``csrc/``.

Matrices of 16-bit operands are computed here, those of float32 operands (the centroids of small problems) in Triton.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import IntEnum
from itertools import groupby

import torch
from torch import Tensor

from gapkernels.backends.contract import Matrix
from gapkernels.backends.triton import products
from gapkernels.backends.triton.backend import TritonBackend
from gapkernels.backends.triton.gradient_tiles import Moment, usable_entries
from gapkernels.backends.triton.recording import Launch
from gapkernels.backends.triton.tile_sums import room_for_sums

MAX_MATRICES = 8
"""Of one launch, as in ``csrc/similarity.h``."""

WIDEST_RESIDENT = 512
"""Longest rows that can stay in shared memory while a kernel walks along the columns, as in ``csrc/similarity.h``."""


class Variant(IntEnum):
    """How a kernel comes by its operands and who computes a tile, as in ``csrc/similarity.h``."""

    STREAMED = 0
    """Tiles of 128×128, both operands copied for each."""
    RESIDENT = 1
    """Tiles of 128×128, rows stay in shared memory for a walk along the columns."""
    WIDE = 2
    """Tiles of 128×256, both operands copied for each."""


RESIDENT_FROM: dict[tuple[str, torch.dtype], int] = {}
"""By kernel and type the width D from which on, up to ``WIDEST_RESIDENT``, rows stay: nowhere, until a measurement says
otherwise (``make gpu-kernels`` times all variants)."""

WIDE_FROM: dict[tuple[str, torch.dtype], int] = {}
"""By kernel and type the width D from which on tiles are wide where rows do not stay, by a measurement; where there is
none, by count: ``WIDE_BY_COUNT``."""

WIDE_BY_COUNT = 513
"""D from which on wide tiles take less time by count (docs/cuda-kernels.md), even if none of their exponentials
overlaps with products."""

VARIANT_VARIABLE = "GAPKERNELS_CUDA_VARIANT"
"""``streamed``, ``wide`` or ``resident`` (this wherever rows are short enough) instead of the tables."""


def choose_variant(kernel: str, dtype: torch.dtype, width: int) -> Variant:
    """The variant of a kernel that runs.

    Args:
        kernel: ``"similarity_stats"`` or ``"similarity_grad"``.
        dtype: of the operands.
        width: D, of the operands as stored.

    Raises:
        ValueError: the environment names a choice that there is not.
    """
    choice = os.environ.get(VARIANT_VARIABLE, "")
    if choice not in ("", *(variant.name.lower() for variant in Variant)):
        raise ValueError(f"{VARIANT_VARIABLE} must be 'streamed', 'resident' or 'wide', got {choice!r}")
    if choice in ("streamed", "wide"):
        return Variant[choice.upper()]
    resident_from = 0 if choice == "resident" else RESIDENT_FROM.get((kernel, dtype), WIDEST_RESIDENT + 1)
    if resident_from <= width <= WIDEST_RESIDENT:
        return Variant.RESIDENT
    return Variant.WIDE if width >= WIDE_FROM.get((kernel, dtype), WIDE_BY_COUNT) else Variant.STREAMED


PRODUCTS_FROM: dict[torch.dtype, int] = {}
"""By type the width D from which on the products of blocks are this backend's, by a measurement; where there is none,
by count: ``PRODUCTS_BY_COUNT``."""

PRODUCTS_BY_COUNT = 129
"""D from which on ``both_products`` takes no longer than Triton's by count (docs/cuda-kernels.md): its tiles have 256
columns, of which shorter rows leave half empty."""


def takes_products(dtype: torch.dtype, width: int) -> bool:
    """Whether products of blocks are this backend's, where the copy engine can read and write them.

    Args:
        dtype: of the block.
        width: D, of the operands as stored.
    """
    if dtype == torch.float32 or torch.are_deterministic_algorithms_enabled():
        return False  # parts are added in any order
    if chosen := products.choice():
        return chosen == "cuda"
    return width >= PRODUCTS_FROM.get(dtype, PRODUCTS_BY_COUNT)


class CudaBackend(TritonBackend):
    """``backend="cuda"``; what it does not replace is Triton's."""

    sums_of: frozenset[str] = frozenset()  # its kernels know neither weights nor masks

    def tile_sums(
        self,
        matrices: list[Matrix],
        largest: Tensor | None,
        headroom: int,
        zeros: Tensor | None = None,
        kept: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sums relative to the constant reference exponent; see ``gapkernels.backends.triton.tile_sums.tile_sums``.

        One launch for each type of operands, at most ``MAX_MATRICES`` matrices each. Entries are kept in bfloat16.
        """
        first = matrices[0]
        if first.rows.dtype == torch.float32:
            return super().tile_sums(matrices, largest, headroom, zeros, kept)
        _, row_sums, col_sums = room_for_sums(matrices, zeros)
        for part in _launches(matrices):
            members = matrices[part]
            torch.ops.gapkernels_cuda.similarity_stats(
                [m.rows for m in members],
                [m.row_factor for m in members],
                [m.cols for m in members],
                [m.col_factor for m in members],
                [_scale(m) for m in members],
                [m.biased for m in members],
                [m.symmetric for m in members],
                None if largest is None else _largest(largest, part),
                members[0].diagonal,
                headroom,
                choose_variant("similarity_stats", members[0].rows.dtype, members[0].rows.shape[1]),
                row_sums[part],
                col_sums[part],
                _kept(members, kept, part),
            )
        return row_sums, col_sums

    def _room_for_entries(self, matrices: list[Matrix], keep: int) -> list[Tensor | None]:
        """None where Triton's kernel would keep float32: other embeddings, and where the scale has a gradient."""
        coarse = matrices[0].rows.dtype == torch.bfloat16 and not matrices[0].scale.requires_grad
        return super()._room_for_entries(matrices, keep if coarse else 0)

    def gradient_tiles(
        self,
        block: Matrix,
        row_log_sum: Tensor | None,
        col_log_sum: Tensor | None,
        reference: Tensor,
        scale: float,
        moment: Moment | None,
        out: Tensor,
        num_terms: int,
    ) -> Launch | None:
        """Write one block of H; see ``gapkernels.backends.triton.gradient_tiles.gradient_tiles``."""
        if block.rows.dtype == torch.float32 or usable_entries(block, moment) is not None:
            return super().gradient_tiles(block, row_log_sum, col_log_sum, reference, scale, moment, out, num_terms)
        if moment is not None and not moment.used:  # the kernel adds
            moment.partials.zero_()
            moment.used = moment.partials.numel()
        torch.ops.gapkernels_cuda.similarity_grad(
            block.rows,
            block.row_factor,
            block.cols,
            block.col_factor,
            _scale(block),
            block.biased,
            row_log_sum,
            col_log_sum,
            block.diagonal,
            scale,
            reference,
            choose_variant("similarity_grad", block.rows.dtype, block.rows.shape[1]),
            None if moment is None else moment.partials,
            out,
        )
        return None

    def both_products(
        self,
        total_rows: Tensor | None,
        total_cols: Tensor | None,
        h: Tensor,
        cols: Tensor,
        rows: Tensor,
        first: bool,
        first_cols: bool,
    ) -> Launch | None:
        """Add the products of a block; see ``gapkernels.backends.triton.products.add_products``."""
        totals = [total for total in (total_rows, total_cols) if total is not None]
        if not (takes_products(h.dtype, cols.shape[1]) and products.copyable(h, cols, rows, *totals)):
            return super().both_products(total_rows, total_cols, h, cols, rows, first, first_cols)
        torch.ops.gapkernels_cuda.both_products(h, cols, rows, total_rows, total_cols, first, first_cols)
        return None


def _launches(matrices: list[Matrix]) -> list[slice]:
    """Runs of matrices of one type, cut to the length one launch takes."""
    parts = []
    start = 0
    for _, run in groupby(matrices, key=lambda m: m.rows.dtype):
        stop = start + len(list(run))
        parts += [slice(i, min(i + MAX_MATRICES, stop)) for i in range(start, stop, MAX_MATRICES)]
        start = stop
    return parts


def _kept(members: list[Matrix], kept: Sequence[Tensor | None] | None, part: slice) -> list[Tensor]:
    """Where the entries of a launch's matrices go: empty for one of which none are kept, no list for none at all."""
    if kept is None or not any(room is not None for room in kept[part]):
        return []
    nowhere = members[0].rows.new_empty(0)
    return [nowhere if room is None else room for room in kept[part]]


def _largest(largest: Tensor, part: slice) -> Tensor | None:
    """The bounds of these matrices. The centroids' matrix comes last and has none: its exponents are not positive."""
    own = largest[part]
    missing = part.stop - part.start - own.shape[0]
    if not own.shape[0]:
        return None
    return torch.cat([own, own.new_ones(missing)]) if missing else own


def _scale(matrix: Matrix) -> Tensor:
    """The scale as the kernels read it."""
    scale = matrix.scale
    return scale if scale.dtype in (torch.float32, torch.float64) else scale.float()
