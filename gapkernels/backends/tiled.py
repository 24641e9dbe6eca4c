"""The portable backend: matrices of exponentials in tiles of library matrix products. Any device torch runs on.

    for each block of rows I:                                        [T, D]
        for each block of columns J (J ≥ I if symmetric):            [T, D]
            exponent = scale·rows_I · cols_Jᵀ + biases               [T, T], stays in the cache
            forward:   row_sum_I += Σ_j exp2(exponent)      col_sum_J += Σ_i exp2(exponent)
            backward:  G = exp2(exponent)·(u_I + v_Jᵀ)
                       grad_rows_I += G · cols_J             grad_cols_J += Gᵀ · rows_I

With n rows, N columns: 2nND operations forward and 6nND backward (half of both if symmetric), O(T²) memory on top of
the operands. Exponentials and sums pass over a tile a few times while it is in the cache, which costs about a tenth
of the products at D = 512.

One exponential serves the row sum and the column sum because both use the same constant reference exponent. Sums
which that reference would push out of the type's range are recomputed with a running maximum for every row and column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gapkernels.backends.exponential import ExpMatrix, LogSums, SoftmaxWeights, statistics_dtype
from gapkernels.cpu import is_amd

# A float32 tile of 1024×1024 is 4 MiB: two of them stay in the caches of current cores, and the products are large
# enough to run at full speed (measured: 512 loses 5 %, 2048 gains nothing).
TILE = 1024


class TiledBackend:
    """Tiles of library matrix products, driven from Python."""

    def off_diagonal_log_sums(self, matrix: ExpMatrix) -> LogSums:
        shift = _constant_shift(matrix)
        sums = _sum_with_constant_shift(matrix, shift)
        smallest = torch.minimum(sums.row.min(), sums.col.min())
        if matrix.symmetric:  # only the total of a symmetric matrix is divided by, so only the total must be in range
            smallest = sums.row.sum() / matrix.rows.shape[0]
        if _known_true(smallest >= _smallest_exact_sum(matrix)):
            return LogSums(sums.row.log2() + shift, sums.col.log2() + shift, sums.diagonal)
        return _sum_with_running_maximum(matrix)

    def add_products(
        self, matrix: ExpMatrix, weights: SoftmaxWeights | None, grad_rows: Tensor | None, grad_cols: Tensor | None
    ) -> None:
        if weights is None:
            _add_products(matrix, None, None, grad_rows, grad_cols)
            return
        shift = _constant_shift(matrix)
        smallest = torch.minimum(weights.row_log_sum.min(), weights.col_log_sum.min()) - shift
        if _known_true(smallest >= math.log2(_smallest_exact_sum(matrix))):
            _add_products(matrix, weights, shift, grad_rows, grad_cols)
        else:
            _add_products(matrix, weights, None, grad_rows, grad_cols)


# ---- range --------------------------------------------------------------------------------------------------------


def _minimum_exponent(dtype: torch.dtype) -> int:
    return -126 if dtype == torch.float32 else -1022


def _constant_shift(matrix: ExpMatrix) -> Tensor:
    """The smallest reference exponent with which no sum of up to N entries can overflow."""
    entries = max(matrix.rows.shape[0], matrix.cols.shape[0])
    headroom = -_minimum_exponent(matrix.rows.dtype) - math.ceil(math.log2(entries))
    return (matrix.bound - headroom).clamp_min(0)


def _smallest_exact_sum(matrix: ExpMatrix) -> float:
    """A sum at least this large loses less than its rounding to the entries that underflow."""
    entries = max(matrix.rows.shape[0], matrix.cols.shape[0])
    mantissa_bits = 24 if matrix.rows.dtype == torch.float32 else 53
    return entries * 2.0 ** (_minimum_exponent(matrix.rows.dtype) + mantissa_bits)


def _known_true(condition: Tensor) -> bool:
    """Whether the condition holds; False where reading it would break the capture of a CUDA graph."""
    if condition.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool(condition)


# ---- matrix products ----------------------------------------------------------------------------------------------


class _TorchProducts:
    """Products through torch's own matrix multiplication, into buffers that are used again."""

    def __init__(self) -> None:
        self._exponents: Tensor | None = None

    def exponents(self, rows: Tensor, cols: Tensor, bias: Tensor) -> Tensor:
        shape = (rows.shape[0], cols.shape[0])
        if self._exponents is None or self._exponents.shape != shape:
            self._exponents = rows.new_empty(shape)
        return torch.addmm(bias, rows, cols.T, out=self._exponents)

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        total.addmm_(left, right)


class _OneDnnProducts:
    """Products through oneDNN: twice the speed of the MKL behind ``torch.mm`` on AMD's AVX-512 processors."""

    def exponents(self, rows: Tensor, cols: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, cols, bias, "none", [], "")

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        total.copy_(torch.ops.mkldnn._linear_pointwise.binary(left, total, right.T, None, "add"))


def onednn_is_faster() -> bool:
    """Whether float32 products on this CPU should go to oneDNN: an AMD processor with AVX-512."""
    return (
        is_amd()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _products(matrix: ExpMatrix) -> _TorchProducts | _OneDnnProducts:
    on_cpu = matrix.rows.device.type == "cpu"
    if on_cpu and matrix.rows.dtype == torch.float32 and onednn_is_faster():
        return _OneDnnProducts()
    return _TorchProducts()


# ---- tiles --------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """One distinct tile of a matrix of exponentials.

    Attributes:
        row, col: what the tile covers.
        exponents: ``[rows, cols]``, to be overwritten by whoever receives the tile; −inf on the matrix's diagonal.
        diagonal_rows: the rows whose diagonal entry lies in this tile; None if there are none.
        diagonal_offset: where ``torch.diagonal`` finds them.
        diagonal_exponents: their exponents.
        counts_for_cols: False for a tile on the diagonal of a symmetric matrix, which holds every pair twice.
    """

    row: slice
    col: slice
    exponents: Tensor
    diagonal_rows: slice | None
    diagonal_offset: int
    diagonal_exponents: Tensor | None
    counts_for_cols: bool


def _tiles(matrix: ExpMatrix, shift: Tensor | None) -> Iterator[_Tile]:
    """Compute the tiles one after another, ``shift`` subtracted from the exponents."""
    products = _products(matrix)
    rows, cols = matrix.rows, matrix.cols
    scale = matrix.scale.to(rows.dtype)
    row_bias, col_bias = matrix.bias if matrix.bias is not None else (None, rows.new_zeros(cols.shape[0]))
    if shift is not None:
        col_bias = col_bias - shift.to(rows.dtype)
    for i, row in enumerate(_blocks(rows.shape[0])):
        scaled_rows = rows[row] * scale
        for j, col in enumerate(_blocks(cols.shape[0])):
            if matrix.symmetric and j < i:
                continue
            exponents = products.exponents(scaled_rows, cols[col], col_bias[col])
            if row_bias is not None:
                exponents += row_bias[row, None]
            diagonal_rows, offset, diagonal_exponents = None, 0, None
            if matrix.diagonal is not None:
                first = max(row.start, col.start - matrix.diagonal)
                last = min(row.stop, col.stop - matrix.diagonal)
                if first < last:
                    diagonal_rows, offset = slice(first, last), row.start + matrix.diagonal - col.start
                    diagonal = exponents.diagonal(offset)
                    diagonal_exponents = diagonal.clone()
                    diagonal.fill_(-math.inf)
            counts_for_cols = not (matrix.symmetric and i == j)
            yield _Tile(row, col, exponents, diagonal_rows, offset, diagonal_exponents, counts_for_cols)


def _blocks(length: int) -> list[slice]:
    return [slice(start, min(start + TILE, length)) for start in range(0, length, TILE)]


class _Diagonal:
    """Collects the exponents of the diagonal, where the caller has a use for them."""

    def __init__(self, matrix: ExpMatrix) -> None:
        wanted = matrix.diagonal is not None and not matrix.symmetric
        self.exponents = _statistic(matrix.rows) if wanted else None

    def keep(self, tile: _Tile) -> None:
        if self.exponents is not None and tile.diagonal_exponents is not None:
            self.exponents[tile.diagonal_rows] = tile.diagonal_exponents.to(self.exponents.dtype)


def _statistic(operand: Tensor) -> Tensor:
    """A zero for every row of an operand."""
    return operand.new_zeros(operand.shape[0], dtype=statistics_dtype(operand.device))


def _sum_with_constant_shift(matrix: ExpMatrix, shift: Tensor) -> LogSums:
    """The sums (not yet their logarithms) of 2^−shift times the matrix: one exponential per entry."""
    row_sum = _statistic(matrix.rows)
    col_sum = row_sum if matrix.symmetric else _statistic(matrix.cols)
    diagonal = _Diagonal(matrix)
    for tile in _tiles(matrix, shift):
        diagonal.keep(tile)
        entries = tile.exponents.exp2_()
        row_sum[tile.row] += entries.sum(dim=1)
        if tile.counts_for_cols:
            col_sum[tile.col] += entries.sum(dim=0)
    return LogSums(row_sum, col_sum, None if diagonal.exponents is None else diagonal.exponents + shift)


def _sum_with_running_maximum(matrix: ExpMatrix) -> LogSums:
    """The logarithms of the sums, with a reference exponent of its own for every row and every column."""
    row_sum = _RunningLogSum(matrix.rows)
    col_sum = row_sum if matrix.symmetric else _RunningLogSum(matrix.cols)
    diagonal = _Diagonal(matrix)
    for tile in _tiles(matrix, None):
        diagonal.keep(tile)
        row_sum.add(tile.row, tile.exponents, dim=1)
        if tile.counts_for_cols:
            col_sum.add(tile.col, tile.exponents, dim=0)
    return LogSums(row_sum.log2(), col_sum.log2(), diagonal.exponents)


class _RunningLogSum:
    """log2 of a sum of exponentials that arrives in blocks, relative to the largest exponent so far."""

    def __init__(self, operand: Tensor) -> None:
        self._sum = _statistic(operand)
        self._maximum = operand.new_full((operand.shape[0],), -math.inf)

    def add(self, where: slice, exponents: Tensor, dim: int) -> None:
        old = self._maximum[where]
        new = torch.maximum(old, exponents.amax(dim=dim))
        # Nothing but −inf so far (a diagonal alone): any finite reference gives the sum zero that is right.
        reference = torch.where(new == -math.inf, 0.0, new)
        self._sum[where] *= torch.exp2(old - reference)
        self._sum[where] += torch.exp2(exponents - reference.unsqueeze(dim)).sum(dim=dim)
        self._maximum[where] = new

    def log2(self) -> Tensor:
        return self._sum.log2() + torch.where(self._maximum == -math.inf, 0.0, self._maximum)


def _add_products(
    matrix: ExpMatrix,
    weights: SoftmaxWeights | None,
    shift: Tensor | None,
    grad_rows: Tensor | None,
    grad_cols: Tensor | None,
) -> None:
    """Both gradient products in one walk over the tiles; ``weights`` without ``shift`` takes two exponentials."""
    products = _products(matrix)
    entries_to_gradient = _gradient_rule(weights, shift, matrix.rows.dtype)
    if matrix.symmetric:
        grad_cols = grad_rows
    for tile in _tiles(matrix, shift):
        gradient = entries_to_gradient(tile)
        if weights is not None and tile.diagonal_rows is not None:
            gradient.diagonal(tile.diagonal_offset).copy_(weights.diagonal[tile.diagonal_rows])
        if grad_rows is not None:
            products.add(grad_rows[tile.row], gradient, matrix.cols[tile.col])
        if grad_cols is not None and tile.counts_for_cols:
            products.add(grad_cols[tile.col], gradient.T, matrix.rows[tile.row])


def _gradient_rule(
    weights: SoftmaxWeights | None, shift: Tensor | None, dtype: torch.dtype
) -> Callable[[_Tile], Tensor]:
    """How the exponents of a tile become its part of G, in place where possible."""
    if weights is None:
        return lambda tile: tile.exponents.exp2_()
    if shift is not None:
        row_factor = (weights.weight * torch.exp2(shift - weights.row_log_sum)).to(dtype)
        col_factor = (weights.weight * torch.exp2(shift - weights.col_log_sum)).to(dtype)
        return lambda tile: tile.exponents.exp2_().mul_(row_factor[tile.row, None] + col_factor[None, tile.col])
    row_reference, col_reference = weights.row_log_sum.to(dtype), weights.col_log_sum.to(dtype)
    weight = weights.weight.to(dtype)

    def with_two_exponentials(tile: _Tile) -> Tensor:
        by_row = torch.exp2(tile.exponents - row_reference[tile.row, None])
        by_col = torch.exp2(tile.exponents - col_reference[None, tile.col])
        return by_row.add_(by_col).mul_(weight)

    return with_two_exponentials
