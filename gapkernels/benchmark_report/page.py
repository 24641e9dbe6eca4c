"""The report itself: files on the disk from results in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gapkernels.benchmark_report import plots, tables
from gapkernels.benchmark_report.results import Results, commit_note, load
from gapkernels.reporting import page
from gapkernels.reporting.figures import Plot, plain_text, write_plots

LOSSES = ("gap", "info_nce")


class Report(NamedTuple):
    """Where the parts of a report are."""

    html: Path
    markdown: Path
    images: list[Path]


def render(result_files: Sequence[Path], out: Path) -> Report:
    """Write a report on one or several result files: HTML, Markdown beside it, and PNG images in a folder.

    Args:
        result_files: JSON files of the benchmarks, one section each.
        out: the HTML file. It refers to nothing outside itself.

    Raises:
        ValueError: a file is no result file of the benchmarks.
        OSError: a file cannot be read or written.

    Examples:
        >>> render([Path("benchmarks/results/gpu.json")], Path("report.html"))  # doctest: +SKIP
    """
    files = [load(path) for path in result_files]
    with plain_text():
        figures = [plots.draw(results) for results in files]
        comparison = plots.compare_devices(files)
    images = [*comparison, *(plot for section in figures for plot in section)]

    paths = write_plots(images, out.with_suffix(""))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_html(files, figures, comparison), encoding="utf-8")
    text = out.with_suffix(".md")
    text.write_text("\n\n".join(_markdown(results) for results in files) + "\n", encoding="utf-8")
    return Report(out, text, paths)


def peer_sections(results: Results) -> list[tuple[str, tables.Table]]:
    """Titles and tables of the problems on which everybody is compared."""
    return [(problem.title, tables.peer_table(results, problem)) for problem in results.peer_problems()]


def scaling_sections(results: Results) -> list[tuple[str, tables.Table]]:
    """Titles and tables of the sweeps over N."""
    families = [results.main_family("samples", loss) for loss in LOSSES]
    return [
        (family.title.replace(f"N = {family.samples}, ", ""), tables.scaling_table(results, family))
        for family in families
        if family is not None
    ]


def _facts(results: Results) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return [f"Measured on {results.date}, {commit_note(results.commits)}.", f"Versions: {versions}."]


def _markdown(results: Results) -> str:
    parts = [f"# {results.device}", " ".join(_facts(results)), f"Yardstick: {tables.yardstick(results.rows)}."]
    parts = [tables.escape(part) for part in parts]
    sections = [
        *peer_sections(results),
        *((f"Scaling: {title}", table) for title, table in scaling_sections(results)),
        ("Every row", tables.full_table(results)),
        ("Not measured", tables.skip_table(results)),
    ]
    for title, table in sections:
        if len(table) > 1:
            parts += [f"## {tables.escape(title)}", tables.markdown(table)]
        if tables.marked(table):
            parts.append("\\" + tables.MARK_MEANING)
    return "\n\n".join(parts)


def _html(files: Sequence[Results], figures: Sequence[list[Plot]], comparison: Sequence[Plot]) -> str:
    return page.render(
        "benchmark_report/page.html.j2",
        comparison=comparison,
        sections=[
            {
                "device": results.device,
                "facts": _facts(results),
                "yardstick": tables.yardstick(results.rows).replace("`", ""),
                "peers": [(title, table, tables.marked(table)) for title, table in peer_sections(results)],
                "mark_meaning": tables.MARK_MEANING,
                "scaling": scaling_sections(results),
                "figures": drawn,
                "rows": tables.full_table(results),
                "skips": tables.skip_table(results),
            }
            for results, drawn in zip(files, figures, strict=True)
        ],
    )
