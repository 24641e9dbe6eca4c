"""The report itself: files on the disk from results in memory."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from gapkernels.benchmark_report import plots, tables
from gapkernels.benchmark_report.plots import Plot
from gapkernels.benchmark_report.results import Results, commit_note, load

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

    Example:
        >>> render([Path("benchmarks/results/gpu.json")], Path("report.html"))  # doctest: +SKIP
    """
    files = [load(path) for path in result_files]
    from matplotlib import rc_context

    # A dollar sign in a name begins no formula, and a sign that the font lacks is drawn as a box.
    with rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figures = [plots.draw(results) for results in files]
        comparison = plots.compare_devices(files)
    images = [*comparison, *(plot for section in figures for plot in section)]

    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{plot.name}.png" for plot in images]
    for path, plot in zip(paths, images, strict=True):
        path.write_bytes(plot.png)
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
    facts = [f"Measured on {results.date}, {commit_note(results.commits)}.", f"Versions: {versions}."]
    return facts + [note for note in [tables.clock_note(results)] if note]


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
    from jinja2 import Environment

    # `select_autoescape` goes by file name; this template is always HTML.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["keep_together"] = _keep_together
    template = environment.from_string(
        (resources.files("gapkernels.benchmark_report") / "page.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        comparison=[_embed(plot) for plot in comparison],
        sections=[
            {
                "device": results.device,
                "facts": _facts(results),
                "yardstick": tables.yardstick(results.rows).replace("`", ""),
                "peers": [(title, table, tables.marked(table)) for title, table in peer_sections(results)],
                "mark_meaning": tables.MARK_MEANING,
                "scaling": scaling_sections(results),
                "figures": [_embed(plot) for plot in drawn],
                "rows": tables.full_table(results),
                "skips": tables.skip_table(results),
            }
            for results, drawn in zip(files, figures, strict=True)
        ],
    )


def _keep_together(text: str) -> str:
    """No line ends inside of ``N = 4096``."""
    return text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _embed(plot: Plot) -> dict[str, str]:
    return {"caption": plot.caption, "source": "data:image/png;base64," + base64.b64encode(plot.png).decode()}
