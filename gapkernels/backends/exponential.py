"""The one primitive behind every N×N object of the loss, as backends receive it: a matrix of exponentials.

    e_ij = exp2(scale·⟨rows_i, cols_j⟩ + row_bias_i + col_bias_j)

InfoNCE of a pair of modalities and centroid uniformity are both sums over such a matrix without its diagonal, and
their gradients are products of a matrix of the same shape with ``rows`` and ``cols``. The matrix itself is never
stored. A backend provides :func:`off_diagonal_log_sums` and the two gradient products; it knows nothing of modalities.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


def statistics_dtype(device: torch.device) -> torch.dtype:
    """The type for O(N) statistics and O(N·D) row arithmetic: float64, except on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


class ExpMatrix(NamedTuple):
    """A matrix of exponentials of scaled inner products, in base 2.

    Attributes:
        rows: ``[n, D]``, float32 or float64, contiguous.
        cols: ``[N, D]``, same type. The same tensor as ``rows`` if ``symmetric``.
        scale: 0-dim tensor; positive.
        bias: None, or ``([n], [N])`` added to the exponent along rows and columns.
        bound: 0-dim tensor; no exponent exceeds it, up to rounding.
        diagonal: column of row 0's diagonal entry (row i's is at column ``diagonal + i``); None if the block has no
            diagonal. Diagonal entries are left out of all sums and products.
        symmetric: only the entries above the diagonal are distinct; each counts for its row and for its column.
    """

    rows: Tensor
    cols: Tensor
    scale: Tensor
    bias: tuple[Tensor, Tensor] | None
    bound: Tensor
    diagonal: int | None
    symmetric: bool = False


class LogSums(NamedTuple):
    """Base-2 logarithms of the sums of an :class:`ExpMatrix`, in the statistics type (float64 where there is one).

    Attributes:
        row: ``[n]``, log2 Σ_j e_ij over the off-diagonal columns; −inf where there is none.
        col: ``[N]``, log2 Σ_i e_ij over the off-diagonal rows. The same tensor as ``row`` for a symmetric matrix.
        diagonal: ``[n]``, the exponent of the diagonal entry, from the same arithmetic as its neighbours; None if the
            matrix has no diagonal or is symmetric.
    """

    row: Tensor
    col: Tensor
    diagonal: Tensor | None


class SoftmaxWeights(NamedTuple):
    """What turns exponentials into the gradient of a symmetric cross-entropy with respect to the inner products.

        G_ij = weight·(e_ij / 2^row_log_sum_i + e_ij / 2^col_log_sum_j)   i ≠ j
        G_ii = diagonal_i

    Attributes:
        weight: 0-dim tensor.
        row_log_sum: ``[n]``, base 2, over the whole row, diagonal entry included; statistics type.
        col_log_sum: ``[N]``, likewise for columns.
        diagonal: ``[n]``, computed without cancellation by the caller.
    """

    weight: Tensor
    row_log_sum: Tensor
    col_log_sum: Tensor
    diagonal: Tensor


class Backend(Protocol):
    """How matrices of exponentials are summed and multiplied."""

    def off_diagonal_log_sums(self, matrix: ExpMatrix) -> LogSums:
        """Sum the matrix along rows and columns; a sum that leaves the range of the type is computed another way."""

    def add_products(
        self, matrix: ExpMatrix, weights: SoftmaxWeights | None, grad_rows: Tensor | None, grad_cols: Tensor | None
    ) -> None:
        """Add ``G·cols`` to ``grad_rows [n, D]`` and ``Gᵀ·rows`` to ``grad_cols [N, D]``, in place.

        Without ``weights`` G is the matrix of exponentials itself, with a zero diagonal; its entries must not exceed
        one. A gradient that is None is not computed. For a symmetric matrix ``grad_rows`` receives ``G·cols`` in full.
        """
