"""The blocks of one matrix follow one another: the launches of a block are those of the first of its kind, elsewhere.

What a launcher finds out about its arguments is the same for all blocks of one shape, and takes longer than a small
block's kernels. So the launches of the first block of a kind are written out as a function of the addresses that change
(``.recording.as_function``), and the others call that. It serves later evaluations as well: nothing that it contains
belongs to one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gapkernels.backends.contract import Matrix, SigmoidWeights, SoftmaxSums
from gapkernels.backends.triton import products, recording, tuning
from gapkernels.backends.triton.device import input_precision
from gapkernels.backends.triton.launch import is_direct
from gapkernels.backends.triton.recording import DescriptorPlace, Expression, Launch

MOST_KINDS = 256

OF_ROWS = ("rows", "row_factors", "row_log_sums", "row_ids", "row_limits", "row_weights", "total_rows")
OF_COLS = ("cols", "col_factors", "col_log_sums", "col_ids", "col_limits", "col_weights", "total_cols")
OF_ALL = ("scale_pointer", "reference", "bias", "out", "scale_partials", "kept")
NUMBERS = ("diagonal", "rows_are_first", "cols_are_first")
PLACES = {name: place for place, name in enumerate((*OF_ROWS, *OF_COLS, *OF_ALL))}
"""Tensors of a block, by the names that the kernels have for them."""
PLACES["h"] = PLACES["h_transposed"] = PLACES["out"]

Written = Callable[..., None]
"""Of addresses, a stream, the first row and column of a block, and ``NUMBERS``."""


class Known:
    """What has been written out, by kind of matrix and by shape of block."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[Any, ...], dict[tuple[int, int, bool], Written]] = {}

    def of_kind(self, kind: tuple[Any, ...]) -> dict[tuple[int, int, bool], Written]:
        """By rows, columns, and whether the block is a symmetric one; to be added to."""
        if kind not in self._kinds and len(self._kinds) >= MOST_KINDS:
            self._kinds.clear()
        return self._kinds.setdefault(kind, {})


class Whereabouts(NamedTuple):
    """Of everything that the blocks of a matrix read and write.

    Attributes:
        kind: what tells these launches from others, besides the shape of a block.
        addresses: of the first row of each, in the order of ``PLACES``; zero of what there is not.
        stream: to launch on.
    """

    kind: tuple[Any, ...]
    addresses: tuple[int, ...]
    stream: int


def of_matrix(
    matrix: Matrix,
    sums: SoftmaxSums | SigmoidWeights | None,
    reference: Tensor,
    row_products: Tensor | None,
    col_products: Tensor | None,
    partials: Tensor | None,
    h: Tensor,
    entries: Tensor | None,
    num_terms: int,
) -> Whereabouts | None:
    """Where the blocks of a matrix lie; None where their launches cannot be written out.

    Args:
        matrix, sums, row_products, col_products: as for ``Backend.add_products``.
        reference: of the exponents.
        partials: of the moment.
        h: room for a block.
        entries: that were kept, where blocks begin at multiples of 16 bytes.
        num_terms: of the longest sum.
    """
    configs = [tuning.decided(kernel, matrix.rows) for kernel in ("gradient_tiles", "both_products")]
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 for x in (matrix.rows, matrix.cols))
    if not (is_direct() and aligned) or None in configs or products.by_library(matrix.rows.dtype):
        return None
    log_sums = (sums.row, sums.col) if isinstance(sums, SoftmaxSums) else (None, None)
    row_weight = None if sums is None else sums.row_weight
    col_weight = sums.col_weight if isinstance(sums, SoftmaxSums) else None
    of_rows = (matrix.rows, matrix.row_factor, log_sums[0], matrix.row_ids, matrix.row_limit, row_weight, row_products)
    of_cols = (matrix.cols, matrix.col_factor, log_sums[1], matrix.col_ids, matrix.col_limit, col_weight, col_products)
    bias = sums.bias if isinstance(sums, SigmoidWeights) else None
    of_all = (matrix.scale, reference, bias, h, partials, entries)
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    tensors = (*of_rows, *of_cols, *of_all)
    looks = [x if x is None else (x.dtype, x.stride()) for x in tensors]
    return Whereabouts(
        kind=(
            device,
            matrix.biased,
            *configs,
            input_precision(matrix.rows.dtype),
            matrix.scale.data_ptr() % 16,
            products.starts_early(matrix.rows.device),
            products.choice(),
            entries is not None and (num_terms, entries.data_ptr() % 16),
            *looks,
        ),
        addresses=tuple([0 if x is None else x.data_ptr() for x in tensors]),
        stream=driver.get_current_stream(device),
    )


def written(launches: Sequence[Launch | None]) -> Written | None:
    """The launches of a block as a function of addresses; None where one of them did not go straight to a binary."""
    if None in launches:
        return None

    def placed(name: str, arg: Any) -> Any:
        if isinstance(arg, TensorDescriptor):
            return DescriptorPlace(placed(name, arg.base), arg.shape, arg.strides, arg.block_shape)
        if isinstance(arg, Tensor):
            place = f"addresses[{PLACES[name]}]"
            if name in (*OF_ROWS, "kept"):
                place += f"+top*{arg.stride(0) * arg.itemsize}"
            if name in OF_COLS:
                place += f"+left*{arg.stride(0) * arg.itemsize}"
            if name == "kept":
                place += f"+left*{arg.itemsize}"
            return Expression(place)
        return Expression(name) if name in NUMBERS else arg

    return recording.as_function(
        [
            launch._replace(args=tuple(map(placed, launch.kernel.arg_names, launch.args)))
            for launch in launches
            if launch is not None
        ],
        ("top", "left", *NUMBERS),
    )
