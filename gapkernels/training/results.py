"""Reads run folders, averages over seeds and lays out the table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapkernels.training.checkpoint import write_text
from gapkernels.training.config import Config, read_config
from gapkernels.training.errors import UserError
from gapkernels.training.layout import CONFIG, ENVIRONMENT, METRICS, RESULT, SUMMARY


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        method: what it was trained with.
        seed: its seed.
        metrics: final metrics on the test split.
        history: records of the metric log, `split` being `train` or `test`.
        seconds: wall time of training and evaluation.
        class_names: name of each class, in the order of the labels.
        folder: where its files are.
    """

    method: str
    seed: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]
    seconds: float
    class_names: Sequence[str]
    folder: Path


@dataclass(frozen=True)
class Experiment:
    """A run folder: its configuration, where it ran, and its finished runs, sorted by method and seed."""

    folder: Path
    config: Config
    environment: Mapping[str, Any]
    runs: Sequence[RunResult]

    @property
    def methods(self) -> dict[str, list[RunResult]]:
        """The finished runs by method, in the order of the configuration."""
        grouped = {method: [run for run in self.runs if run.method == method] for method in self.config.methods}
        return {method: runs for method, runs in grouped.items() if runs}


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation over seeds (None for a single seed)."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Return the statistic of one value per seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.std is None else f"{self.mean:.3f} ± {self.std:.3f}"


def load_experiment(folder: Path) -> Experiment:
    """Read a run folder.

    Raises:
        UserError: if it holds no finished run, or a file of it is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    config = read_config(folder / CONFIG)
    runs = []
    for method in config.methods:
        found = [path.parent for path in (folder / method).glob(f"seed-*/{RESULT}")]
        runs += sorted((_load_run(path) for path in found), key=lambda run: run.seed)
    if not runs:
        raise UserError(f"{folder} holds no finished run yet")
    return Experiment(folder, config, _read_json(folder / ENVIRONMENT), runs)


def summarise(experiment: Experiment) -> dict[str, dict[str, Statistic]]:
    """Return each metric's statistic over seeds, by method.

    Raises:
        UserError: if the runs of a method do not have the same metrics.
    """
    for runs in experiment.methods.values():
        for run in runs[1:]:
            if run.metrics.keys() != runs[0].metrics.keys():
                raise UserError(
                    f"{run.folder} and {runs[0].folder} hold different metrics, from different versions of gapkernels; "
                    f"measure both anew with: gapkernels report --rescore {experiment.folder}"
                )
    return {
        method: {key: Statistic.of([run.metrics[key] for run in runs]) for key in runs[0].metrics}
        for method, runs in experiment.methods.items()
    }


def experiment_content(experiment: Experiment) -> dict[str, Any]:
    """Return settings, environment, statistics and every seed's values, in types that JSON knows."""
    methods = {
        method: {
            "seeds": [run.seed for run in experiment.methods[method]],
            "seconds": [run.seconds for run in experiment.methods[method]],
            "metrics": {
                key: {
                    "mean": value.mean,
                    "std": value.std,
                    "values": [run.metrics[key] for run in experiment.methods[method]],
                }
                for key, value in metrics.items()
            },
        }
        for method, metrics in summarise(experiment).items()
    }
    return {
        "name": experiment.config.name,
        "config": experiment.config.model_dump(mode="json"),
        "environment": experiment.environment,
        "methods": methods,
    }


def write_summary(experiment: Experiment) -> Path:
    """Write the statistics and every seed's values as JSON, and return the path."""
    path = experiment.folder / SUMMARY
    write_text(path, json.dumps(experiment_content(experiment), indent=2) + "\n")
    return path


def table_columns(keys: Iterable[str]) -> dict[str, str]:
    """Choose the metrics of the results table.

    Args:
        keys: names of the metrics there are.

    Returns:
        Headings by metric; an arrow shows which direction is better.
    """
    present = list(keys)
    recalls = [key for key in present if key.endswith("/R@1")]
    fixed_before = {"gap": "gap ↓", "true_pair_cosine": "true-pair cosine ↑"}
    fixed_after = {
        "v_measure": "V-measure ↑",
        "knn": "kNN ↑",
        "linear_probe": "linear probe ↑",
    }
    ways = {key: f"{key.removesuffix('/R@1').replace('_to_', ' → ')} R@1 ↑" for key in recalls}
    return {key: heading for key, heading in {**fixed_before, **ways, **fixed_after}.items() if key in present}


def table_rows(
    summary: Mapping[str, Mapping[str, Statistic]], reference: Mapping[str, Mapping[str, float]] | None = None
) -> list[list[str]]:
    """Return the results table as rows of text, headings first.

    Args:
        summary: statistics by method and metric.
        reference: published values by method and metric; they follow ours, `-` where there is none.
    """
    columns = table_columns(next(iter(summary.values())))
    rows = [["method", *columns.values()]]
    for method, metrics in summary.items():
        rows.append([method, *(str(metrics[key]) for key in columns)])
        if reference and method in reference:
            published = reference[method]
            rows.append([f"{method} (paper)", *(f"{published[k]:.3f}" if k in published else "-" for k in columns)])
    return rows


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of text in columns, the first row being the headings."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _load_run(folder: Path) -> RunResult:
    result = _read_json(folder / RESULT)
    history = [_parse_json(line, folder / METRICS) for line in _read_text(folder / METRICS).splitlines()]
    return RunResult(
        history=history,
        folder=folder,
        **{key: result[key] for key in ("method", "seed", "metrics", "seconds", "class_names")},
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error})") from error


def _read_json(path: Path) -> Any:
    return _parse_json(_read_text(path), path)


def _parse_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder and train again to redo this run") from error
