"""One self-contained HTML page from run folders: table, figures, settings and environment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from gapkernels.environment import format_environment
from gapkernels.reporting.figures import write_plots
from gapkernels.reporting.page import render
from gapkernels.training.checkpoint import write_text
from gapkernels.training.config import describe_config
from gapkernels.training.layout import PLOTS
from gapkernels.training.paper import paper_results
from gapkernels.training.plots import draw_comparison, draw_plots
from gapkernels.training.results import Experiment, summarise, table_rows


def write_report(experiments: Sequence[Experiment], path: Path) -> None:
    """Write the page, and each experiment's figures as PNG files into its run folder.

    Several experiments that differ in their batch size are compared in figures of their own, which go into the folder
    of the page.

    Args:
        experiments: what to report on, one section each.
        path: the HTML file; it refers to nothing outside itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    comparison = draw_comparison(experiments)
    write_plots(comparison, path.parent / PLOTS)
    sections = [_describe(experiment) for experiment in experiments]
    write_text(path, render("training/report.html.j2", sections=sections, comparison=comparison))


def _describe(experiment: Experiment) -> dict[str, object]:
    """Collect what the template shows of one experiment."""
    plots = draw_plots(experiment)
    write_plots(plots, experiment.folder / PLOTS)
    summary = summarise(experiment)
    return {
        "name": experiment.config.name,
        "batch_size": experiment.config.optim.batch_size,
        "rows": table_rows(summary, paper_results(experiment.config.data.dataset)),
        "all_rows": [
            ["metric", *summary],
            *([key, *(str(metrics[key]) for metrics in summary.values())] for key in next(iter(summary.values()))),
        ],
        "seeds": {method: [run.seed for run in runs] for method, runs in experiment.methods.items()},
        "seconds": sum(run.seconds for run in experiment.runs),
        "runs": len(experiment.runs),
        "groups": [(title, list(group)) for title, group in groupby(plots, lambda plot: plot.section)],
        "config": describe_config(experiment.config),
        "environment": "\n\n\n".join(_describe_environments(experiment)),
    }


def _describe_environments(experiment: Experiment) -> list[str]:
    """Describe where the experiment began, and every other place where one of its runs was made."""
    described = [format_environment(dict(experiment.environment))]
    for run in experiment.runs:
        text = "" if run.environment is None else format_environment(dict(run.environment))
        if text and not any(text in earlier for earlier in described):
            described.append(f"{run.method}, seed {run.seed}\n\n{text}")
    return described
