"""A whole experiment: every method with every seed, in one run folder that can be continued at any time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from gapkernels.environment import describe_environment
from gapkernels.errors import UserError, printable
from gapkernels.training.checkpoint import write_text
from gapkernels.training.config import Config, did_you_mean, dump_config, read_config
from gapkernels.training.data import load_dataset
from gapkernels.training.embeddings import read_embeddings
from gapkernels.training.evaluation import score
from gapkernels.training.layout import CONFIG, EMBEDDINGS, ENVIRONMENT, RESULT, is_finished, run_folder
from gapkernels.training.locks import is_lock, only_process
from gapkernels.training.loop import Trainer
from gapkernels.training.results import load_run, load_runs

Existing = Literal["continue", "require", "overwrite"]


def run_experiment(
    config: Config,
    folder: Path,
    methods: Sequence[str] | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
    existing: Existing = "continue",
) -> None:
    """Train every method with every seed; finished runs stay as they are, an interrupted one goes on.

    Args:
        config: the experiment.
        folder: run folder, made if it does not exist.
        methods: which methods of the configuration to train (all by default).
        data_dir: folder with the data set's files.
        device: `auto`, or anything `torch.device` takes.
        existing: what to do with a run that is already in the folder: continue it if its settings are the same;
            require that there is one to continue; or delete it and start anew.

    Raises:
        UserError: for an unknown method, a folder that holds something else or that another process trains into,
            missing or changed data or an unusable device.
    """
    for method in methods or ():
        if method not in config.methods:
            raise UserError(
                f"unknown method {method!r}{did_you_mean(method, config.methods)}; methods: {', '.join(config.methods)}"
            )
    target = choose_device(device)
    dataset = load_dataset(config.data, data_dir)
    if config.optim.batch_size > len(dataset.train):
        raise UserError(
            f"optim.batch_size is {config.optim.batch_size}, but the training split has {len(dataset.train)} samples"
        )
    asked_for, config = config.model.anchor, config.for_modalities(dataset.specs)
    if config.model.anchor != asked_for:
        _say(f"model.anchor: {printable(config.model.anchor)}, as no modality is called {asked_for}")
    _earlier_run(folder, config, existing)  # before a folder is made
    folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder):
        prepare_folder(folder, config, existing)
        runs = [(method, seed) for seed in config.seeds for method in methods or config.methods]
        for number, (method, seed) in enumerate(runs, start=1):
            label = f"[{number}/{len(runs)}] {method}, seed {seed}"
            where = run_folder(folder, method, seed)
            if is_finished(where):
                _require_same_run(where, config, dataset.fingerprint)
                _say(f"{label}: already finished")
                continue
            trainer = Trainer(config, method, seed, dataset, where, target)
            result = trainer.fit(label)
            metrics = result["metrics"]
            grouping = f", V-measure {metrics['v_measure']:.3f}" if "v_measure" in metrics else ""
            _say(f"{label}: gap {metrics['gap']:.3f}{grouping} ({result['seconds']:.0f} s)")


def rescore_experiment(folder: Path) -> None:
    """Measure the finished runs of a folder anew, from the embeddings of the test split that each of them left.

    For runs that are older than a metric. What was logged during training stays.

    Raises:
        UserError: if the folder holds no run, or embeddings are missing or damaged.
    """
    config, runs = load_runs(folder)
    anchor, modalities = config.model.anchor, config.model.encoders
    for run in runs:
        found = read_embeddings(run.folder / EMBEDDINGS)
        ordered = replace(found, modalities={name: found.modalities[name] for name in modalities})
        result = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
        result["metrics"] = score(ordered, anchor)
        write_text(run.folder / RESULT, json.dumps(result, indent=2) + "\n")
        _say(f"{run.method}, seed {run.seed}: measured anew")


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA, then MPS, then the CPU.

    Raises:
        UserError: if there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(2, device=device).sum().item()  # `meta` makes tensors that hold nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {name!r} cannot be used: {reason}") from error
    return device


def prepare_folder(folder: Path, config: Config, existing: Existing) -> None:
    """Make the run folder ready for `config`, without ever mixing two experiments or deleting foreign files."""
    earlier = _earlier_run(folder, config, existing)
    begun = earlier is not None and _has_begun(folder, earlier)
    if earlier is not None and existing == "overwrite":
        _delete_run(folder, earlier)
        begun = False
    elif earlier is not None and begun:
        config = config.model_copy(update={"seeds": tuple(sorted({*earlier.seeds, *config.seeds}))})
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, dump_config(config))
    # Where the first run was made; each result names its own environment.
    if not (begun and (folder / ENVIRONMENT).exists()):
        write_text(folder / ENVIRONMENT, json.dumps(describe_environment(), indent=2) + "\n")


def _earlier_run(folder: Path, config: Config, existing: Existing) -> Config | None:
    """Return the configuration of the run in a folder, if there is one.

    Raises:
        UserError: if it and `config` may not share the folder, or the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; choose another one with --out")
    if not (folder / CONFIG).is_file():
        if existing == "require":
            raise UserError(f"nothing to resume: {folder} holds no run")
        if folder.is_dir() and not all(is_lock(path) for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no run; choose another folder with --out")
        return None
    earlier = read_config(folder / CONFIG)
    # A run that stopped before its first step has nothing to lose or to mix.
    if existing != "overwrite" and _has_begun(folder, earlier) and not config.same_experiment(earlier):
        raise UserError(
            f"{folder} holds a run with other settings ({config.difference(earlier)}); choose another folder with "
            "--out, or delete that run with --overwrite"
        )
    return earlier


def _has_begun(folder: Path, config: Config) -> bool:
    return any((folder / method).exists() for method in config.methods)


def _require_same_run(run: Path, config: Config, fingerprint: str) -> None:
    """Raise where a finished run is not the one that would be made now: it would be reported as if it were."""
    made_with = load_run(run, config).data
    if made_with is not None and made_with != fingerprint:
        raise UserError(
            f"{run} was trained and tested on other data than there is now; bring that back, delete the folder to redo "
            "the run, or choose another folder with --out"
        )


def _delete_run(folder: Path, config: Config) -> None:
    for method in config.methods:
        shutil.rmtree(folder / method, ignore_errors=True)
    (folder / CONFIG).unlink()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
