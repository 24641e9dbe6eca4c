"""What the matrix kernels work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

NO_DIAGONAL = -(1 << 30)
"""A diagonal that no entry lies on: column = row + this."""

HALF_UNIT = 2.0**14
"""Float16 gradients are scaled such that a soft-max weight of one becomes this; twice it is still in range."""


class Matrix(NamedTuple):
    """A matrix of exponentials, or a block of one; see :mod:`.tiles` for its entries.

    Attributes:
        rows: ``[n, D']``, padded rows, see :mod:`.row_statistics`.
        row_factor: ``[n]`` float32, inverse norms of the rows, or their biases if ``biased``.
        cols: ``[N, D']``, same type.
        col_factor: ``[N]`` float32.
        scale: 0-dim, any floating type: the natural exponent's factor.
        diagonal: column of the diagonal entry of row 0, which is left out of everything.
        biased: whether the factors are biases.
        symmetric: rows and columns are the same and each entry above the diagonal stands for two.
    """

    rows: Tensor
    row_factor: Tensor
    cols: Tensor
    col_factor: Tensor
    scale: Tensor
    diagonal: int = 0
    biased: bool = False
    symmetric: bool = False


class MatrixKernels(NamedTuple):
    """What computes on whole matrices, in all an evaluation's N² work but the library's products.

    Attributes:
        tile_sums: see :func:`gapkernels.backends.triton.tile_sums.tile_sums`.
        gradient_tiles: see :func:`gapkernels.backends.triton.gradient_tiles.gradient_tiles`.
    """

    tile_sums: Callable[[list[Matrix], Tensor | None, int], tuple[Tensor, Tensor]]
    gradient_tiles: Callable[[Matrix, Tensor | None, Tensor | None, Tensor, float, Tensor | None, Tensor], None]
