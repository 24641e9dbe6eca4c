"""One self-contained HTML page from run folders: table, figures, settings and environment."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path

from gapkernels.environment import format_environment
from gapkernels.training.checkpoint import atomic_write, write_text
from gapkernels.training.config import describe_config
from gapkernels.training.layout import PLOTS
from gapkernels.training.plots import Plot, draw_plots
from gapkernels.training.results import Experiment, summarise, table_rows


@dataclass(frozen=True)
class _Figure:
    """What the template needs of a figure."""

    caption: str
    source: str


def write_report(experiments: Sequence[Experiment], path: Path) -> None:
    """Write the page, and each experiment's figures as PNG files into its run folder.

    Args:
        experiments: what to report on, one section each.
        path: the HTML file; it refers to nothing outside itself.
    """
    from jinja2 import Environment

    # `select_autoescape` goes by file name; this template is always HTML.
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (resources.files("gapkernels.training") / "report.html.j2").read_text(encoding="utf-8")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, template.render(sections=[_describe(experiment) for experiment in experiments]))


def _describe(experiment: Experiment) -> dict[str, object]:
    """Collect what the template shows of one experiment."""
    plots = draw_plots(experiment)
    folder = experiment.folder / PLOTS
    folder.mkdir(exist_ok=True)
    for plot in plots:
        with atomic_write(folder / f"{plot.name}.png") as file:
            file.write(plot.png)
    summary = summarise(experiment)
    return {
        "name": experiment.config.name,
        "rows": table_rows(summary),
        "all_rows": [
            ["metric", *summary],
            *([key, *(str(metrics[key]) for metrics in summary.values())] for key in next(iter(summary.values()))),
        ],
        "seeds": {method: [run.seed for run in runs] for method, runs in experiment.methods.items()},
        "seconds": sum(run.seconds for run in experiment.runs),
        "runs": len(experiment.runs),
        "groups": [(title, [_embed(plot) for plot in group]) for title, group in groupby(plots, lambda p: p.section)],
        "config": describe_config(experiment.config),
        "environment": format_environment(dict(experiment.environment)),
    }


def _embed(plot: Plot) -> _Figure:
    return _Figure(plot.caption, "data:image/png;base64," + base64.b64encode(plot.png).decode())
