"""Reads run folders, averages over seeds and lays out the table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from gapkernels.errors import UserError, printable, shown
from gapkernels.reading import Count, Quantity, Strict, parse_json, read_bytes, read_json
from gapkernels.training.checkpoint import write_text
from gapkernels.training.config import Config, read_config, validate_config
from gapkernels.training.cost import StepCost
from gapkernels.training.layout import CONFIG, ENVIRONMENT, METRICS, RESULT, SUMMARY, run_folder


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
        data: fingerprint of the data set; None where an older version has not written it.
        environment: where it was made; likewise.
        step_cost: what its training steps cost; None where they were not measured, or where the run went on from a
            checkpoint of its last step.
    """

    method: str
    seed: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]
    seconds: float
    class_names: Sequence[str]
    folder: Path
    data: str | None = None
    environment: Mapping[str, Any] | None = None
    step_cost: StepCost | None = None

    @property
    def epoch_cost(self) -> dict[str, float]:
        """Time and processor time of an epoch of training in seconds, and peak memory in MiB; what was measured."""
        if self.step_cost is None or not (self.history and self.history[-1]["epoch"]):
            return {}
        steps = self.history[-1]["step"] / self.history[-1]["epoch"]
        found = {
            "epoch_seconds": steps * self.step_cost.seconds,
            "epoch_cpu_seconds": steps * self.step_cost.cpu_seconds,
        }
        if self.step_cost.peak_bytes is not None:
            found["peak_mib"] = self.step_cost.peak_bytes / 2**20
        return found


class _Device(Strict):
    name: str
    description: str


class _Backend(Strict):
    name: str
    usable: bool
    reason: str | None


class _Package(Strict):
    name: str
    version: str | None
    extra: str


class Environment(Strict):
    """What `describe_environment` returns."""

    gapkernels: str
    python: str
    platform: str
    torch: str
    triton: str | None
    cuda: str | None
    rocm: str | None
    devices: list[_Device]
    backends: list[_Backend]
    packages: list[_Package]


class _Result(Strict):
    """`result.json`."""

    method: str
    seed: Count
    metrics: dict[str, Quantity] = Field(min_length=1)
    steps: Count
    seconds: Annotated[Quantity, Field(ge=0)]
    device: str
    processes: Count = 1
    class_names: list[str]
    config: dict[str, Any] | None = None
    data: str | None = None
    environment: Environment | None = None
    step_cost: StepCost | None = None

    @field_validator("metrics")
    @classmethod
    def _has_gap(cls, metrics: dict[str, float]) -> dict[str, float]:
        if "gap" not in metrics:
            raise ValueError("must hold `gap`")
        return metrics


class _Record(Strict):
    """A line of `metrics.jsonl`: beside these, numbers by name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Quantity]

    split: Literal["train", "test"]
    step: Count
    epoch: Annotated[Quantity, Field(ge=0)]


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
        UserError: if it holds no finished run, its runs have different metrics, or a file of it is damaged.
    """
    config, runs = load_runs(folder)
    for run in runs:
        different = set(run.metrics) ^ set(runs[0].metrics)
        if different:
            raise UserError(
                f"{run.folder / RESULT} and {runs[0].folder / RESULT} must hold the same metrics; only one of them has "
                f"{shown(min(different))}; measure all anew with: gapkernels report --rescore {folder}"
            )
    environment = read_json(folder / ENVIRONMENT, Environment)
    return Experiment(folder, config, environment.model_dump(), runs)


def load_runs(folder: Path) -> tuple[Config, list[RunResult]]:
    """Read the configuration and the finished runs of a run folder, sorted by method and seed.

    Raises:
        UserError: if it holds no finished run, or a file of it is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    config = read_config(folder / CONFIG)
    runs: list[RunResult] = []
    for method in config.methods:
        found = [path.parent for path in (folder / method).glob(f"seed-*/{RESULT}")]
        runs += sorted((load_run(path, config) for path in found), key=lambda run: run.seed)
    if not runs:
        raise UserError(f"{folder} holds no finished run yet")
    return config, runs


def load_run(folder: Path, config: Config | None = None) -> RunResult:
    """Read a finished run.

    Args:
        folder: `<experiment>/<method>/seed-<seed>`.
        config: configuration of the experiment, which must be that of the run.

    Raises:
        UserError: if a file is damaged, or those of another run.
    """
    path, log = folder / RESULT, folder / METRICS
    try:
        result = read_json(path, _Result)
        lines = read_bytes(log).splitlines()
        history = [parse_json(line, _Record, log, f"line {number}") for number, line in enumerate(lines, start=1)]
    except UserError as error:
        raise UserError(f"{error}; delete its folder and train again to redo this run") from error
    if folder != run_folder(folder.parents[1], result.method, result.seed):
        raise UserError(
            f"{path} does not belong there: it is the result of method {shown(result.method)}, seed {result.seed}"
        )
    if config is not None and result.config is not None:
        try:
            made_with = validate_config(result.config)
        except UserError as error:
            raise UserError(f"{path}: config: {error}") from error
        if not config.same_experiment(made_with):
            raise UserError(f"{path} was made with other settings ({config.difference(made_with)})")
    return RunResult(
        method=result.method,
        seed=result.seed,
        metrics=result.metrics,
        history=[record.model_dump() for record in history],
        seconds=result.seconds,
        class_names=result.class_names,
        folder=folder,
        data=result.data,
        environment=None if result.environment is None else result.environment.model_dump(),
        step_cost=result.step_cost,
    )


def summarise(experiment: Experiment) -> dict[str, dict[str, Statistic]]:
    """Return each metric's statistic over seeds, by method."""
    return {
        method: {key: Statistic.of([run.metrics[key] for run in runs]) for key in runs[0].metrics}
        for method, runs in experiment.methods.items()
    }


def costs(runs: Sequence[RunResult]) -> dict[str, list[float]]:
    """Return what an epoch of training cost, one value per run, as far as every run measured it."""
    measured = [run.epoch_cost for run in runs]
    return {key: [cost[key] for cost in measured] for key in measured[0] if all(key in cost for cost in measured)}


def experiment_content(experiment: Experiment) -> dict[str, Any]:
    """Return settings, environment, statistics and every seed's values, in types that JSON knows."""
    methods = {
        method: {
            "seeds": [run.seed for run in experiment.methods[method]],
            "seconds": [run.seconds for run in experiment.methods[method]],
            **costs(experiment.methods[method]),
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
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
