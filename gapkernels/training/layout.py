"""Names of the files in a run folder: `<experiment>/<method>/seed-<seed>/` holds one run."""

from __future__ import annotations

from pathlib import Path

# Of the whole experiment.
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
SUMMARY = "results.json"
PLOTS = "plots"
REPORT = "report.html"

# Of one run.
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
RESULT = "result.json"
EMBEDDINGS = "embeddings.safetensors"
TENSORBOARD = "tensorboard"


def run_folder(experiment: Path, method: str, seed: int) -> Path:
    """Return the folder of one run."""
    return experiment / method / f"seed-{seed}"


def is_finished(run: Path) -> bool:
    """Tell whether the run in a folder is complete: its result is written last."""
    return (run / RESULT).is_file()
