"""Figures of a speed report: one panel each, readable on a phone, and never by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gapkernels.benchmark_report.results import Problem, Results, Row, fastest_of_ours
from gapkernels.benchmark_report.tables import seconds, significant, size
from gapkernels.reporting.figures import COLORS, LINES, MARKERS, Plot, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, *_PEERS = COLORS
_OURS = (_BLUE, "#4C9ED9", "#003A5D", "#00283F")  # lightness tells our backends apart
_GREY, _BLACK = "#767676", "#000000"
_HEIGHT = 3.6
_GPU_MEMORY = 80e9  # of the GPU that most readers have in mind


class Style(NamedTuple):
    """How an implementation looks in every figure of a result file."""

    color: str
    marker: str
    line: Any


def styles(results: Results) -> dict[str, Style]:
    """Styles by implementation, in the order of measurement.

    A peer and its compiled forms (`matmul`, `matmul-compile`) have one colour and differ in line and marker.
    """
    relatives: dict[str, list[str]] = {}
    names = list(dict.fromkeys(row.implementation for row in results.rows))
    for name in names:
        relatives.setdefault(name.split("-")[0], []).append(name)
    peers = [family for family in relatives if family != "gapkernels"]
    found = {}
    for number, name in enumerate(names):
        family = name.split("-")[0]
        place = relatives[family].index(name)
        color = _OURS[place % len(_OURS)] if family == "gapkernels" else _PEERS[peers.index(family) % len(_PEERS)]
        found[name] = Style(color, MARKERS[number % len(MARKERS)], LINES[place % len(LINES)])
    return found


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
        _line(axes, styles(results)[implementation], rows[0], [(row.samples, row.median) for row in rows])
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
    return finish(
        figure,
        results.device,
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
            _line(axes, styles(results)[implementation], rows[0], points)
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
    return finish(
        figure,
        results.device,
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
            _line(axes, styles(results)[implementation], rows[0], [(row.width, row.utilisation) for row in rows])
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
    return finish(
        figure,
        results.device,
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
        color, _, line = styles(results)[row.implementation]
        hatch = "///" if line != LINES[0] and not row.ours else None
        axes.barh(-position, ratio, height=0.68, color=color, hatch=hatch, edgecolor="white", linewidth=0)
        axes.text(ratio, -position, f" {significant(ratio)}×  ({seconds(row.median)})", va="center", fontsize=9)
    axes.set_yticks([-position for position in range(len(rows))], [row.label.replace(", ", ",\n") for row in rows])
    axes.axvline(1, color=_GREY, linewidth=1, linestyle=":")
    axes.set_xlim(0, 1.6 * base.median / rows[0].median)
    axes.set_xlabel("speed relative to the authors' formulation", loc="right")
    axes.grid(visible=False)
    scope = "both" if problem.backward else "forward"
    return finish(
        figure,
        results.device,
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
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        label = f"{results.device}, D = {rows[0].width}, {rows[0].dtype} ({results.date})"
        points = [(row.samples, row.median) for row in rows]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=label)
    _logarithmic(axes, [row.samples for _, rows in sweeps for row in rows])
    axes.set_ylabel("time (median)")
    axes.yaxis.set_major_formatter(lambda value, _: _short_seconds(value))
    _legend(axes, columns=1)
    caption = "Our fastest backend on each device, forward + backward of the whole loss."
    return [finish(figure, "Devices", "devices", caption)]


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


def _line(axes: Axes, style: Style, row: Row, points: Sequence[tuple[float, float]]) -> None:
    axes.plot(
        *zip(*points, strict=True),
        color=style.color,
        marker=style.marker,
        linestyle=style.line,
        linewidth=2.4 if row.ours else 1.4,
        markersize=6 if row.ours else 5,
        zorder=4 if row.ours else 3,
        label=row.label,
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
    figure, axes = new_figure(height)
    axes.grid(alpha=0.3)
    return figure, axes
