"""A matrix of exponentials in tiles of library matrix products.

    for each block of rows I:                                        [T, D]
        for each block of columns J (J ≥ I if symmetric):            [T, D]
            exponent = scale·rows_I · cols_Jᵀ + biases               [T, T], stays in the cache
            forward:   row_sum_I += Σ_j exp2(exponent)      col_sum_J += Σ_i exp2(exponent)
            backward:  H = exp2(exponent)·(1/row_sum_I + 1/col_sum_Jᵀ)
                       row_products_I += H · cols_J         col_products_J += Hᵀ · rows_I

With n rows, N columns: 2nND operations forward and 6nND backward (half of both if symmetric), O(T²) memory on top of
the operands. Exponentials and sums pass over a tile a few times while it is in the cache, which costs about a tenth
of the products at D = 512.

One exponential serves the row sum and the column sum because both use the same constant reference exponent. Sums
which that reference would push out of the type's range are recomputed with a running maximum for every row and column.
Sums of softplus need no reference: no term of theirs exceeds its logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gapkernels.backends.contract import (
    LN_2,
    LOG2_E,
    NO_DIAGONAL,
    Matrix,
    SigmoidWeights,
    SoftmaxSums,
    SoftplusSums,
    statistics_dtype,
)
from gapkernels.cpu import is_amd

# A float32 tile of 1024×1024 is 4 MiB: two of them stay in the caches of current cores, and the products are large
# enough to run at full speed (measured: 512 loses 5 %, 2048 gains nothing).
TILE = 1024


class _Sums(NamedTuple):
    """Of one matrix, ``[n]`` and ``[N]`` in the statistics type; the same tensor twice if it is symmetric."""

    row: Tensor
    col: Tensor


def log_sums(matrix: Matrix) -> _Sums:
    """Base-2 logarithms of row and column sums, diagonal left out."""
    shift = _constant_shift(matrix)
    sums = _sum_with_constant_shift(matrix, shift)
    smallest = torch.minimum(sums.row.min(), sums.col.min())
    if matrix.symmetric:  # only the total of a symmetric matrix is divided by, so only the total must be in range
        smallest = sums.row.sum() / matrix.rows.shape[0]
    if _known_true(smallest >= _smallest_exact_sum(matrix)):
        return _Sums(sums.row.log2() + shift, sums.col.log2() + shift)
    return _sum_with_running_maximum(matrix)


def softplus_sums(matrix: Matrix, bias: Tensor) -> SoftplusSums:
    """See ``gapkernels.backends.contract.Backend.softplus_sums``."""
    sums = SoftplusSums(_statistic(matrix.rows), _statistic(matrix.rows))
    for tile in _tiles(matrix, -bias):
        logits = tile.exponents.mul_(LN_2)
        sums.softplus[tile.row] += F.softplus(logits, threshold=40).sum(dim=1)
        sums.sigmoid[tile.row] += logits.sigmoid_().sum(dim=1)
    return sums


def add_products(
    matrix: Matrix,
    sums: SoftmaxSums | SigmoidWeights | None,
    reference: Tensor,
    row_products: Tensor | None,
    col_products: Tensor | None,
    moment: Tensor | None,
    first_rows: bool,
    first_cols: bool,
) -> None:
    """Both products in one walk; see ``gapkernels.backends.contract.Backend.add_products``."""
    shift: Tensor | None = reference
    factors = None
    if isinstance(sums, SigmoidWeights):
        shift = -sums.bias
    elif sums is not None:
        # With the forward pass's own reference exponent rows of H sum up to what its sums say, rounding included.
        constant = _constant_shift(matrix)
        below = constant - reference
        smallest = torch.minimum(sums.row.min(), sums.col.min()) - below
        if _known_true(smallest >= math.log2(_smallest_exact_sum(matrix))):
            shift, dtype = constant, matrix.rows.dtype
            row_factor, col_factor = torch.exp2(below - sums.row), torch.exp2(below - sums.col)
            if sums.row_weight is not None and sums.col_weight is not None:
                row_factor, col_factor = row_factor * sums.row_weight, col_factor * sums.col_weight
            factors = row_factor.to(dtype), col_factor.to(dtype)
        else:
            # Logarithms near the reference keep their digits; what it loses in the type of the tiles goes to them.
            shift = reference.to(matrix.rows.dtype).to(reference.dtype)
            rest = reference - shift
            sums = sums._replace(row=sums.row + rest, col=sums.col + rest)
    entries_to_gradient = _gradient_rule(sums, factors, matrix.rows.dtype)
    products = _products(matrix)
    if matrix.symmetric:
        col_products, first_cols = row_products, first_rows
    if moment is not None and row_products is None:
        row_products, first_rows = torch.empty_like(matrix.rows), True
    before: Tensor | float = 0.0
    if moment is not None and row_products is not None and not first_rows:
        before = _inner_product(matrix.rows, row_products)
    for tile in _tiles(matrix, shift):
        gradient = entries_to_gradient(tile)
        if sums is not None and tile.diagonal_rows is not None:
            gradient.diagonal(tile.diagonal_offset).copy_(-sums.negative_mass[tile.diagonal_rows])
        if row_products is not None:
            first = first_rows and tile.col.start == 0
            products.add(row_products[tile.row], gradient, matrix.cols[tile.col], first)
        if col_products is not None and tile.counts_for_cols:
            first = first_cols and tile.row.start == 0
            products.add(col_products[tile.col], gradient.T, matrix.rows[tile.row], first)
    if moment is not None and row_products is not None:
        moment += _inner_product(matrix.rows, row_products) - before  # Σ_ij H_ij⟨rows_i, cols_j⟩


def _inner_product(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y, summed in the statistics type."""
    return torch.linalg.vecdot(x, y).sum(dtype=statistics_dtype(x.device))


# ---- range --------------------------------------------------------------------------------------------------------


def _minimum_exponent(dtype: torch.dtype) -> int:
    return -126 if dtype == torch.float32 else -1022


def _constant_shift(matrix: Matrix) -> Tensor:
    """The smallest reference exponent with which no sum of up to N entries can overflow."""
    entries = max(matrix.rows.shape[0], matrix.cols.shape[0])
    headroom = -_minimum_exponent(matrix.rows.dtype) - math.ceil(math.log2(entries))
    statistics = statistics_dtype(matrix.rows.device)
    if matrix.biased:  # distances are not negative
        return torch.zeros((), dtype=statistics, device=matrix.rows.device)
    bound = matrix.scale.to(statistics) * LOG2_E
    if matrix.largest is not None:
        bound = bound * matrix.largest
    return (bound - headroom).clamp_min(0)


def _smallest_exact_sum(matrix: Matrix) -> float:
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

    def add(self, total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        total.addmm_(left, right, beta=0 if first else 1)  # with zero nothing is read


class _OneDnnProducts:
    """Products through oneDNN: twice the speed of the MKL behind ``torch.mm`` on AMD's AVX-512 processors."""

    def exponents(self, rows: Tensor, cols: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, cols, bias, "none", [], "")

    def add(self, total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        if first:
            total.copy_(torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], ""))
        else:
            total.copy_(torch.ops.mkldnn._linear_pointwise.binary(left, total, right.T, None, "add"))


def onednn_is_faster() -> bool:
    """Whether float32 products on this CPU should go to oneDNN: an AMD processor with AVX-512."""
    return (
        is_amd()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _products(matrix: Matrix) -> _TorchProducts | _OneDnnProducts:
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
        counts_for_cols: False for a tile on the diagonal of a symmetric matrix, which holds every pair twice.
        beyond_row, beyond_col: ``[rows, cols]``, entries that exceed the limit of their row or of their column; None
            without one.
    """

    row: slice
    col: slice
    exponents: Tensor
    diagonal_rows: slice | None
    diagonal_offset: int
    counts_for_cols: bool
    beyond_row: Tensor | None
    beyond_col: Tensor | None


def _tiles(matrix: Matrix, shift: Tensor | None) -> Iterator[_Tile]:
    """Compute the tiles one after another, ``shift`` subtracted from the exponents."""
    products = _products(matrix)
    rows, cols = matrix.rows, matrix.cols
    scale = (matrix.scale.to(statistics_dtype(rows.device)) * LOG2_E).to(rows.dtype)
    row_bias, col_bias = matrix.row_factor, matrix.col_factor
    row_limit, col_limit = (_relative(limit, shift, rows.dtype) for limit in (matrix.row_limit, matrix.col_limit))
    if col_bias is None:
        col_bias = rows.new_zeros(cols.shape[0])
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
            diagonal_rows, offset = None, row.start + matrix.diagonal - col.start
            if matrix.diagonal != NO_DIAGONAL:
                first = max(row.start, col.start - matrix.diagonal)
                last = min(row.stop, col.stop - matrix.diagonal)
                if first < last:
                    diagonal_rows = slice(first, last)
                    exponents.diagonal(offset).fill_(-math.inf)
            if matrix.row_ids is not None and matrix.col_ids is not None:
                exponents.masked_fill_(matrix.row_ids[row, None] == matrix.col_ids[None, col], -math.inf)
            beyond_row = None if row_limit is None else exponents > row_limit[row, None]
            beyond_col = None if col_limit is None else exponents > col_limit[None, col]
            counts_for_cols = not (matrix.symmetric and i == j)
            yield _Tile(row, col, exponents, diagonal_rows, offset, counts_for_cols, beyond_row, beyond_col)


def _relative(limit: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if limit is None:
        return None
    return (limit if shift is None else limit - shift).to(dtype)


def _within(entries: Tensor, beyond: Tensor | None, fill: float = 0.0) -> Tensor:
    return entries if beyond is None else entries.masked_fill(beyond, fill)


def _blocks(length: int) -> list[slice]:
    return [slice(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def _statistic(operand: Tensor) -> Tensor:
    """A zero for every row of an operand."""
    return operand.new_zeros(operand.shape[0], dtype=statistics_dtype(operand.device))


def _sum_with_constant_shift(matrix: Matrix, shift: Tensor) -> _Sums:
    """The sums (not yet their logarithms) of 2^−shift times the matrix: one exponential per entry."""
    row_sum = _statistic(matrix.rows)
    col_sum = row_sum if matrix.symmetric else _statistic(matrix.cols)
    for tile in _tiles(matrix, shift):
        entries = tile.exponents.exp2_()
        row_sum[tile.row] += _within(entries, tile.beyond_row).sum(dim=1)
        if tile.counts_for_cols:
            col_sum[tile.col] += _within(entries, tile.beyond_col).sum(dim=0)
    return _Sums(row_sum, col_sum)


def _sum_with_running_maximum(matrix: Matrix) -> _Sums:
    """The logarithms of the sums, with a reference exponent of its own for every row and every column."""
    row_sum = _RunningLogSum(matrix.rows)
    col_sum = row_sum if matrix.symmetric else _RunningLogSum(matrix.cols)
    for tile in _tiles(matrix, None):
        row_sum.add(tile.row, _within(tile.exponents, tile.beyond_row, -math.inf), dim=1)
        if tile.counts_for_cols:
            col_sum.add(tile.col, _within(tile.exponents, tile.beyond_col, -math.inf), dim=0)
    return _Sums(row_sum.log2(), col_sum.log2())


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


def _gradient_rule(
    sums: SoftmaxSums | SigmoidWeights | None, factors: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Callable[[_Tile], Tensor]:
    """How the exponents of a tile become its part of H, in place where possible."""
    if sums is None:
        return lambda tile: tile.exponents.exp2_()
    if isinstance(sums, SigmoidWeights):
        weight = sums.row_weight.to(dtype)
        return lambda tile: tile.exponents.mul_(LN_2).sigmoid_().mul_(weight[tile.row, None])
    if factors is not None:
        row_factor, col_factor = factors

        def with_one_exponential(tile: _Tile) -> Tensor:
            entries = tile.exponents.exp2_()
            if tile.beyond_row is None and tile.beyond_col is None:
                return entries.mul_(row_factor[tile.row, None] + col_factor[None, tile.col])
            by_row = _within(entries, tile.beyond_row) * row_factor[tile.row, None]
            return by_row.add_(_within(entries, tile.beyond_col) * col_factor[None, tile.col])

        return with_one_exponential
    row_log_sum, col_log_sum = sums.row.to(dtype), sums.col.to(dtype)
    row_weight, col_weight = sums.row_weight, sums.col_weight

    def with_two_exponentials(tile: _Tile) -> Tensor:
        by_row = torch.exp2(tile.exponents - row_log_sum[tile.row, None])
        by_col = torch.exp2(tile.exponents - col_log_sum[None, tile.col])
        if row_weight is not None and col_weight is not None:
            by_row *= row_weight[tile.row, None].to(dtype)
            by_col *= col_weight[None, tile.col].to(dtype)
        return _within(by_row, tile.beyond_row).add_(_within(by_col, tile.beyond_col))

    return with_two_exponentials
