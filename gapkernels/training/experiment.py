"""A whole experiment: every method with every seed, in one run folder that can be continued at any time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gapkernels.environment import describe_environment
from gapkernels.errors import UserError, printable
from gapkernels.training.checkpoint import write_text
from gapkernels.training.config import Config, did_you_mean, dump_config, read_config
from gapkernels.training.data import Dataset, load_dataset
from gapkernels.training.embeddings import read_embeddings
from gapkernels.training.evaluation import score
from gapkernels.training.layout import CONFIG, EMBEDDINGS, ENVIRONMENT, RESULT, is_finished, run_folder
from gapkernels.training.locks import is_lock, only_process
from gapkernels.training.loop import Trainer
from gapkernels.training.processes import Processes, training_processes
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

    Under torchrun all processes train each model together; the first one alone reads and writes the folder.

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
    with training_processes(device) as processes:
        config, dataset = processes.everywhere(lambda: _load(config, data_dir, processes.is_first))
        processes.require_same("the data set", dataset.fingerprint)
        with ExitStack() as stack:
            processes.on_first(lambda: _take_folder(folder, config, existing, stack))
            runs = [(method, seed) for seed in config.seeds for method in methods or config.methods]
            for number, (method, seed) in enumerate(runs, start=1):
                label = f"[{number}/{len(runs)}] {method}, seed {seed}"
                outcome = _run(config, method, seed, dataset, folder, label, processes)
                if processes.is_first:
                    _say(f"{label}: {outcome}")


def _load(config: Config, data_dir: Path | None, speak: bool) -> tuple[Config, Dataset]:
    """Read the data, and return them with the configuration that fits their modalities."""
    dataset = load_dataset(config.data, data_dir)
    if config.optim.batch_size > len(dataset.train):
        raise UserError(
            f"optim.batch_size is {config.optim.batch_size}, but the training split has {len(dataset.train)} samples"
        )
    complete = config.for_modalities(dataset.specs)
    if speak and complete.model.anchor != config.model.anchor:
        _say(f"model.anchor: {printable(complete.model.anchor)}, as no modality is called {config.model.anchor}")
    return complete, dataset


def _take_folder(folder: Path, config: Config, existing: Existing, stack: ExitStack) -> None:
    """Lock the run folder for as long as the stack lasts, and make it ready."""
    _earlier_run(folder, config, existing)  # before a folder is made
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(only_process(folder))
    prepare_folder(folder, config, existing)


def _run(
    config: Config, method: str, seed: int, dataset: Dataset, folder: Path, label: str, processes: Processes
) -> str:
    """Train one method with one seed, unless that is done; say in a few words what came of it."""
    where = run_folder(folder, method, seed)

    def finished() -> bool:
        if not is_finished(where):
            return False
        _require_same_run(where, config, dataset.fingerprint)
        return True

    if processes.on_first(finished):
        return "already finished"
    trainer = processes.everywhere(lambda: Trainer(config, method, seed, dataset, where, processes))
    result = trainer.fit(label)
    metrics = result["metrics"]
    grouping = f", V-measure {metrics['v_measure']:.3f}" if "v_measure" in metrics else ""
    return f"gap {metrics['gap']:.3f}{grouping} ({result['seconds']:.0f} s)"


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
