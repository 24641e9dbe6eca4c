"""Figures of a speed report: one panel each, readable on a phone, and never by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from gapkernels.benchmark_report.results import Problem, Results, Row, fastest_of_ours
from gapkernels.benchmark_report.tables import seconds, significant, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, made to be told apart with every common form of colour blindness.
_BLUE, _VERMILION, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_ORANGE, _SKY, _BLACK, _GREY = "#E69F00", "#56B4E9", "#000000", "#767676"
_DARK_BLUE, _LIGHT_BLUE = "#003A5D", "#4C9ED9"  # lightness tells our backends apart
# (colour, marker, line) of every implementation that has a place of its own; the same in every figure.
_STYLES = {
    "gapkernels-torch": (_BLUE, "o", "-"),
    "gapkernels-triton": (_LIGHT_BLUE, "s", "-"),
    "gapkernels-cuda": (_DARK_BLUE, "D", "-"),
    "authors": (_VERMILION, "^", "-"),
    "authors-compile": (_VERMILION, "v", "--"),
    "matmul": (_GREEN, "P", "-"),
    "matmul-compile": (_GREEN, "X", "--"),
    "open-clip": (_PURPLE, "<", "-"),
    "inf-cl": (_ORANGE, ">", "-"),
    "siglip-kernel": (_SKY, "h", "-"),
    "pytorch-metric-learning": (_BLACK, "d", "-"),
}
_DEVICE_STYLES = tuple(zip((_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY), "o^PXDs", strict=True))
_WIDTH, _HEIGHT, _DPI = 5.2, 3.6, 150
_GPU_MEMORY = 80e9  # of the GPU that most readers have in mind


@dataclass(frozen=True)
class Plot:
    """A finished figure.

    Args:
        name: file name without suffix.
        caption: what it shows.
        png: the image.
    """

    name: str
    caption: str
    png: bytes


def draw(results: Results) -> list[Plot]:
    """Every figure that a result file has data for."""
    plots = []
    for loss in ("gap", "info_nce"):
        family = results.main_family("samples", loss)
        if family is not None:
            plots += [draw_time(results, family), draw_memory(results, family)]
    family = results.main_family("width", "gap")
    if family is not None:
        plots.append(draw_utilisation(results, family))
    plots += [draw_speedup(results, problem) for problem in results.peer_problems()]
    return [plot for plot in plots if plot is not None]


def draw_time(results: Results, family: Problem) -> Plot:
    """Time against N, and the time that the products alone would take at the speed of ``torch.matmul``."""
    figure, axes = _new_figure()
    series = results.series(family, "samples")
    for implementation, rows in series.items():
        _line(axes, implementation, rows[0].label, [(row.samples, row.median) for row in rows])
    stopped = _mark_stops(axes, results, family, {name: (r[-1].samples, r[-1].median) for name, r in series.items()})
    reference = max((rows for rows in series.values() if rows[0].ours), key=len)
    floor = [(row.samples, row.operations / (row.matmul_tflops * 1e12)) for row in reference]
    axes.plot(*zip(*floor, strict=True), color=_GREY, linestyle=":", linewidth=1.5, label="products at matmul speed")
    onednn = [(row.samples, row.operations / (row.onednn_tflops * 1e12)) for row in reference if row.onednn_tflops]
    if onednn:
        axes.plot(*zip(*onednn, strict=True), color=_GREY, linestyle="-.", linewidth=1.2, label="products by oneDNN")
    _logarithmic(axes, [row.samples for rows in series.values() for row in rows])
    axes.set_ylabel("time (median)")
    axes.yaxis.set_major_formatter(lambda value, _: _short_seconds(value))
    _legend(axes)
    return _finish(
        figure,
        f"time-{results.name}-{family.loss}",
        f"{results.device}: time against the batch size ({_without_samples(family)}). The grey lines are the times "
        f"of the matrix products alone, at the speed of one large product.{stopped}",
    )


def draw_memory(results: Results, family: Problem) -> Plot | None:
    """Peak memory beyond the inputs against N."""
    figure, axes = _new_figure()
    drawn: list[int] = []
    last: dict[str, tuple[int, float]] = {}
    for implementation, rows in results.series(family, "samples").items():
        points = [(row.samples, row.peak_extra_bytes) for row in rows if row.peak_extra_bytes]
        if points:
            _line(axes, implementation, rows[0].label, points)
            drawn += [samples for samples, _ in points]
            last[implementation] = points[-1]
    if not drawn:
        return None
    stopped = _mark_stops(axes, results, family, last)
    gradients = sorted(
        {
            (row.samples, row.gradient_bytes)
            for row in results.rows
            if row.problem.at("samples", family.samples) == family
        }
    )
    axes.plot(*zip(*gradients, strict=True), color=_GREY, linestyle=":", linewidth=1.5, label="the gradients alone")
    if results.is_gpu:
        axes.axhline(_GPU_MEMORY, color=_BLACK, linewidth=1, linestyle="--")
        axes.text(min(drawn), _GPU_MEMORY, "80 GB", va="bottom", fontsize=9)
    _logarithmic(axes, drawn)
    axes.set_yscale("log", base=2)
    axes.set_ylabel("peak memory beyond the inputs")
    axes.yaxis.set_major_formatter(lambda value, _: size(value))
    _legend(axes)
    return _finish(
        figure,
        f"memory-{results.name}-{family.loss}",
        f"{results.device}: peak memory beyond the inputs, gradients included, against the batch size "
        f"({_without_samples(family)}).{stopped}",
    )


def draw_utilisation(results: Results, family: Problem) -> Plot:
    """Utilisation against D."""
    figure, axes = _new_figure()
    series = results.series(family, "width")
    for implementation, rows in series.items():
        if len(rows) > 1:
            _line(axes, implementation, rows[0].label, [(row.width, row.utilisation) for row in rows])
    axes.axhline(1, color=_GREY, linewidth=1.5, linestyle=":", label="torch.matmul")
    first = next(iter(series.values()))[0]
    if first.onednn_tflops:
        ratio = first.onednn_tflops / first.matmul_tflops
        axes.axhline(ratio, color=_GREY, linewidth=1.2, linestyle="-.", label="the same product by oneDNN")
    axes.set_xscale("log", base=2)
    widths = sorted({row.width for rows in series.values() if len(rows) > 1 for row in rows})
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("width D of the embeddings")
    axes.set_ylabel("share of torch.matmul's rate")
    _legend(axes)
    return _finish(
        figure,
        f"utilisation-{results.name}",
        f"{results.device}: operations of the products per second, as a share of a large torch.matmul in the same "
        f"run, against the width (N = {family.samples}, {family.dtype}, forward + backward).",
    )


def draw_speedup(results: Results, problem: Problem) -> Plot | None:
    """How many times faster than the authors' formulation everybody is, on one problem."""
    rows = results.of(problem)
    base = next((row for row in rows if row.implementation == "authors"), None)
    if base is None or fastest_of_ours(rows) is None:
        return None
    figure, axes = _new_figure(height=0.9 + 0.46 * len(rows))
    for position, row in enumerate(rows):
        ratio = base.median / row.median
        color = _STYLES.get(row.implementation, (_GREY,))[0]
        hatch = "///" if row.implementation.endswith("-compile") else None
        axes.barh(-position, ratio, height=0.68, color=color, hatch=hatch, edgecolor="white", linewidth=0)
        axes.text(ratio, -position, f" {significant(ratio)}×  ({seconds(row.median)})", va="center", fontsize=9)
    axes.set_yticks([-position for position in range(len(rows))], [row.label.replace(", ", ",\n") for row in rows])
    axes.axvline(1, color=_GREY, linewidth=1, linestyle=":")
    axes.set_xlim(0, 1.6 * base.median / rows[0].median)
    axes.set_xlabel("speed relative to the authors' formulation", loc="right")
    axes.grid(visible=False)
    scope = "both" if problem.backward else "forward"
    return _finish(
        figure,
        f"speedup-{results.name}-{problem.loss}-{scope}-N{problem.samples}-D{problem.width}",
        f"{results.device}: {problem.title}. Longer is faster.",
    )


def compare_devices(files: Sequence[Results]) -> list[Plot]:
    """Our fastest times on several devices, where they measured the gap loss at the same width."""
    sweeps: list[tuple[Results, list[Row]]] = []
    for results in files:
        family = results.main_family("samples", "gap")
        if family is not None:
            ours = [rows for rows in results.series(family, "samples").values() if rows[0].ours]
            sweeps.append((results, min(ours, key=lambda rows: rows[-1].median / rows[-1].samples ** 2)))
    if len(sweeps) < 2:
        return []
    figure, axes = _new_figure()
    for number, (results, rows) in enumerate(sweeps):
        color, marker = _DEVICE_STYLES[number % len(_DEVICE_STYLES)]
        label = f"{results.device}, D = {rows[0].width}, {rows[0].dtype} ({results.date})"
        points = [(row.samples, row.median) for row in rows]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=label)
    _logarithmic(axes, [row.samples for _, rows in sweeps for row in rows])
    axes.set_ylabel("time (median)")
    axes.yaxis.set_major_formatter(lambda value, _: _short_seconds(value))
    _legend(axes, columns=1)
    caption = "Our fastest backend on each device, forward + backward of the whole loss."
    return [_finish(figure, "devices", caption)]


def _mark_stops(axes: Axes, results: Results, family: Problem, last: dict[str, tuple[int, float]]) -> str:
    """Cross out the last point of everybody who ran out of memory beyond it; what the caption has to say of it."""
    failed = {
        (skip.implementation, skip.samples)
        for skip in results.skips
        if skip.kind == "memory" and skip.problem.at("samples", family.samples) == family
    }
    points = [point for name, point in last.items() if any(n == name and size > point[0] for n, size in failed)]
    if not points:
        return ""
    axes.plot(*zip(*points, strict=True), color=_BLACK, linestyle="", marker="x", markersize=11, mew=1.8, zorder=5)
    return " A cross: the next size ran out of memory."


def _line(axes: Axes, implementation: str, label: str, points: Sequence[tuple[float, float]]) -> None:
    color, marker, line = _STYLES.get(implementation, (_GREY, "*", "-"))
    ours = implementation.startswith("gapkernels")
    axes.plot(
        *zip(*points, strict=True),
        color=color,
        marker=marker,
        linestyle=line,
        linewidth=2.4 if ours else 1.4,
        markersize=6 if ours else 5,
        zorder=4 if ours else 3,
        label=label,
    )


def _logarithmic(axes: Axes, samples: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted(set(samples))
    every = 1 + len(ticks) // 9
    axes.set_xticks(ticks[::every], [_short_count(value) for value in ticks[::every]])
    axes.minorticks_off()
    axes.set_xlabel("batch size N")


def _legend(axes: Axes, columns: int = 2) -> None:
    """A legend under the axes, where it hides no line however many there are."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    lines = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * lines)


def _short_count(value: float) -> str:
    for suffix, factor in (("M", 2**20), ("k", 2**10)):
        if value >= factor:
            return f"{value / factor:g} {suffix}"
    return f"{value:g}"


def _short_seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 0.999:
            return f"{value * factor:g} {unit}"
    return f"{value:g} s"


def _without_samples(family: Problem) -> str:
    return family.title.replace(f"N = {family.samples}, ", "")


def _new_figure(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure: Figure, name: str, caption: str) -> Plot:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Plot(name, caption, buffer.getvalue())
