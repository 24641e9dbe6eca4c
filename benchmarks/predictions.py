"""Write docs/kernels.md's predictions for an H100, with what was measured beside them.

    python -m benchmarks.predictions                            without measurements
    python -m benchmarks.predictions runs/gpu/kernels.json      with those of the kernels stage of `make gpu`

Only what stands between the two markers is replaced. A prediction is the longest of what the tensor cores, the way of
operands through the L2 cache and shared memory would take alone, and what comes on top; nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernels import SIZE, label
from benchmarks.readme import replace_block

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BLOCK = "predictions"

# An H100 SXM by its datasheet, and what others measured of its L2 cache.
PROCESSORS, CLOCK = 132, 1.755e9
OPERATIONS = 4096  # of the tensor cores, per clock and processor
SHARED_BYTES = 128  # of shared memory, likewise
L2_BYTES = (48, 24)  # likewise: best and worst
DEVICE_BYTES = 3.35e12  # per second
LAUNCH_SECONDS = 3e-6

SAMPLES, WIDTH = map(int, SIZE.split("x"))
BLOCK_SIDE = 4096  # of gradients
TILE, ITEM_BYTES = 128, 2
GRADIENT_BLOCKS = (SAMPLES // BLOCK_SIDE) ** 2 + (SAMPLES // BLOCK_SIDE) * (SAMPLES // BLOCK_SIDE + 1) // 2


@dataclass(frozen=True)
class Stage:
    """Kernels that do one step of the loss at N = 32768, D = 512, all terms, two modalities, in 16 bits.

    Args:
        title: in the table.
        measured_as: the key of the kernels' result file, and a pattern of their names in it.
        operations: of the tensor cores in units of N²·D.
        l2_bytes: per operation, through the L2 cache.
        shared_bytes: per operation, of shared memory, written and read.
        other: seconds on top.
        other_text: what they are.
    """

    title: str
    measured_as: tuple[str, str]
    operations: int = 0
    l2_bytes: float = 0.0
    shared_bytes: float = 0.0
    other: float = 0.0
    other_text: str = ""

    @property
    def tensor_seconds(self) -> float:
        return self._count / (OPERATIONS * PROCESSORS * CLOCK)

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
        return best, worst

    @property
    def _count(self) -> float:
        return self.operations * float(SAMPLES) ** 2 * WIDTH


def tile_bytes(
    rows: float, cols: float, out: bool, width: int = TILE, rows_copied: float | None = None
) -> tuple[float, float]:
    """Bytes per operation of a tile of 128×``width``: through the L2 cache, and of shared memory.

    Args:
        rows: how often its rows come through the L2 cache; one half where two blocks share them.
        cols: likewise its columns.
        out: whether it leaves, rounded, through shared memory.
        width: its columns.
        rows_copied: how often its rows are written to shared memory; once if not given. Columns always are.
    """
    operations = 2 * TILE * width * WIDTH
    row_bytes, col_bytes, result = (length * ITEM_BYTES for length in (TILE * WIDTH, width * WIDTH, TILE * width))
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


def stages() -> list[Stage]:
    """All rows of the table."""
    launches = GRADIENT_BLOCKS * LAUNCH_SECONDS
    side, block_side = SAMPLES // TILE, BLOCK_SIDE // TILE
    forward_share, block_share = panel_share(side, side // 2), panel_share(block_side, block_side // 2)
    streamed, resident, triton = label("streamed"), label("resident"), "gapkernels-triton"
    alone, alone_resident = label("streamed, cluster of one"), label("resident, cluster of one")
    totals = 2 * (SAMPLES * WIDTH * 4) * (2 * GRADIENT_BLOCKS / (SAMPLES // BLOCK_SIDE)) / DEVICE_BYTES
    stats, grad = r"StatsEpilogue", r"GradEpilogue"
    launches_text = f"{launches * 1e3:.1f}: {GRADIENT_BLOCKS} launches"
    rows_text = "1.0 GB"
    rows = [
        Stage(
            "`row_statistics`, `centroids` (twice), `operands`, `row_gradients`",
            (triton, r"row_statistics|centroids|operands|row_gradients"),
            other=1.0e9 / DEVICE_BYTES,
            other_text=f"{1.0e12 / DEVICE_BYTES:.1f}: {rows_text}",
        ),
        Stage("`tile_sums`, Triton", (triton, "tile_sums"), 3, *tile_bytes(1, 1, False)),
        Stage("`similarity_stats`", (streamed, stats), 3, *tile_bytes(1, 0.5, False)),
        Stage("… cluster of one", (alone, stats), 3, *tile_bytes(1, 1, False)),
        Stage("… rows stay", (resident, stats), 3, *tile_bytes(forward_share, 0.5, False, rows_copied=forward_share)),
        Stage(
            "… rows stay, cluster of one",
            (alone_resident, stats),
            3,
            *tile_bytes(forward_share, 1, False, rows_copied=forward_share),
        ),
    ]
    gradients = [
        ("`gradient_tiles`, Triton", (triton, "gradient_tiles"), tile_bytes(1, 1, True)),
        ("`similarity_grad`", (streamed, grad), tile_bytes(1, 0.5, True)),
        ("… cluster of one", (alone, grad), tile_bytes(1, 1, True)),
        ("… rows stay", (resident, grad), tile_bytes(block_share, 0.5, True, rows_copied=block_share)),
        (
            "… rows stay, cluster of one",
            (alone_resident, grad),
            tile_bytes(block_share, 1, True, rows_copied=block_share),
        ),
    ]
    rows += [Stage(title, key, 3, *bytes_, launches, launches_text) for title, key, bytes_ in gradients]
    rows.append(
        Stage(
            "`both_products`, Triton",
            (triton, "both_products"),
            6,
            *tile_bytes(1, 1, False, width=256),
            totals + launches,
            f"{totals * 1e3:.1f}: totals; {launches_text}",
        )
    )
    return rows


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
                _range(stage.predicted_seconds),
                _measured(stage, measured),
            ]
        )
    title = f"Milliseconds of one step, N = {SAMPLES:,}, D = {WIDTH}, bf16, all terms, on an H100:\n\n"
    return title + "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
