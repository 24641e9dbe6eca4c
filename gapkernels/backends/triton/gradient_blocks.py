"""How large a block of gradients is: as large as its memory allows, and such that its tiles fill the processors.

One launch multiplies a block of R rows and C columns of H both ways, in tiles of TILE_M×TILE_N:

    tiles   (⌈R/TILE_M⌉ + ⌈C/TILE_M⌉)·⌈D/TILE_N⌉, of which every wave takes as many as there are processors

With D = 768 and tiles of 128×256 a side of 4096 makes 192 tiles, on an H100 a wave of 132 and one of 60; 2816 makes
132. Small blocks cost launches, and totals that are read and written more often, so ``seconds`` counts all of it and
``side`` takes the side with the smallest count. Rates are an H100's; of another GPU only the number of processors is
asked.
"""

from __future__ import annotations

import functools
import math
import os

VARIABLE = "GAPKERNELS_GRADIENT_BLOCK"
"""A side to take instead of the counted one, to measure others."""

MOST_BYTES = 32 * 2**20
"""Of a block of H: what stays in a 50 MB L2 cache beside the operands that it is multiplied with."""

STEP = 128
"""Sides are multiples of it."""

# An H100 SXM by its datasheet.
CLOCK = 1.755e9
OPERATIONS = 4096  # of the tensor cores, per clock and processor
DEVICE_BYTES = 3.35e12  # per second
LAUNCH_SECONDS = 3e-6


def seconds(
    rows: int, cols: int, side: int, width: int, processors: int, tile: tuple[int, int], gradient_tile: tuple[int, int]
) -> float:
    """What the blocks of one matrix are counted to take.

    Args:
        rows, cols: of the matrix.
        side: of a block.
        width: D.
        processors: of the device.
        tile: of the products.
        gradient_tile: of H.
    """
    return sum(
        count * _of_block(height, length, width, processors, tile, gradient_tile)
        for height, vertically in _parts(rows, side)
        for length, horizontally in _parts(cols, side)
        if (count := vertically * horizontally)
    )


def _parts(length: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """``(length, how many)`` of whole parts and of the rest."""
    return (side, length // side), (length % side, min(length % side, 1))


def _of_block(
    rows: int, cols: int, width: int, processors: int, tile: tuple[int, int], gradient_tile: tuple[int, int]
) -> float:
    """Tensor cores wave by wave, the totals of the columns (those of the rows stay in the L2 cache), two launches."""

    def waves(tiles: int, entries: int, depth: int) -> float:
        return math.ceil(tiles / processors) * 2 * entries * depth / (OPERATIONS * CLOCK)

    product_tiles = (math.ceil(rows / tile[0]) + math.ceil(cols / tile[0])) * math.ceil(width / tile[1])
    gradient_tiles = math.ceil(rows / gradient_tile[0]) * math.ceil(cols / gradient_tile[1])
    totals = 2 * cols * width * 4 / DEVICE_BYTES
    return (
        waves(gradient_tiles, math.prod(gradient_tile), width)
        + waves(product_tiles, math.prod(tile), max(rows, cols))
        + totals
        + 2 * LAUNCH_SECONDS
    )


def largest_side(itemsize: int) -> int:
    """The largest that a block may have with entries of so many bytes."""
    return _chosen_side() or math.isqrt(MOST_BYTES // itemsize) // STEP * STEP


def _chosen_side() -> int | None:
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(f"{VARIABLE} must be a number of rows, 1 or more, got {value!r}")
    return int(value)


@functools.lru_cache(maxsize=256)
def _side(
    rows: int, cols: int, width: int, processors: int, tile: tuple[int, int], gradient_tile: tuple[int, int], most: int
) -> int:
    sides = range(most, 0, -STEP)  # of equal counts the larger side
    return min(sides, key=lambda side: seconds(rows, cols, side, width, processors, tile, gradient_tile))


def side(
    rows: int,
    cols: int,
    width: int,
    processors: int,
    tile: tuple[int, int],
    gradient_tile: tuple[int, int],
    itemsize: int,
) -> int:
    """The side of a block: the one with the smallest count within ``MOST_BYTES``, or what ``VARIABLE`` says.

    Args:
        rows, cols, width, processors, tile, gradient_tile: see ``seconds``.
        itemsize: bytes of an entry of H.
    """
    chosen = _chosen_side()
    if chosen is not None:
        return chosen
    return _side(rows, cols, width, processors, tile, gradient_tile, largest_side(itemsize))
