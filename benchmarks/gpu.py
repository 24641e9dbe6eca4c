"""Everything that wants a GPU, in one command: no network, no installation, whatever fails is reported.

    python -m benchmarks.gpu --out DIR --budget SECONDS [--skip stage,...]

Each stage is a process of its own with a time limit of its own, so that neither a crash nor a hang ends the rest. This
module uses Python's standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, child_command, child_environment, find_tool

# What a user of the tuned kernels would set too; the kernels read it (gapkernels.backends.triton.tuning).
_TUNING_FILE = "GAPKERNELS_TUNING_FILE"
_TUNED_WIDTHS = (64, 128, 256, 512, 768, 1024)


@dataclass
class Outcome:
    """How a stage went.

    Args:
        stage: its name.
        status: ``ok``, ``failed``, ``timed out``, ``skipped``, ``no device`` or ``no tool``.
        summary: one line.
        seconds: how long it took.
        facts: what it found, for the result file.
    """

    stage: str
    status: str
    summary: str
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What the stages share: the output folder and what the first stage found."""

    out: Path
    environment: dict[str, Any]

    @property
    def has_device(self) -> bool:
        # Where the first stage found nothing out, or was left out, the others find out for themselves.
        return self.environment.get("device_type", "cuda") == "cuda"


@dataclass(frozen=True)
class Stage:
    """One part of the run.

    Args:
        name: as in ``--skip``.
        weight: its share of the time that is left, relative to the stages after it.
        command: what to execute, given the run and the seconds there are.
        summarise: turns the output into one line and facts; what it raises counts as a failure.
        tool: program it needs.
        variables: added to the environment.
        needs_device: whether it makes sense without a GPU.
    """

    name: str
    weight: float
    command: Callable[[Run, float], list[str]]
    summarise: Callable[[Run, str], tuple[str, dict[str, Any]]]
    tool: str = ""
    variables: Callable[[Run], dict[str, str]] = lambda run: {}
    needs_device: bool = True


# ---- stages ---------------------------------------------------------------------------------------------------------


def _describe(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    facts = json.loads(output.strip().splitlines()[-1])
    tools = ", ".join(name for name, there in facts["tools"].items() if there) or "none"
    return f"{facts['device']}; torch {facts['versions']['torch']}; tools: {tools}", facts


def _test_command(run: Run, seconds: float) -> list[str]:
    options = ["python_tests", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short"]
    return child_command("pytest", *options, f"--junitxml={run.out / 'tests.xml'}")


def _test_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    suite = ElementTree.parse(run.out / "tests.xml").getroot().find("testsuite")
    if suite is None:
        raise ValueError("pytest wrote no results")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    # The first line of a traceback's last part names what is wrong well enough for a list.
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    summary = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failures", "errors", "skipped"))
    return summary, {**counts, "failed": failed}


def _sanitizer_command(run: Run, seconds: float) -> list[str]:
    sanitizer = find_tool("compute-sanitizer")
    exercise = child_command("benchmarks.exercise", "--dtypes", "float32,bfloat16", "--modalities", "2")
    return [sanitizer or "", "--tool", "memcheck", "--error-exitcode", "9", *exercise]


def _sanitizer_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    found = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    if not found:
        raise ValueError("no summary in the sanitizer's output")
    return f"{found[-1]} errors", {"errors": int(found[-1])}


def _tune_command(run: Run, seconds: float) -> list[str]:
    sizes = ",".join(f"8192x{width}" for width in _TUNED_WIDTHS)
    return child_command("benchmarks.exercise", "--sizes", sizes, "--modalities", "2")


def _tune_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    path = run.out / "tuning.json"
    if not path.exists():
        return "no backend here has anything to tune", {}
    table = json.loads(path.read_text(encoding="utf-8"))
    return f"{len(table)} entries in tuning.json", {"table": table}


def _speed_command(run: Run, seconds: float) -> list[str]:
    # The last case may run over; the process itself should end the run, not its time limit.
    budget = ["--budget", str(0.85 * seconds), "--case-seconds", "1", "--call-seconds", str(seconds / 20)]
    return child_command("benchmarks.run", "--device", "cuda", "--out", str(run.out / "speed.json"), *budget)


def _speed_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    content = json.loads((run.out / "speed.json").read_text(encoding="utf-8"))
    rows = [entry["extra_info"] for entry in content["benchmarks"]]
    if not rows:
        raise ValueError("nothing was measured")
    ours = [row for row in rows if row["implementation"].startswith("gapkernels") and row["backward"]]
    best = max(ours or rows, key=lambda row: row["utilisation"])
    place = f"{best['loss']}, N = {best['samples']}, D = {best['width']}, {best['dtype']}"
    summary = f"{len(rows)} rows, {len(content['skipped'])} without; best of ours: "
    return summary + f"{best['tflops']:.3g} TFLOP/s, utilisation {best['utilisation']:.2f} ({place})", {}


def _train_command(run: Run, seconds: float) -> list[str]:
    choice = ["--methods", "gap", "--seeds", "0", "--device", "cuda", "--overwrite", "--out", str(run.out / "training")]
    return child_command("gapkernels.cli", "train", "digits", *choice, "--optim.batch_size", "1024")


def _last_line(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (lines[-1] if lines else "no output"), {}


def _train_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    path = run.out / "training" / "results.json"
    facts = {"results": json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
    return "digits, batches of 1024: trained" if facts else "ended without results.json", facts


def _kernels_command(run: Run, seconds: float) -> list[str]:
    return child_command("benchmarks.kernels", "--device", "cuda", "--out", str(run.out / "kernels.json"))


def _kernels_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    facts = json.loads((run.out / "kernels.json").read_text(encoding="utf-8"))
    return "; ".join(line for line in output.splitlines() if line.startswith("gapkernels-")), facts


def _tuning(run: Run) -> dict[str, str]:
    return {_TUNING_FILE: str(run.out / "tuning.json")}


STAGES = (
    Stage("environment", 1, lambda run, seconds: child_command("benchmarks.describe"), _describe, needs_device=False),
    Stage("correctness", 8, _test_command, _test_summary),
    Stage(
        "sanitizer",
        4,
        _sanitizer_command,
        _sanitizer_summary,
        tool="compute-sanitizer",
        # torch's own allocator hands out parts of large blocks, inside which no access is ever out of bounds.
        variables=lambda run: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    Stage("autotune", 4, _tune_command, _tune_summary, variables=lambda run: {**_tuning(run), "GAPKERNELS_TUNE": "1"}),
    Stage("speed", 12, _speed_command, _speed_summary, variables=_tuning),
    Stage("training", 3, _train_command, _train_summary, variables=_tuning),
    Stage("kernels", 3, _kernels_command, _kernels_summary, variables=_tuning),
)


# ---- running them ---------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, run: Run, seconds: float) -> Outcome:
    """Run a stage, and never raise for what goes wrong in it."""
    if stage.needs_device and not run.has_device:
        return Outcome(stage.name, "no device", "needs an NVIDIA GPU and a torch that sees it")
    if stage.tool and find_tool(stage.tool) is None:
        return Outcome(stage.name, "no tool", f"{stage.tool} not found")
    started = time.monotonic()
    try:
        status, output = execute(
            stage.command(run, seconds), run.out / f"{stage.name}.log", seconds, stage.variables(run)
        )
    except OSError as error:
        return Outcome(stage.name, "failed", str(error), time.monotonic() - started)
    spent = time.monotonic() - started
    try:
        summary, facts = stage.summarise(run, output)
    except (ValueError, KeyError, IndexError, OSError, ElementTree.ParseError):
        # Nothing to read: the last thing the process said is the best there is.
        summary, facts = _last_line(run, output)
        status = status or "failed"
    return Outcome(stage.name, status or "ok", summary[:300], spent, facts)


def execute(command: list[str], log: Path, seconds: float, variables: dict[str, str]) -> tuple[str, str]:
    """Run a command with a time limit, its output in a log file.

    Returns:
        "" or what went wrong (``failed``, ``timed out``), and the output.
    """
    with log.open("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(**variables),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be ended with it
        )
        try:
            status = "failed" if process.wait(timeout=seconds) else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "timed out"
    return status, log.read_text(encoding="utf-8", errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--budget", type=float, default=1500, help="seconds for everything (default: 1500)")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--skip", default="", help=f"comma-separated: {', '.join(names)}")
    options = parser.parse_args(arguments)
    skip = [name for name in options.skip.split(",") if name]
    unknown = [name for name in skip if name not in names]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(names)}")

    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.budget
    run = Run(out, {})
    outcomes: list[Outcome] = []
    for number, stage in enumerate(STAGES):
        rest = sum(later.weight for later in STAGES[number:] if later.name not in skip)
        if stage.name in skip:
            outcome = Outcome(stage.name, "skipped", "as asked for")
        else:
            limit = max(1.0, (end - time.monotonic()) * stage.weight / rest)
            # Starting Python and torch takes a while on a cold machine, whatever the budget.
            outcome = run_stage(stage, run, max(limit, 60.0) if stage.name == "environment" else limit)
        if stage.name == "environment":
            run = Run(out, outcome.facts)
        outcomes.append(outcome)
        print(f"[{stage.name}] {outcome.status}, {outcome.seconds:.0f} s: {outcome.summary}", flush=True)
        summary = {"budget": options.budget, "stages": [asdict(done) for done in outcomes]}
        (out / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    width = max(map(len, names))
    print()
    for outcome in outcomes:
        print(f"{outcome.stage:{width}}  {outcome.status:9}  {outcome.seconds:6.0f} s  {outcome.summary}")
    print(f"\nlogs and results: {options.out}")
    return 1 if any(outcome.status in ("failed", "timed out") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
