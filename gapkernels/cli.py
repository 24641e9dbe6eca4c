"""The `gapkernels` command: info, train, reproduce, eval and report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gapkernels import __version__
from gapkernels.errors import SharedError, Stopped, UserError, printable

_USER_ERROR = 2
_INTERRUPTED = 130
_TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; those of this process by default.

    Returns:
        The exit code: 0, 2 for a mistake that lies outside the program (one line on the error stream says which), 130
        if interrupted, 143 if a training was told to end (SIGTERM) and has written a checkpoint. A bug in the program
        shows its traceback.
    """
    try:
        overrides, words = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options, unknown = _build_parser().parse_known_args(words)
        if options.command not in ("train", "reproduce"):
            unknown += [f"--{key}" for key in overrides]
        if unknown:
            raise UserError(f"unknown option {unknown[0]} (see gapkernels {options.command} --help)")
        options.overrides = overrides
        options.run(options)
        sys.stdout.flush()
    except SharedError as error:
        return _report_mistake(str(error)) if _is_first_process() else _USER_ERROR
    except UserError as error:
        return _report_mistake(str(error))
    except Stopped as stopped:
        if _is_first_process():
            print(f"gapkernels: {stopped}", file=sys.stderr)
        return _TERMINATED
    except KeyboardInterrupt:
        print("gapkernels: interrupted; a training run goes on from its last checkpoint when repeated", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has seen enough (`gapkernels info | head`); Python must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder without the right to write, a folder in place of a file
        return _report_mistake(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return 0


def _is_first_process() -> bool:
    """Whether this is the only process, or the first that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def _report_mistake(message: str) -> int:
    print(f"gapkernels: error: {printable(message)}", file=sys.stderr)
    return _USER_ERROR


def split_overrides(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate settings of the configuration (`--optim.lr 1e-3`, `--optim.lr=1e-3`) from the other words.

    Returns:
        The settings by dotted key, and the remaining words in order.

    Raises:
        UserError: if a setting has no value.
    """
    overrides: dict[str, str] = {}
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            others.append(word)
            continue
        if not equals:
            following = next(remaining, None)
            if following is None or following.startswith("--"):
                raise UserError(f"--{key} needs a value")
            value = following
        overrides[key] = value
    return overrides, others


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage: an error is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gapkernels",
        description="Fused exact losses for multimodal contrastive training that closes the modality gap.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gapkernels {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info", help="show versions, devices, backends and optional packages", allow_abbrev=False
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    train = commands.add_parser(
        "train",
        help="train the methods of a preset and compare them",
        description="Train every method of a preset with every seed, print the table of results and write a report.",
        epilog="Every setting of the configuration is an option too, for instance --optim.lr 1e-3 or "
        "--methods.gap.temperature 0.07; --print-config lists them all. An interrupted run goes on when the same "
        "command is given again; finished runs are not repeated.",
        allow_abbrev=False,
    )
    train.add_argument("preset", metavar="PRESET", help="name of a preset, for instance digits")
    train.add_argument("--methods", metavar="A,B", help="train only these methods of the preset")
    train.add_argument("--seeds", metavar="0,1", help="seeds to train with")
    train.add_argument(
        "--config", metavar="FILE", type=Path, action="append", default=[], help="YAML file with settings to change"
    )
    train.add_argument("--out", metavar="DIR", type=Path, help="run folder (default: runs/ and the preset's name)")
    train.add_argument("--data-dir", metavar="DIR", type=Path, help="folder with the data set's files")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="fail if there is no run to continue")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in the folder and start anew")
    train.add_argument("--print-config", action="store_true", help="print the configuration and stop")
    train.set_defaults(run=_train)

    reproduce = commands.add_parser(
        "reproduce",
        help="train the paper's methods at one or several batch sizes, beside the paper's results",
        description="Train every method of a preset with every seed at every batch size, print the results beside the "
        "paper's, write plots, a report and results.json.",
        epilog="Settings of the configuration are options too, as for train. An interrupted experiment goes on when "
        "the same command is given again; finished runs are not repeated.",
        allow_abbrev=False,
    )
    reproduce.add_argument("--dataset", metavar="PRESET", required=True, help="name of a preset, for instance cifar10")
    reproduce.add_argument("--batch-sizes", metavar="256,4096", help="batch sizes (default: the preset's)")
    reproduce.add_argument(
        "--lr-scaling",
        choices=("sqrt", "none"),
        default="sqrt",
        help="learning rate of other batch sizes: with the square root of the size, or the same (default: sqrt)",
    )
    reproduce.add_argument("--methods", metavar="A,B", help="train only these methods of the preset")
    reproduce.add_argument("--seeds", metavar="0,1", help="seeds to train with")
    reproduce.add_argument(
        "--config", metavar="FILE", type=Path, action="append", default=[], help="YAML file with settings to change"
    )
    reproduce.add_argument(
        "--out", metavar="DIR", type=Path, help="folder (default: runs/reproduce/ and the preset's name)"
    )
    reproduce.add_argument("--data-dir", metavar="DIR", type=Path, help="folder with the data set's files")
    reproduce.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    reproduce.set_defaults(run=_reproduce)

    evaluate = commands.add_parser(
        "eval",
        help="evaluate a checkpoint or a file of embeddings",
        description="Evaluate a checkpoint (.pt) on its data set's test split, or a file of embeddings (.npz or "
        ".safetensors) that holds one array [N, D] per modality and optionally `labels`, `ids` and `groups` [N]; with "
        "`ids/<modality>` for each the modalities may have different numbers of samples, such as images and captions.",
        allow_abbrev=False,
    )
    evaluate.add_argument("path", metavar="FILE", type=Path, help="checkpoint or embeddings")
    evaluate.add_argument("--anchor", metavar="NAME", help="modality the others are retrieved from and by")
    evaluate.add_argument("--data-dir", metavar="DIR", type=Path, help="folder with the data set's files")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_eval)

    report = commands.add_parser(
        "report",
        help="rebuild the report of a run folder, or write one from the benchmarks' result files",
        description="Rebuild results.json, plots and report.html of one or several run folders; or compare result "
        "files of the benchmarks (.json): HTML, Markdown and plots.",
        allow_abbrev=False,
    )
    report.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="run folder, or result file (.json)")
    report.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the HTML file (default: report.html in the run folder; speed-report.html here for result files)",
    )
    report.add_argument(
        "--rescore", action="store_true", help="first measure the runs anew, from the embeddings that they left"
    )
    report.set_defaults(run=_report)
    return parser


def _info(options: argparse.Namespace) -> None:
    from gapkernels.environment import describe_environment, format_environment

    environment = describe_environment()
    print(json.dumps(environment, indent=2) if options.json else format_environment(environment))


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line changes, by dotted key."""
    from gapkernels.training.config import parse_override

    overrides: dict[str, Any] = {key: parse_override(value) for key, value in options.overrides.items()}
    if options.seeds is not None:
        overrides["seeds"] = _words(options.seeds)
    return overrides


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _train(options: argparse.Namespace) -> None:
    from gapkernels.environment import require

    require("train", "gapkernels train")
    from gapkernels.training.config import describe_config, load_config
    from gapkernels.training.experiment import run_experiment

    config = load_config(options.preset, options.config, _overrides(options))
    if options.print_config:
        print(describe_config(config))
        return
    folder = options.out or Path("runs") / config.name
    run_experiment(
        config,
        folder,
        methods=_words(options.methods) if options.methods else None,
        data_dir=options.data_dir,
        device=options.device,
        existing="overwrite" if options.overwrite else "require" if options.resume else "continue",
    )
    if not _is_first_process():
        return
    _write_report([folder], folder / "report.html")


def _reproduce(options: argparse.Namespace) -> None:
    from gapkernels.environment import require

    require("train", "gapkernels reproduce")
    from gapkernels.training.reproduce import batch_configs, reproduce

    sizes = None
    if options.batch_sizes is not None:
        words = _words(options.batch_sizes)
        if not all(word.isdecimal() and len(word) < 10 and int(word) > 1 for word in words):
            raise UserError(f"--batch-sizes must be whole numbers above 1, got {options.batch_sizes!r}")
        sizes = [int(word) for word in words]
    configs = batch_configs(options.dataset, options.config, _overrides(options), sizes, options.lr_scaling)
    folder = options.out or Path("runs") / "reproduce" / next(iter(configs.values())).name
    experiments = reproduce(
        configs,
        folder,
        methods=_words(options.methods) if options.methods else None,
        data_dir=options.data_dir,
        device=options.device,
    )
    if not _is_first_process():
        return
    _write_report([experiment.folder for experiment in experiments], folder / "report.html")
    print(f"results: {folder / 'results.json'}")


def _eval(options: argparse.Namespace) -> None:
    from gapkernels.environment import require

    require("train", "gapkernels eval")
    from gapkernels.training.device import choose_device
    from gapkernels.training.evaluation import evaluate_file
    from gapkernels.training.results import format_table

    metrics = evaluate_file(options.path, options.anchor, options.data_dir, choose_device(options.device))
    if options.json:
        print(json.dumps(metrics, indent=2))
    else:
        print(format_table([["metric", "value"], *([name, f"{value:.4f}"] for name, value in metrics.items())]))


def _report(options: argparse.Namespace) -> None:
    from gapkernels.environment import require

    require("train", "gapkernels report")
    if options.out is not None and options.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out names the HTML file and must end in .html, got {options.out}")
    if options.out is not None and options.out.is_dir():
        raise UserError(f"--out names the HTML file, but {options.out} is a folder")
    result_files = [path.suffix == ".json" for path in options.paths]
    if all(result_files):
        if options.rescore:
            raise UserError("--rescore is for run folders")
        _write_speed_report(options.paths, options.out or Path("speed-report.html"))
        return
    if any(result_files):
        raise UserError("run folders and result files (.json) do not go into one report")
    if options.out is None and len(options.paths) > 1:
        raise UserError("name the report of several run folders with --out FILE")
    if options.rescore:
        from gapkernels.training.experiment import rescore_experiment

        for folder in options.paths:
            rescore_experiment(folder)
    _write_report(options.paths, options.out or options.paths[0] / "report.html")


def _write_speed_report(paths: Sequence[Path], out: Path) -> None:
    """Write a report on result files of the benchmarks."""
    from gapkernels.benchmark_report import render

    markdown, plots = out.with_suffix(".md"), out.with_suffix("")
    if markdown.exists() and not out.exists():
        raise UserError(f"{markdown} would be overwritten by the report's tables; choose another name with --out")
    if plots.exists() and not plots.is_dir():
        raise UserError(f"{plots} is not a folder, but the report's plots go there; choose another name with --out")
    try:
        report = render(paths, out)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    print(f"report: {report.html}\ntables: {report.markdown}\nplots:  {report.html.with_suffix('')}")


def _write_report(folders: Sequence[Path], path: Path) -> None:
    """Summarise run folders, print their tables and write one report."""
    from gapkernels.training.paper import paper_results
    from gapkernels.training.report import write_report
    from gapkernels.training.results import format_table, load_experiment, summarise, table_rows, write_summary

    experiments = [load_experiment(folder) for folder in folders]
    for experiment in experiments:
        write_summary(experiment)
        paper = paper_results(experiment.config.data.dataset)
        if len(experiments) > 1:
            print(f"{experiment.config.name}, batch size {experiment.config.optim.batch_size}")
        print(format_table(table_rows(summarise(experiment), paper)))
    write_report(experiments, path)
    print(f"report: {path}")


if __name__ == "__main__":
    sys.exit(main())
