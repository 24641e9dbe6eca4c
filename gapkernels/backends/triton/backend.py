"""The launcher: which kernels run, in which order, on which buffers.

    forward     operands, row_statistics ─► centroids ─► tile_sums (all pairs and the triangle, one launch)
                                                    └─► log_sums (redoes what left the range) ─► row_terms ─► combine
    backward    row_statistics ─► centroids ─┬─► per block of the triangle: gradient_tiles, one or two products
                pair_weights ────────────────┤
                operands ────────────────────┴─► per block of each pair: gradient_tiles, two products
                                                     └─► row_gradients, per modality; scale_gradient
                or by whole rows, see :mod:`.row_backward`

No host synchronisation, no N×N memory, nothing depends on values on the host: all of it can be captured in a CUDA
graph. Memory beyond inputs and gradients for two bf16 modalities, in units of N·D bytes: forward 2·2 (operands) + 2
(centroids); backward first 2 (centroids) + 4 (their float32 products), then 2 (these, rounded) + 2 (the anchor as an
operand) + 4 (its float32 products), so 8 = two copies of the inputs, plus one block of gradients (32 MiB) and the
operand and products of BLOCK rows of the modality that is not the anchor.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from gapkernels.backends.triton import backward_plan, device
from gapkernels.backends.triton.gradient_tiles import gradient_tiles
from gapkernels.backends.triton.log_sums import log_sums
from gapkernels.backends.triton.matrix import HALF_UNIT, NO_DIAGONAL, Matrix, MatrixKernels
from gapkernels.backends.triton.pair_weights import pair_weights, scale_gradient
from gapkernels.backends.triton.products import add_product
from gapkernels.backends.triton.row_backward import backward_by_rows
from gapkernels.backends.triton.row_gradients import row_gradients
from gapkernels.backends.triton.row_statistics import (
    Centroids,
    RowStatistics,
    centroid_headroom,
    centroids,
    operands,
    padded,
    row_statistics,
)
from gapkernels.backends.triton.terms import terms
from gapkernels.backends.triton.tile_sums import tile_sums
from gapkernels.distributed import World, triangle_blocks
from gapkernels.plan import Forward, Saved, log_sum_over_processes
from gapkernels.spec import LossSpec

BLOCK = 4096
"""Rows and columns of a block of gradients: 32 MiB in 16 bits, which stays in a 50 MB L2 cache."""

SMALLEST_TILE, LARGEST_TILE = 16, 256
LARGEST_EXPONENT = 126


TRITON_KERNELS = MatrixKernels(tile_sums, gradient_tiles)


class TritonBackend:
    """The whole evaluation in Triton kernels; see :class:`gapkernels.plan.FusedBackend`.

    Args:
        kernels: what computes sums and gradients of whole matrices; all else is done here.
    """

    def __init__(self, kernels: MatrixKernels = TRITON_KERNELS) -> None:
        self._kernels = kernels

    def forward(self, embeddings: list[Tensor], logit_scale: Tensor, spec: LossSpec, world: World) -> Forward:
        with device.on(embeddings[0].device):
            return _forward(_readable(embeddings), logit_scale, spec, world, self._kernels)

    def backward(
        self,
        upstream: Tensor,
        embeddings: list[Tensor],
        logit_scale: Tensor,
        saved: Saved,
        spec: LossSpec,
        world: World,
        needs_grad: list[bool],
    ) -> tuple[list[Tensor | None], Tensor | None]:
        with device.on(embeddings[0].device):
            return _backward(
                upstream, _readable(embeddings), logit_scale, saved, spec, world, needs_grad, self._kernels
            )


# ---- passes -------------------------------------------------------------------------------------------------------


def _forward(
    embeddings: list[Tensor], logit_scale: Tensor, spec: LossSpec, world: World, kernels: MatrixKernels
) -> Forward:
    num_rows = embeddings[0].shape[0]
    statistics = _statistics(embeddings, spec, world)
    matrices = _pair_matrices(embeddings, logit_scale, spec, world) if spec.nce_weight else []
    largest = None if spec.normalize or not matrices else _largest_products(embeddings, spec, world)
    pair_logs = centroid_logs = None
    if spec.cu_weight and world.size == 1:
        c = centroids(embeddings, statistics.sums, num_rows, spec)
        triangle = _centroid_matrix(c, slice(None), slice(None))
        if matrices and c.rows.dtype.itemsize == embeddings[0].dtype.itemsize:
            matrices.append(triangle)  # tiles of one size: one launch
        else:
            centroid_logs = _log_sums([triangle], None, kernels)[0][0]
    elif spec.cu_weight:
        centroid_logs = _centroid_log_sums(embeddings, statistics, spec, world, kernels)
    if matrices:
        row_logs, col_logs = _log_sums(matrices, largest, kernels)
        if matrices[-1].symmetric:
            centroid_logs = row_logs[-1]
        pair_logs = row_logs, log_sum_over_processes(col_logs, world)
    loss, values, saved = terms(
        statistics, logit_scale, pair_logs, centroid_logs, num_rows, len(embeddings), spec, world
    )
    return Forward(loss, values, saved)


def _backward(
    upstream: Tensor,
    embeddings: list[Tensor],
    logit_scale: Tensor,
    saved: Saved,
    spec: LossSpec,
    world: World,
    needs_grad: list[bool],
    kernels: MatrixKernels,
) -> tuple[list[Tensor | None], Tensor | None]:
    *embedding_needs_grad, scale_needs_grad = needs_grad
    num_rows, dim = embeddings[0].shape
    statistics = _statistics(embeddings, spec, world)
    if backward_plan.by_rows(embeddings, spec, world):
        return backward_by_rows(upstream, embeddings, statistics, logit_scale, saved, spec, needs_grad)
    unit = HALF_UNIT if embeddings[0].dtype == torch.float16 else 1.0
    gradients = [
        e.new_empty(e.shape) if needed else None for e, needed in zip(embeddings, embedding_needs_grad, strict=True)
    ]
    with_centroids = bool(spec.cu_weight) and any(embedding_needs_grad)
    headroom = centroid_headroom(embeddings[0], num_rows * world.size) if with_centroids else None
    weights = pair_weights(saved, statistics.cosines, logit_scale, world, headroom)
    centroid_products = None
    if with_centroids:
        reference = weights.centroid_reference
        centroid_products = _centroid_products(embeddings, statistics, reference, spec, world, kernels)

    def finish(m: int, row: slice, factors: Tensor | None, products: Tensor | None) -> None:
        out = gradients[m]
        assert out is not None
        row_gradients(
            m, row.start, embeddings, statistics, factors, products, centroid_products, saved.wrong_share,
            saved.centroid, weights.centroid_reference, upstream, logit_scale, unit, spec, world.size, out[row],
        )  # fmt: skip

    pairs = spec.nce_pairs(len(embeddings)) if spec.nce_weight and any(needs_grad) else []
    if not pairs:
        for m, needed in enumerate(embedding_needs_grad):
            if needed:
                finish(m, slice(0, num_rows), None, None)
        return gradients, torch.zeros_like(logit_scale) if scale_needs_grad else None

    # A modality with columns is an operand as a whole and collects products over all row blocks; one that only has
    # rows is taken and finished block by block.
    own = {k: operands([embeddings[k]], spec) for k in sorted({k for _, k in pairs})}
    cols = {k: (world.gather_rows(o.rows[0]), world.gather_rows(o.factors[0])) for k, o in own.items()}
    col_products = {
        k: embeddings[k].new_zeros((num_rows * world.size, padded(dim)), dtype=torch.float32)
        for k in cols
        if embedding_needs_grad[k]
    }
    row_logs, col_logs = weights.logs[0::2], weights.logs[1::2]
    blocks = _GradientBlocks(kernels, min(BLOCK, num_rows), min(BLOCK, num_rows * world.size), scale_needs_grad)
    for m, group in groupby(enumerate(pairs), key=lambda item: item[1][0]):
        members = [(p, k) for p, (_, k) in group]
        for row in _blocks(num_rows):
            if m in own:
                z, factors = own[m].rows[0, row], own[m].factors[0, row]
                products = _own_rows(col_products[m], world)[row] if m in col_products else None
            else:
                block = operands([embeddings[m][row]], spec)
                z, factors = block.rows[0], block.factors[0]
                products = torch.zeros_like(z, dtype=torch.float32) if embedding_needs_grad[m] else None
            for p, k in members:
                if products is None and k not in col_products and not scale_needs_grad:
                    continue
                y, col_factors = cols[k]
                for col in _blocks(y.shape[0]):
                    diagonal = world.rank * num_rows + row.start - col.start
                    matrix = Matrix(z, factors, y[col], col_factors[col], logit_scale, diagonal)
                    h = blocks.pair(matrix, row_logs[p, row], col_logs[p, col], weights.log_reference, unit)
                    if products is not None:
                        add_product(products, h, y[col])
                    if k in col_products:
                        add_product(col_products[k][col], h.T, z)
            if m not in own and products is not None:
                finish(m, row, factors, products)
    for k, o in own.items():
        if k in col_products:
            finish(k, slice(0, num_rows), o.factors[0], world.sum_own_rows(col_products.pop(k)))
    if not scale_needs_grad:
        return gradients, None
    assert blocks.scale_partials is not None
    return gradients, scale_gradient(blocks.scale_partials, weights, upstream, logit_scale, num_rows, world)


# ---- operands -----------------------------------------------------------------------------------------------------


def _readable(embeddings: list[Tensor]) -> list[Tensor]:
    """Embeddings as the kernels read them: any stride between rows, unit stride along them."""
    device.allow_scratch_memory()
    return [e if e.stride(1) == 1 or e.shape[1] == 1 else e.contiguous() for e in embeddings]


def _statistics(embeddings: list[Tensor], spec: LossSpec, world: World) -> RowStatistics:
    own = row_statistics(embeddings, spec)
    return own._replace(sums=world.sum(own.sums))


def _pair_matrices(embeddings: list[Tensor], logit_scale: Tensor, spec: LossSpec, world: World) -> list[Matrix]:
    """The matrix of each pair, its columns from all processes."""
    pairs = spec.nce_pairs(len(embeddings))
    rows, factors = operands(embeddings, spec)
    cols = {k: (world.gather_rows(rows[k]), world.gather_rows(factors[k])) for k in sorted({k for _, k in pairs})}
    diagonal = world.rank * embeddings[0].shape[0]
    return [Matrix(rows[m], factors[m], *cols[k], logit_scale, diagonal) for m, k in pairs]


def _largest_products(embeddings: list[Tensor], spec: LossSpec, world: World) -> Tensor:
    """Per pair, the largest norm of a row times the largest of a column: no inner product exceeds it."""
    norms = [torch.linalg.vector_norm(e, dim=1, dtype=torch.float32).max() for e in embeddings]
    largest = world.max(torch.stack(norms))
    return torch.stack([largest[m] * largest[k] for m, k in spec.nce_pairs(len(embeddings))])


def _centroid_matrix(c: Centroids, row: slice, col: slice) -> Matrix:
    symmetric = row == col
    return Matrix(
        rows=c.rows[row],
        row_factor=c.biases[row],
        cols=c.rows[col],
        col_factor=c.biases[col],
        scale=c.scale,
        diagonal=0 if symmetric else NO_DIAGONAL,
        biased=True,
        symmetric=symmetric,
    )


def _gathered_centroids(embeddings: list[Tensor], sums: Tensor, spec: LossSpec, world: World) -> Centroids:
    own = centroids(embeddings, sums, embeddings[0].shape[0] * world.size, spec)
    return own._replace(rows=world.gather_rows(own.rows), biases=world.gather_rows(own.biases))


def _triangle(world: World, rows: int) -> Iterator[tuple[slice, slice]]:
    """This process's blocks of the triangle of the centroid matrix that hold anything."""
    for row, col in triangle_blocks(world.rank, world.size, rows):
        if row.start < row.stop and col.start < col.stop:
            yield row, col


def _blocks(length: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _own_rows(x: Tensor, world: World) -> Tensor:
    rows = x.shape[0] // world.size
    return x[world.rank * rows : (world.rank + 1) * rows]


# ---- sums ---------------------------------------------------------------------------------------------------------


def _log_sums(matrices: list[Matrix], largest: Tensor | None, kernels: MatrixKernels) -> tuple[Tensor, Tensor]:
    num_rows, num_cols = matrices[0].rows.shape[0], matrices[0].cols.shape[0]
    headroom = LARGEST_EXPONENT - max(num_rows, num_cols).bit_length()
    sums = None
    if not torch.are_deterministic_algorithms_enabled():
        sums = kernels.tile_sums(matrices, largest, headroom)
    return log_sums(matrices, sums, largest, headroom)


def _centroid_log_sums(
    embeddings: list[Tensor], statistics: RowStatistics, spec: LossSpec, world: World, kernels: MatrixKernels
) -> Tensor:
    """log2 Σ_{j≠i} e_ij for the rows of all processes, each of which computes a part of the triangle."""
    c = _gathered_centroids(embeddings, statistics.sums, spec, world)
    log_sum = c.biases.new_full(c.biases.shape, -torch.inf, dtype=torch.float64)
    for row, col in _triangle(world, embeddings[0].shape[0]):
        matrix = _centroid_matrix(c, row, col)
        row_logs, col_logs = _log_sums([matrix], None, kernels)
        log_sum[row] = torch.logaddexp2(log_sum[row], row_logs[0])
        if not matrix.symmetric:
            log_sum[col] = torch.logaddexp2(log_sum[col], col_logs[0])
    return log_sum_over_processes(log_sum, world)


# ---- gradients ----------------------------------------------------------------------------------------------------


class _GradientBlocks:
    """Writes blocks of H, all into one buffer, and collects what the logit scale needs of them."""

    def __init__(self, kernels: MatrixKernels, rows: int, cols: int, scale_needs_grad: bool = False) -> None:
        self._kernels = kernels
        self._shape = tuple(-(-side // LARGEST_TILE) * LARGEST_TILE for side in (rows, cols))
        self._buffer: Tensor | None = None
        self._scale_needs_grad = scale_needs_grad
        self.scale_partials: Tensor | None = None

    def pair(self, block: Matrix, row_log_sum: Tensor, col_log_sum: Tensor, reference: Tensor, unit: float) -> Tensor:
        """H of a block of a pair of modalities; overwritten by the next one."""
        if self._scale_needs_grad and self.scale_partials is None:
            places = -(-self._shape[0] // SMALLEST_TILE) * -(-self._shape[1] // SMALLEST_TILE)
            self.scale_partials = block.rows.new_zeros(places, dtype=torch.float64)
        partials = self.scale_partials
        self._kernels.gradient_tiles(block, row_log_sum, col_log_sum, reference, unit, partials, self._out(block))
        return self._out(block)[: block.rows.shape[0], : block.cols.shape[0]]

    def centroids(self, block: Matrix, reference: Tensor) -> Tensor:
        """H of a block of the centroid matrix; overwritten by the next one."""
        self._kernels.gradient_tiles(block, None, None, reference, 1.0, None, self._out(block))
        return self._out(block)[: block.rows.shape[0], : block.cols.shape[0]]

    def _out(self, block: Matrix) -> Tensor:
        if self._buffer is None:
            self._buffer = block.rows.new_empty(self._shape)
        return self._buffer


def _centroid_products(
    embeddings: list[Tensor],
    statistics: RowStatistics,
    reference: Tensor,
    spec: LossSpec,
    world: World,
    kernels: MatrixKernels,
) -> Tensor:
    """``Σ_{j≠i} 2^(x_ij − reference) c_j``, ``[n, D']``, c as stored by the centroid kernel.

    For bf16 embeddings the sums are rounded to bf16 in the end: their gradients will be, and it saves a copy.
    """
    c = _gathered_centroids(embeddings, statistics.sums, spec, world)
    total = torch.zeros_like(c.rows, dtype=torch.float32)
    side = min(BLOCK, c.rows.shape[0])
    blocks = _GradientBlocks(kernels, side, side)
    for shard_row, shard_col in _triangle(world, embeddings[0].shape[0]):
        matrix = _centroid_matrix(c, shard_row, shard_col)
        row_total, col_total = total[shard_row], total[shard_col]
        for row in _blocks(row_total.shape[0]):
            for col in _blocks(col_total.shape[0]):
                if matrix.symmetric and col.start < row.start:
                    continue
                h = blocks.centroids(_block(matrix, row, col), reference)
                add_product(row_total[row], h, matrix.cols[col])
                if not (matrix.symmetric and row == col):
                    add_product(col_total[col], h.T, matrix.rows[row])
    own = world.sum_own_rows(total)
    return own.to(torch.bfloat16) if embeddings[0].dtype == torch.bfloat16 else own


def _block(matrix: Matrix, row: slice, col: slice) -> Matrix:
    diagonal = matrix.diagonal
    return matrix._replace(
        rows=matrix.rows[row],
        row_factor=matrix.row_factor[row],
        cols=matrix.cols[col],
        col_factor=matrix.col_factor[col],
        diagonal=diagonal if diagonal == NO_DIAGONAL else diagonal + row.start - col.start,
    )
