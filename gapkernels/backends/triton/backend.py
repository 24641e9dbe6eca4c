"""The functions of the contract in Triton kernels.

No host synchronisation, no N×N memory, nothing depends on values on the host: an evaluation can be captured in a CUDA
graph. Memory beyond inputs and gradients for two bf16 modalities, in units of N·D bytes: forward 2·2 (operands) + 2
(centroids); backward first 2 (centroids) + 4 (their float32 products), then 2 (these, rounded) + 2 (the anchor as an
operand) + 4 (its float32 products), so 8 = two copies of the inputs, plus one block of gradients (32 MiB) and the
operand and products of BLOCK rows of the modality that is not the anchor.
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
from torch import Tensor

from gapkernels.backends.contract import (
    SUMS_OF,
    Centroids,
    Evaluation,
    Forward,
    LogSums,
    Matrix,
    Operand,
    PreparedSums,
    RowStatistics,
    Saved,
    Scalars,
    SigmoidWeights,
    SoftmaxSums,
    SoftplusSums,
)
from gapkernels.backends.triton import (
    device,
    gradient_tiles,
    log_sums,
    products,
    row_gradients,
    row_statistics,
    softmax_sums,
    softplus_sums,
    terms,
    tile_sums,
    tuning,
)
from gapkernels.backends.triton.gradient_tiles import Moment
from gapkernels.backends.triton.steps import Steps
from gapkernels.spec import LossSpec

BLOCK = 4096
"""Rows and columns of a block of gradients: 32 MiB in 16 bits, which stays in a 50 MB L2 cache."""

CENTROID_HEADROOM = math.log2(gradient_tiles.HALF_SCALE)
"""Entries of H of the centroids may be as large as this: no entry exceeds its row's sum, float16 is used to its end."""

LARGEST_TILE = 256
LARGEST_EXPONENT = 126
LARGEST_BIASED_EXPONENT = 32.0
"""Twice the largest bias of raw centroids: ‖c_i‖² + ‖c_j‖² − 2⟨c_i, c_j⟩ in float32 keeps a few 1e-6 of it."""


class TritonBackend:
    """``backend="triton"``; see ``gapkernels.backends.contract.Backend``."""

    sums_of: frozenset[str] = SUMS_OF

    def __init__(self) -> None:
        self.steps = Steps()

    @property
    def gradient_block(self) -> int:
        return BLOCK

    # ---- what costs N², and what the CUDA backend replaces ----

    def tile_sums(
        self, matrices: list[Matrix], largest: Tensor | None, headroom: int, zeros: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``gapkernels.backends.triton.tile_sums.tile_sums``."""
        return tile_sums.tile_sums(matrices, largest, headroom, zeros)

    def gradient_tiles(
        self,
        block: Matrix,
        row_log_sum: Tensor | None,
        col_log_sum: Tensor | None,
        reference: Tensor,
        scale: float,
        moment: Moment | None,
        out: Tensor,
    ) -> None:
        """See ``gapkernels.backends.triton.gradient_tiles.gradient_tiles``."""
        gradient_tiles.gradient_tiles(block, row_log_sum, col_log_sum, reference, scale, moment, out)

    # ---- the contract ----

    def row_statistics(self, embeddings: list[Tensor], spec: LossSpec) -> tuple[list[Operand], RowStatistics]:
        return row_statistics.row_statistics(embeddings, spec)

    def operand(self, embedding: Tensor, spec: LossSpec) -> Operand:
        return row_statistics.operand(embedding, spec)

    def centroids(
        self, embeddings: list[Tensor], sums: Tensor, uniformity_t: Tensor, total_rows: int, spec: LossSpec
    ) -> Centroids:
        result = row_statistics.centroids(embeddings, sums, uniformity_t, total_rows, spec)
        if not spec.normalize and not spec.normalize_centroids:
            # Only here can they be of any length, and only reading a number tells; it waits for the device.
            farthest = -2 * result.bias.min().item()
            if farthest > LARGEST_BIASED_EXPONENT:
                raise ValueError(
                    "centroids of rows as they are (normalize=False, normalize_centroids=False) lie too far apart for "
                    f"float32 products: uniformity_t·‖c − mean‖² is up to {farthest / 2 * math.log(2):.3g}, and "
                    f"{LARGEST_BIASED_EXPONENT / 2 * math.log(2):.3g} is accepted; choose backend='torch', which takes "
                    "float64 there"
                )
        return result

    def log_sums(self, matrices: list[Matrix], zeros: Tensor | None = None, keep: int = 0) -> LogSums:
        first = matrices[0]
        new = first.rows.new_empty
        rows = new((len(matrices), first.rows.shape[0]), dtype=torch.float64)
        cols = new((len(matrices), first.cols.shape[0]), dtype=torch.float64)
        start = 0
        for _, group in groupby(matrices, key=lambda m: m.rows.dtype.itemsize):  # tiles of one size: one launch
            members = list(group)
            part = slice(start, start + len(members))
            everything = len(members) == len(matrices)
            out = (rows, cols) if everything else (rows[part], cols[part])
            all_zeros = None if zeros is None else zeros.view(len(matrices), -1)
            own = zeros if all_zeros is None or everything else all_zeros[part].view(-1)
            self._log_sums(members, own, out)
            start = part.stop
        return LogSums(rows, cols)

    def _log_sums(self, matrices: list[Matrix], zeros: Tensor | None, out: tuple[Tensor, Tensor]) -> None:
        num_rows, num_cols = matrices[0].rows.shape[0], matrices[0].cols.shape[0]
        headroom = LARGEST_EXPONENT - max(num_rows, num_cols).bit_length()
        bounds = [m.largest for m in matrices if m.largest is not None]
        largest = torch.stack(bounds).float() if bounds else None
        sums = None
        if not torch.are_deterministic_algorithms_enabled():
            sums = self.tile_sums(matrices, largest, headroom, zeros)
        log_sums.log_sums(matrices, sums, largest, headroom, out)

    def softplus_sums(self, matrix: Matrix, bias: Tensor) -> SoftplusSums:
        return softplus_sums.softplus_sums(matrix, bias)

    def terms(
        self,
        embeddings: list[Tensor],
        statistics: RowStatistics,
        all_cosines: Tensor,
        pair_sums: LogSums | None,
        centroid_log_sums: Tensor | None,
        scalars: Scalars,
        first_row: int,
        spec: LossSpec,
    ) -> Forward:
        return terms.terms(
            embeddings,
            statistics,
            all_cosines,
            pair_sums,
            centroid_log_sums,
            scalars,
            first_row,
            spec,
            CENTROID_HEADROOM,
        )

    def softmax_sums(self, saved: Saved, scalars: Scalars, total_rows: int) -> PreparedSums:
        return softmax_sums.softmax_sums(saved, scalars, total_rows, CENTROID_HEADROOM)

    def add_products(
        self,
        block: Matrix,
        sums: SoftmaxSums | SigmoidWeights | None,
        prepared: PreparedSums,
        row_products: Tensor | None,
        col_products: Tensor | None,
        moment: Moment | None,
        first_rows: bool = False,
        first_cols: bool = False,
    ) -> None:
        (num_rows, _), num_cols = block.rows.shape, block.cols.shape[0]
        sides = (-(-side // LARGEST_TILE) * LARGEST_TILE for side in (num_rows, num_cols))
        h = block.rows.new_empty(tuple(sides))
        if sums is None:
            self.gradient_tiles(block, None, None, prepared.centroid_reference, 1.0, None, h)
        else:
            scale, reference = gradient_tiles.gradient_scale(block.rows.dtype), prepared.reference
            if isinstance(sums, SigmoidWeights):
                gradient_tiles.gradient_tiles(
                    block, None, None, reference, scale, moment, h, sums.row_weight, bias=sums.bias
                )
            elif sums.row_weight is None and not block.masked:
                self.gradient_tiles(block, sums.row, sums.col, reference, scale, moment, h)
            else:
                gradient_tiles.gradient_tiles(
                    block, sums.row, sums.col, reference, scale, moment, h, sums.row_weight, sums.col_weight
                )
        h = h[:num_rows, :num_cols]
        products.add_products(row_products, col_products, h, block.cols, block.rows, first_rows, first_cols)

    def moment_buffer(self, like: Matrix) -> Moment:
        sides = (min(BLOCK, operand.shape[0]) for operand in (like.rows, like.cols))
        rows = like.rows
        options = tuning.candidates("gradient_tiles", device.architecture(rows.device), rows.dtype, rows.shape[1])
        smallest = min(min(config.tile_m, config.tile_n) for config in map(tile_sums.narrower, options))
        places = math.prod(-(-side // smallest) for side in sides)
        return Moment(like.rows.new_empty(places, dtype=torch.float64))

    def row_gradients(
        self,
        targets: list[int],
        rows: slice,
        factors: list[Tensor | None],
        products: list[Tensor | None],
        centroid_products: Tensor | None,
        evaluation: Evaluation,
        out: list[Tensor],
        moment: Moment | None = None,
    ) -> Tensor | None:
        return row_gradients.row_gradients(targets, rows, factors, products, centroid_products, evaluation, out, moment)

    def scale_gradient(self, moment: Moment, evaluation: Evaluation) -> Tensor:
        return softmax_sums.scale_gradient(moment, evaluation)
