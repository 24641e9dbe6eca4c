"""The tables of a report, as rows of text for Markdown and HTML alike."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from gapkernels.benchmark_report.results import Problem, Results, Row, exponent, fastest_of_ours
from gapkernels.errors import printable

Table = list[list[str]]
NOTHING = "–"
MARK = "*"
MARK_MEANING = f"{MARK} Other processes used more than 5 % of the CPU during this measurement."
_DISTURBING_SHARE = 0.05


def disturbed(row: Row) -> bool:
    """Whether other processes may have slowed a measurement down; what happens on the CPU hardly touches a GPU."""
    return row.clock == "wall" and row.other_cpu_share > _DISTURBING_SHARE


def marked(table: Table) -> bool:
    """Whether some measurement of a table was disturbed."""
    return any(line[1].endswith(MARK) for line in table)


def markdown(table: Table) -> str:
    """A Markdown table; the first row is the heading, all columns but the first are numbers."""
    heading, *rows = table
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(escape(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def escape(text: str) -> str:
    """Text as Markdown shows it, on one line; what looks like HTML would be taken for it."""
    return html.escape(printable(text), quote=False)


def peer_table(results: Results, problem: Problem) -> Table:
    """Everybody on one problem, fastest first, then those who could not take part."""
    rows = results.of(problem)
    ours = fastest_of_ours(rows)
    unit = "TFLOP/s" if results.is_gpu else "GFLOP/s"
    table = [["implementation", "time", "vs ours", unit, "utilisation", "extra memory", "loss error", "gradient error"]]
    table += [
        [
            row.label + (f" ({row.note})" if row.note else ""),
            f"{seconds(row.median)} ± {seconds(row.iqr)}" + (f" {MARK}" if disturbed(row) else ""),
            f"{significant(row.median / ours.median)}×" if ours else NOTHING,
            *_figures(results, row),
        ]
        for row in rows
    ]
    unfilled = [NOTHING] * (len(table[0]) - 2)
    return table + [[skip.label, skip.reason, *unfilled] for skip in results.skips if skip.problem == problem]


def scaling_table(results: Results, family: Problem) -> Table:
    """How time and memory grow with N, and where and why everybody stops."""
    table = [["implementation", "time grows as", "extra memory grows as", "largest N measured", "stopped by"]]
    for implementation, rows in results.series(family, "samples").items():
        time = exponent([(row.samples, row.median) for row in rows])
        memory = exponent([(row.samples, row.peak_extra_bytes) for row in rows if row.peak_extra_bytes])
        stops = [
            skip
            for skip in results.skips
            if skip.implementation == implementation
            and skip.problem.at("samples", family.samples) == family
            and skip.samples > rows[-1].samples
        ]
        first = min(stops, key=lambda skip: skip.samples, default=None)
        table.append(
            [
                rows[-1].label,
                f"N^{time:.2f}" if time is not None else NOTHING,
                f"N^{memory:.2f}" if memory is not None else NOTHING,
                str(rows[-1].samples),
                f"N = {first.samples}: {first.reason}" if first else "not tried beyond",
            ]
        )
    return table


def full_table(results: Results) -> Table:
    """Every row of a file."""
    unit = "TFLOP/s" if results.is_gpu else "GFLOP/s"
    heading = ["implementation", "loss", "N", "D", "type", "M", "pass", "time", "IQR", "rounds", unit, "utilisation"]
    heading += ["extra memory", "loss error", "gradient error"]
    heading.append("back to back" if results.is_gpu else "others' CPU share")
    table = [heading]
    for row in sorted(results.rows, key=lambda row: (row.loss, not row.backward, row.problem, row.median)):
        values = [row.label, row.loss, str(row.samples), str(row.width), row.dtype, str(row.modalities)]
        values += ["fwd+bwd" if row.backward else "fwd", seconds(row.median), seconds(row.iqr), str(row.rounds)]
        values += _figures(results, row)
        last = f"{row.other_cpu_share:.0%}"
        if results.is_gpu:
            last = NOTHING if row.back_to_back is None else seconds(row.back_to_back)
        table.append([*values, last])
    return table


def skip_table(results: Results) -> Table:
    """Every case without a measurement."""
    return [
        ["implementation", "problem", "reason"],
        *([skip.label, skip.problem.title, skip.reason] for skip in results.skips),
    ]


def _figures(results: Results, row: Row) -> list[str]:
    return [
        significant(row.tflops * (1 if results.is_gpu else 1000)),
        f"{row.utilisation:.2f}",
        size(row.peak_extra_bytes),
        error(row.loss_error),
        error(row.gradient_error),
    ]


def significant(value: float, digits: int = 3) -> str:
    """A number with some significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.{digits - 1}e}")  # 9.996 has one digit more before the point than it seems
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{decimals}f}"


def seconds(value: float) -> str:
    """A time in a unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{significant(value * factor)} {unit}"
    return f"{significant(value * 1e6)} µs"


def size(value: float | None) -> str:
    """Bytes in a unit that suits them."""
    if value is None:
        return NOTHING
    unit, factor = ("GiB", 2**30) if value >= 2**30 else ("MiB", 2**20)
    return f"{significant(value / factor)} {unit}"


def error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0e}"


def yardstick(rows: Sequence[Row]) -> str:
    """What utilisation is measured against."""
    rates = sorted(row.matmul_tflops for row in rows)
    middle = rates[len(rates) // 2]
    text = f"`torch.matmul`, {rows[0].matmul_dtype}: "
    onednn = sorted(row.onednn_tflops for row in rows if row.onednn_tflops)
    if not onednn:
        return text + f"{significant(middle)} TFLOP/s"
    text += f"{significant(middle * 1000)} GFLOP/s"
    return text + f"; the same product by oneDNN: {significant(onednn[len(onednn) // 2] * 1000)} GFLOP/s"
