"""The paper's experiment at one or several batch sizes, and everything measured in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gapkernels.environment import source_commit
from gapkernels.errors import UserError
from gapkernels.training.checkpoint import write_text
from gapkernels.training.config import Config, load_config
from gapkernels.training.experiment import run_experiment
from gapkernels.training.layout import SUMMARY
from gapkernels.training.paper import paper_results
from gapkernels.training.processes import training_processes
from gapkernels.training.results import Experiment, experiment_content, load_experiment

LearningRateRule = Literal["sqrt", "none"]


def batch_configs(
    preset: str,
    files: Sequence[Path],
    overrides: Mapping[str, Any],
    batch_sizes: Sequence[int] | None,
    rule: LearningRateRule,
) -> dict[int, Config]:
    """Return the configuration for each batch size.

    Args:
        preset: name of a preset.
        files: YAML files with settings to change.
        overrides: values by dotted key.
        batch_sizes: sizes to compare; by default the configuration's own.
        rule: `sqrt` multiplies the learning rate by the square root of (batch size / the configuration's batch size),
            the rule for Adam (Malladi et al., arXiv 2205.10287); `none` leaves it.

    Raises:
        UserError: if a setting does not fit.
    """
    base = load_config(preset, files, overrides)
    configs = {}
    for size in batch_sizes or [base.optim.batch_size]:
        factor = math.sqrt(size / base.optim.batch_size) if rule == "sqrt" else 1.0
        changes = {"optim.batch_size": size, "optim.lr": base.optim.lr * factor}
        configs[size] = load_config(preset, files, {**overrides, **changes})
    return configs


def reproduce(
    configs: Mapping[int, Config],
    folder: Path,
    methods: Sequence[str] | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
) -> list[Experiment]:
    """Train every method with every seed at every batch size; finished runs are not repeated.

    Args:
        configs: configuration by batch size.
        folder: holds a run folder `batch-<size>` for each, and `results.json`.
        methods: which methods to train (all by default).
        data_dir: folder with the data set's files.
        device: `auto`, or anything `torch.device` takes.

    Returns:
        The experiments, in the order of the configurations; of several processes the first returns them, the others
        none.

    Raises:
        UserError: as `run_experiment`, or if the folder holds something else.
    """
    experiments: list[Experiment] = []

    def check_folder() -> None:
        if folder.is_dir() and any(folder.iterdir()) and not any(folder.glob("batch-*")):
            raise UserError(f"{folder} is not empty and holds no experiment; choose another folder with --out")

    def add_results(where: Path) -> None:
        experiments.append(load_experiment(where))
        # After each batch size: an interruption loses nothing.
        write_results(experiments, folder / SUMMARY)

    with training_processes(device) as processes:
        processes.on_first(check_folder)
        for size, config in configs.items():
            where = folder / f"batch-{size}"
            run_experiment(config, where, methods=methods, data_dir=data_dir, device=device)
            processes.on_first(partial(add_results, where))
    return experiments


def write_results(experiments: Sequence[Experiment], path: Path) -> None:
    """Write every seed's values with settings, environment, commit and the paper's figures as JSON."""
    dataset = experiments[0].config.data.dataset
    content = {
        "dataset": dataset,
        "commit": source_commit(),
        "paper": paper_results(dataset),
        "experiments": [
            {"batch_size": experiment.config.optim.batch_size, **experiment_content(experiment)}
            for experiment in experiments
        ],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
