"""The functions of the contract in Triton kernels.

No host synchronisation, no N×N memory, nothing depends on values on the host: an evaluation can be captured in a CUDA
graph. Memory beyond inputs and gradients for two bf16 modalities, in units of N·D bytes: forward 2·2 (operands) + 2
(centroids); backward first 2 (centroids) + 4 (their float32 products), then 2 (these, rounded) + 2 (the anchor as an
operand) + 4 (its float32 products), so 8 = two copies of the inputs, plus one block of gradients (32 MiB at most) and
the operand and products of as many rows of the modality that is not the anchor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from gapkernels.backends.contract import (
    NO_DIAGONAL,
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
    block_launches,
    device,
    gradient_blocks,
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
from gapkernels.backends.triton.recording import Launch
from gapkernels.backends.triton.steps import Steps
from gapkernels.spec import LossSpec

CENTROID_HEADROOM = math.log2(gradient_tiles.HALF_SCALE)
"""Entries of H of the centroids may be as large as this: no entry exceeds its row's sum, float16 is used to its end."""

EVERYTHING = 2**60
"""Bytes: whoever may keep as many was asked to keep all."""

NUMBERS_PER_KEPT_BYTE = 128
"""Inner products of rows so long take more time than writing and reading an entry: by count, on an H100, from 53 to 107
on where entries stay in the L2 cache, and from 177 on where they do not."""

LARGEST_TILE = 256
LARGEST_EXPONENT = 126
LARGEST_BIASED_EXPONENT = 32.0
"""Twice the largest bias of raw centroids: ‖c_i‖² + ‖c_j‖² − 2⟨c_i, c_j⟩ in float32 keeps a few 1e-6 of it."""


def _headroom(num_terms: int) -> int:
    """The largest exponent that entries may have for a sum of so many."""
    return LARGEST_EXPONENT - num_terms.bit_length()


def _whole_tiles(side: int) -> int:
    return -(-side // LARGEST_TILE) * LARGEST_TILE


class TritonBackend:
    """``backend="triton"``; see ``gapkernels.backends.contract.Backend``."""

    sums_of: frozenset[str] = SUMS_OF
    keeps_entries = True  # where there is room

    def __init__(self) -> None:
        self.steps = Steps()
        self._written = block_launches.Known()

    def gradient_block(self, like: Tensor, rows: int, cols: int) -> int:
        arch, width = device.architecture(like.device), like.shape[1]
        products_, gradients = (
            tuning.candidates(kernel, arch, like.dtype, width)[0] for kernel in ("both_products", "gradient_tiles")
        )
        return gradient_blocks.side(
            rows,
            cols,
            width,
            device.num_processors(like.device),
            (products_.tile_m, products_.tile_n),
            (gradients.tile_m, gradients.tile_n),
            like.itemsize,
        )

    # ---- what costs N², and what the CUDA backend replaces ----

    def tile_sums(
        self,
        matrices: list[Matrix],
        largest: Tensor | None,
        headroom: int,
        zeros: Tensor | None = None,
        kept: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See ``gapkernels.backends.triton.tile_sums.tile_sums``."""
        return tile_sums.tile_sums(matrices, largest, headroom, zeros, kept)

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
        """See ``gapkernels.backends.triton.gradient_tiles.gradient_tiles``; ``num_terms`` of the longest sum."""
        return gradient_tiles.gradient_tiles(
            block,
            row_log_sum,
            col_log_sum,
            reference,
            scale,
            moment,
            out,
            headroom=_headroom(num_terms),
            smallest_log=math.log2(num_terms * log_sums.SMALLEST_EXACT_SUM),
        )

    both_products = staticmethod(products.add_products)
    """Add the products of a block; the CUDA backend has a kernel of its own."""

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
        entries = self._room_for_entries(matrices, keep)
        start = 0
        for _, group in groupby(matrices, key=lambda m: m.rows.dtype.itemsize):  # tiles of one size: one launch
            members = list(group)
            part = slice(start, start + len(members))
            everything = len(members) == len(matrices)
            out = (rows, cols) if everything else (rows[part], cols[part])
            all_zeros = None if zeros is None else zeros.view(len(matrices), -1)
            own = zeros if all_zeros is None or everything else all_zeros[part].view(-1)
            self._log_sums(members, own, entries[part], out)
            start = part.stop
        return LogSums(rows, cols, entries)

    def _room_for_entries(self, matrices: list[Matrix], keep: int) -> list[Tensor | None]:
        """Room for the entries of as many pairs as fit; none of one whose sums may take another way.

        They are exponentials relative to the constant exponent, so bfloat16 holds whatever float32 sums can. Its
        rounding is that of H, which the gradient bound of bfloat16 embeddings allows for, but neither that of other
        embeddings nor the gradient of the scale, which takes logarithms. The triangle of the centroids is not kept, nor
        are entries of short rows, unless all are asked for.
        """
        if not keep or not self.keeps_entries or torch.are_deterministic_algorithms_enabled():
            return []
        rooms: list[Tensor | None] = []
        for m in matrices:
            coarse = m.rows.dtype == torch.bfloat16 and not m.scale.requires_grad
            dtype = torch.bfloat16 if coarse else torch.float32
            sides = _whole_tiles(m.rows.shape[0]), _whole_tiles(m.cols.shape[0])
            size = math.prod(sides) * dtype.itemsize
            pays = keep >= EVERYTHING or m.rows.shape[1] >= NUMBERS_PER_KEPT_BYTE * dtype.itemsize
            if m.biased or m.masked or m.largest is not None or size > keep or not pays:
                rooms.append(None)
                continue
            keep -= size
            # The last tile of a block may reach beyond the last column, in the last row beyond the last number.
            room = m.rows.new_empty(math.prod(sides) + LARGEST_TILE, dtype=dtype)[:-LARGEST_TILE].view(sides)
            rooms.append(room[: m.rows.shape[0], : m.cols.shape[0]])
        return rooms

    def _log_sums(
        self,
        matrices: list[Matrix],
        zeros: Tensor | None,
        entries: list[Tensor | None],
        out: tuple[Tensor, Tensor],
    ) -> None:
        num_rows, num_cols = matrices[0].rows.shape[0], matrices[0].cols.shape[0]
        headroom = _headroom(max(num_rows, num_cols))
        bounds = [m.largest for m in matrices if m.largest is not None]
        largest = torch.stack(bounds).float() if bounds else None
        sums = None
        if not torch.are_deterministic_algorithms_enabled():
            kept = {"kept": entries} if any(room is not None for room in entries) else {}
            sums = self.tile_sums(matrices, largest, headroom, zeros, **kept)
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
        matrix: Matrix,
        sums: SoftmaxSums | SigmoidWeights | None,
        prepared: PreparedSums,
        row_products: Tensor | None,
        col_products: Tensor | None,
        moment: Moment | None,
        first_rows: bool = False,
        first_cols: bool = False,
    ) -> None:
        (num_rows, _), num_cols = matrix.rows.shape, matrix.cols.shape[0]
        side, num_terms = self.gradient_block(matrix.rows, num_rows, num_cols), max(num_rows, num_cols)
        h = matrix.rows.new_empty(_whole_tiles(min(side, num_rows)) * _whole_tiles(min(side, num_cols)))
        if num_rows <= side and num_cols <= side:
            first = first_rows, first_cols
            self._add_block(matrix, sums, prepared, row_products, col_products, moment, *first, h, num_terms)
            return
        if matrix.symmetric:
            col_products, first_cols = row_products, first_rows
        reference = prepared.centroid_reference if sums is None else prepared.reference
        partials = None if moment is None else moment.partials
        entries = gradient_tiles.usable_entries(matrix, moment)
        where = None
        if entries is None or side * entries.itemsize % 16 == 0:
            where = block_launches.of_matrix(
                matrix, sums, reference, row_products, col_products, partials, h, entries, num_terms
            )
        known = {} if where is None else self._written.of_kind(where.kind)
        for top in range(0, num_rows, side):
            height = min(side, num_rows - top)
            for left in range(top if matrix.symmetric else 0, num_cols, side):
                width = min(side, num_cols - left)
                on_diagonal = matrix.symmetric and left == top
                is_first = first_rows and left == 0, first_cols and top == 0
                written = known.get((height, width, on_diagonal))
                if where is not None and written is not None:
                    diagonal = matrix.diagonal if matrix.diagonal == NO_DIAGONAL else matrix.diagonal + top - left
                    written(where.addresses, where.stream, top, left, diagonal, int(is_first[0]), int(is_first[1]))
                    continue
                row, col = slice(top, top + height), slice(left, left + width)
                launches = self._add_block(
                    matrix.block(row, col),
                    None if sums is None else sums.block(row, col),
                    prepared,
                    None if row_products is None else row_products[row],
                    None if col_products is None or on_diagonal else col_products[col],
                    moment,
                    *is_first,
                    h,
                    num_terms,
                )
                if where is not None and (written := block_launches.written(launches)) is not None:
                    known[height, width, on_diagonal] = written

    def _add_block(
        self,
        block: Matrix,
        sums: SoftmaxSums | SigmoidWeights | None,
        prepared: PreparedSums,
        row_products: Tensor | None,
        col_products: Tensor | None,
        moment: Moment | None,
        first_rows: bool,
        first_cols: bool,
        room: Tensor,
        num_terms: int,
    ) -> tuple[Launch | None, Launch | None]:
        """``add_products`` of one block, with room for H; its two launches, see ``.launch.launch``."""
        (num_rows, _), num_cols = block.rows.shape, block.cols.shape[0]
        sides = _whole_tiles(num_rows), _whole_tiles(num_cols)
        h = room[: math.prod(sides)].view(sides)
        if sums is None:
            launched = self.gradient_tiles(block, None, None, prepared.centroid_reference, 1.0, None, h, num_terms)
        else:
            scale, reference = gradient_tiles.gradient_scale(block.rows.dtype), prepared.reference
            if isinstance(sums, SigmoidWeights):
                launched = gradient_tiles.gradient_tiles(
                    block, None, None, reference, scale, moment, h, sums.row_weight, bias=sums.bias
                )
            elif sums.row_weight is None and not block.masked:
                launched = self.gradient_tiles(block, sums.row, sums.col, reference, scale, moment, h, num_terms)
            else:
                launched = gradient_tiles.gradient_tiles(
                    block, sums.row, sums.col, reference, scale, moment, h, sums.row_weight, sums.col_weight
                )
        h = h[:num_rows, :num_cols]
        return launched, self.both_products(
            row_products, col_products, h, block.cols, block.rows, first_rows, first_cols
        )

    def moment_buffer(self, like: Matrix) -> Moment:
        rows = like.rows
        largest = gradient_blocks.largest_side(rows.itemsize)
        sides = (min(largest, operand.shape[0]) for operand in (rows, like.cols))
        options = tuning.candidates("gradient_tiles", device.architecture(rows.device), rows.dtype, rows.shape[1])
        shapes = [tile_sums.narrower(c) for c in options]
        shapes += [gradient_tiles.shape_with_kept(c, rows.dtype) for c in options]
        smallest = min(min(config.tile_m, config.tile_n) for config in shapes)
        places = math.prod(-(-side // smallest) for side in sides)
        moment = Moment(like.rows.new_empty(places, dtype=torch.float64))
        if max(rows.shape[0], like.cols.shape[0]) > self.gradient_block(rows, rows.shape[0], like.cols.shape[0]):
            # Blocks of other shapes may have more tiles than the first.
            moment.partials.zero_()
            moment.used = places
        return moment

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
