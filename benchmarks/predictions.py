"""Write docs/kernels.md's predictions for an H100, with what was measured beside them.

    python -m benchmarks.predictions                            without measurements
    python -m benchmarks.predictions runs/gpu/kernels.json      with those of the kernels stage of `make gpu`

Only what stands between the two markers is replaced. A prediction is the longest of what the tensor cores, the way of
operands through the L2 cache and shared memory would take alone, and what comes on top; nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kernels import OTHER_SIDES, SIZE, TOO_LONG_TO_STAY, label
from benchmarks.readme import replace_block
from gapkernels.backends.triton import gradient_blocks
from gapkernels.backends.triton.gradient_blocks import CLOCK, DEVICE_BYTES, LAUNCH_SECONDS, OPERATIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BLOCK, SIDES = "predictions", "block-sides"

# An H100 SXM by its datasheet, and what others measured of its L2 cache.
PROCESSORS = 132
SHARED_BYTES = 128  # of shared memory, per clock and processor
L2_BYTES = (48, 24)  # likewise: best and worst
EXPONENTIALS = 16  # likewise

SAMPLES, WIDTH = map(int, SIZE.split("x"))
TILE, WIDE, ITEM_BYTES = 128, 256, 2
LARGEST_SIDE = 4096  # of a block of gradients in 16 bits


@dataclass(frozen=True)
class Stage:
    """Kernels that do one step of the loss at N = 32768, D = 512 unless said, all terms, two modalities, in 16 bits.

    Args:
        title: in the table.
        measured_as: the key of the kernels' result file, and a pattern of their names in it.
        operations: of the tensor cores in units of N²·D.
        filled: share of the processors that its tiles fill.
        l2_bytes: per operation, through the L2 cache.
        shared_bytes: per operation, of shared memory, written and read.
        other: seconds on top.
        other_text: what they are.
        exposed: seconds on top in the worst case: exponentials that overlap with nothing.
        width: D.
    """

    title: str
    measured_as: tuple[str, str]
    operations: int = 0
    filled: float = field(default=1.0, kw_only=True)
    l2_bytes: float = 0.0
    shared_bytes: float = 0.0
    other: float = 0.0
    other_text: str = ""
    exposed: float = field(default=0.0, kw_only=True)
    width: int = field(default=WIDTH, kw_only=True)

    @property
    def tensor_seconds(self) -> float:
        return self._count / (OPERATIONS * PROCESSORS * CLOCK * self.filled)

    @property
    def l2_seconds(self) -> tuple[float, float]:
        best, worst = (self._count * self.l2_bytes / (bytes_ * PROCESSORS * CLOCK) for bytes_ in L2_BYTES)
        return best, worst

    @property
    def shared_seconds(self) -> float:
        return self._count * self.shared_bytes / (SHARED_BYTES * PROCESSORS * CLOCK)

    @property
    def predicted_seconds(self) -> tuple[float, float]:
        best, worst = (max(self.tensor_seconds, l2, self.shared_seconds) + self.other for l2 in self.l2_seconds)
        return best, worst + self.exposed

    @property
    def _count(self) -> float:
        return self.operations * float(SAMPLES) ** 2 * self.width


def tile_bytes(
    rows: float, cols: float, out: bool, width: int = TILE, rows_copied: float | None = None, depth: int = WIDTH
) -> tuple[float, float]:
    """Bytes per operation of a tile of 128×``width``: through the L2 cache, and of shared memory.

    Args:
        rows: how often its rows come through the L2 cache; one half where two blocks share them.
        cols: likewise its columns.
        out: whether it leaves, rounded, through shared memory.
        width: its columns.
        rows_copied: how often its rows are written to shared memory; once if not given. Columns always are.
        depth: D.
    """
    operations = 2 * TILE * width * depth
    row_bytes, col_bytes, result = (length * ITEM_BYTES for length in (TILE * depth, width * depth, TILE * width))
    # wgmma 64×n×16 reads its rows' and its columns' steps anew.
    instruction_width = min(width, 256)
    read = operations * (64 + instruction_width) * 16 * ITEM_BYTES / (2 * 64 * instruction_width * 16)
    copied = (1 if rows_copied is None else rows_copied) * row_bytes + col_bytes
    l2 = rows * row_bytes + cols * col_bytes + out * result
    return l2 / operations, (read + copied + 2 * out * result) / operations


def panel_share(tiles_in_row: int, rows: int, clusters: int = PROCESSORS // 2) -> float:
    """Panels that a cluster loads per tile that it multiplies; ``rows`` in pairs of tiles."""
    tiles = tiles_in_row * rows / clusters
    return (1 + tiles / tiles_in_row) / tiles


def side_of_block(width: int, processors: int, samples: int = SAMPLES) -> int:
    """Of a block of gradients in 16 bits."""
    return gradient_blocks.side(samples, samples, width, processors, _product_tile(width), (TILE, TILE), ITEM_BYTES)


def _product_tile(width: int) -> tuple[int, int]:
    """As ``gapkernels.backends.triton.tuning`` chooses by default."""
    return TILE, WIDE if width >= 2 * WIDE else TILE


def filled(side: int, width: int, processors: int) -> float:
    """The share of the processors that the tiles of both products of a block fill."""
    tile_m, tile_n = _product_tile(width)
    tiles = 2 * math.ceil(side / tile_m) * math.ceil(width / tile_n)
    return tiles / (math.ceil(tiles / processors) * processors)


def stages() -> list[Stage]:
    """All rows of the table."""
    gradient_side = side_of_block(WIDTH, PROCESSORS)
    side, block_side = SAMPLES // TILE, gradient_side // TILE
    triton = "gapkernels-triton"
    kept = SAMPLES**2 * ITEM_BYTES / DEVICE_BYTES  # written once, read once, of the pair
    kept_text = f"{kept * 1e3:.1f}: entries"
    launches, launches_text = _launches(gradient_side)
    rows_text = "1.0 GB"
    return [
        Stage(
            "`row_statistics`, `centroids` (twice), `operands`, `row_gradients`",
            (triton, r"row_statistics|centroids|operands|row_gradients"),
            other=1.0e9 / DEVICE_BYTES,
            other_text=f"{1.0e12 / DEVICE_BYTES:.1f}: {rows_text}",
        ),
        Stage("`tile_sums`, Triton", (triton, "tile_sums"), 3, *tile_bytes(1, 1, False)),
        Stage(
            "… entries of the pair kept",
            (label("entries kept"), "tile_sums"),
            3,
            *tile_bytes(1, 1, False),
            kept,
            kept_text,
        ),
        *_cuda("similarity_stats", r"StatsEpilogue", panel_share(side, side // 2), False),
        Stage(
            "`gradient_tiles`, Triton", (triton, "gradient_tiles"), 3, *tile_bytes(1, 1, True), launches, launches_text
        ),
        Stage(
            "… entries of the pair kept",
            (label("entries kept"), "gradient_tiles"),
            1,
            *tile_bytes(1, 1, True),
            kept + launches,
            f"{kept_text}; {launches_text}",
        ),
        *_cuda("similarity_grad", r"GradEpilogue", panel_share(block_side, block_side // 2), True),
        _products("`both_products`, Triton", triton, gradient_side),
        _products("… start early", label("products start early"), gradient_side, launches=0),
        *(_products(f"… blocks of {side}", label(f"blocks of {side}"), side) for side in OTHER_SIDES),
        *(_products_at(width, label(f"products by Triton, D = {width}")) for width in TOO_LONG_TO_STAY),
        Stage("… by the library", (label("products by the library"), r"^(?!.*gapkernels).*(gemm|nvjet|cutlass)")),
        _products("`both_products`, CUDA", "gapkernels-cuda", gradient_side, own=True),
        *(_products_at(width, label(f"wide, D = {width}"), own=True) for width in TOO_LONG_TO_STAY),
    ]


def _cuda(name: str, pattern: str, share: float, out: bool) -> list[Stage]:
    """One of the CUDA kernels in all variants.

    Args:
        name: of the kernel.
        pattern: of its name in measurements.
        share: panels that a cluster loads per tile where rows stay.
        out: whether tiles leave, as blocks.
    """

    def stage(title: str, variant: str, *copies: float, width: int = TILE, depth: int = WIDTH, **rows: float) -> Stage:
        on_top = _launches(side_of_block(depth, PROCESSORS)) if out else (0.0, "")
        bytes_ = tile_bytes(copies[0], copies[1], out, width=width, depth=depth, **rows)
        key = (label(variant), pattern)
        exposed = 1.5 * SAMPLES**2 / (EXPONENTIALS * PROCESSORS * CLOCK) if width == WIDE else 0.0
        return Stage(title, key, 3, *bytes_, *on_top, exposed=exposed, width=depth)

    wide = f"tiles of {TILE}×{WIDE}"
    rows = [
        stage(f"`{name}`", "streamed", 1, 0.5),
        stage("… cluster of one", "streamed, cluster of one", 1, 1),
        stage("… rows stay", "resident", share, 0.5, rows_copied=share),
        stage("… rows stay, cluster of one", "resident, cluster of one", share, 1, rows_copied=share),
        stage(f"… {wide}", "wide", 1, 0.5, width=WIDE),
    ]
    for depth in TOO_LONG_TO_STAY:
        rows.append(stage(f"… D = {depth}", f"streamed, D = {depth}", 1, 0.5, depth=depth))
        rows.append(stage(f"… D = {depth}, {wide}", f"wide, D = {depth}", 1, 0.5, width=WIDE, depth=depth))
    return rows


def _launches(side: int) -> tuple[float, str]:
    """Seconds of the launches of all blocks, and the words for it."""
    count = _blocks(side)
    return count * LAUNCH_SECONDS, f"{count * LAUNCH_SECONDS * 1e3:.1f}: {count} launches"


def _blocks(side: int) -> int:
    """Blocks of the pair and of the centroids."""
    blocks = math.ceil(SAMPLES / side)
    return blocks**2 + blocks * (blocks + 1) // 2


def _products(
    title: str, key: str, side: int, launches: int | None = None, *, own: bool = False, width: int = WIDTH
) -> Stage:
    """Both products of all blocks.

    Args:
        title: in the table.
        key: of the kernels' result file.
        side: of a block.
        launches: that cost time; of every block if not given.
        own: the CUDA backend's, where a cluster of two shares the columns of a tile.
        width: D.
    """
    launches = _blocks(side) if launches is None else launches
    waits = launches * LAUNCH_SECONDS
    # Read and written by every block; those of the rows stay in the L2 cache along a row of blocks.
    totals = 2 * (SAMPLES * width * 4) * (_blocks(side) / math.ceil(SAMPLES / side)) / DEVICE_BYTES
    return Stage(
        title,
        (key, "BothProducts" if own else "both_products"),
        6,
        *tile_bytes(1, 0.5 if own else 1, False, width=WIDE),
        totals + waits,
        f"{totals * 1e3:.1f}: totals" + (f"; {waits * 1e3:.1f}: {launches} launches" if launches else ""),
        filled=filled(side, width, PROCESSORS),  # of whole tiles, as `both_products` takes them at these sides
        width=width,
    )


def _products_at(width: int, key: str, *, own: bool = False) -> Stage:
    return _products(f"… D = {width}", key, side_of_block(width, PROCESSORS), own=own, width=width)


def block(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The table, in Markdown.

    Args:
        measured: content of the kernels' result file; empty leaves the last column empty.
    """
    head = [
        "stage",
        "tensor cores",
        f"L2, {L2_BYTES[0]} to {L2_BYTES[1]} B/clk",
        "shared memory",
        "other",
        "predicted",
        "measured",
    ]
    lines = [head, ["---"] * len(head)]
    for stage in stages():
        products = stage.operations > 0
        lines.append(
            [
                stage.title,
                _milliseconds(stage.tensor_seconds) if products else "",
                _range(stage.l2_seconds) if products else "",
                _milliseconds(stage.shared_seconds) if products else "",
                stage.other_text,
                _range(stage.predicted_seconds) if products or stage.other else "",
                _measured(stage, measured),
            ]
        )
    title = f"Milliseconds of one step, N = {SAMPLES:,}, D = {WIDTH} unless said, bf16, all terms, on an H100:\n\n"
    return title + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block_sides() -> str:
    """Sides of blocks of gradients at N = 65,536 and what they fill, in Markdown."""
    devices = {"A100": 108, "H100": PROCESSORS, "B200": 148}
    lines = [["D", *(f"{name}, {count} processors" for name, count in devices.items())]]
    lines.append(["---"] * len(lines[0]))
    for width in (128, 256, 512, 640, 768, 1024, 1280):
        cells = [f"{width:,}"]
        for processors in devices.values():
            side = side_of_block(width, processors, 65536)
            now, before = (f"{filled(s, width, processors):.0%}" for s in (side, LARGEST_SIDE))
            cells.append(f"{side}: {now}" + (f" (4096: {before})" if side != LARGEST_SIDE else ""))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measured(stage: Stage, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    key, pattern = stage.measured_as
    times = [kernel["milliseconds"] for kernel in measured.get(key, ()) if re.search(pattern, kernel["kernel"])]
    return f"{sum(times):.2f}" if times else ""


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _range(seconds: tuple[float, float]) -> str:
    best, worst = map(_milliseconds, seconds)
    return best if best == worst else f"{best} to {worst}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predictions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("measured", type=Path, nargs="?", help="result file of benchmarks.kernels")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page that is written")
    options = parser.parse_args(arguments)
    measured = {} if options.measured is None else json.loads(options.measured.read_text(encoding="utf-8"))
    text = replace_block(PAGE.read_text(encoding="utf-8"), block(measured), BLOCK)
    text = replace_block(text, block_sides(), SIDES)
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
