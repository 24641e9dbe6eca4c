"""Everything that wants a GPU, in one command: no network, no installation, whatever fails is reported.

    python -m benchmarks.gpu --out DIR --budget SECONDS [--only STAGE,...] [--skip STAGE,...]

Each stage is a process of its own with a time limit of its own, so that neither a crash nor a hang ends the rest. This
module uses Python's standard library only. DIR gets few files and no folders, all of them complete after every stage:
gpu.json (how each stage went and what it found), log.txt, and speed.json, variants.json, tuning.json, training.json
from the stages of these names.

A backend that cannot be compiled, hangs or crashes at the first look is left out of the later stages, where it would
cost the others their time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.processes import (
    ROOT,
    WITHOUT_VARIABLE,
    adopt_orphans,
    child_command,
    children,
    end_orphans,
    execute,
    find_tool,
    unpack_wheels,
)
from benchmarks.winners import lines as winner_lines

# What a user of the tuned kernels would set too; the kernels read it (gapkernels.backends.triton.tuning).
_TUNING_FILE = "GAPKERNELS_TUNING_FILE"
_TUNED_WIDTHS = (512, 1024, 256, 128)
# The grid over the backends that have kernels; what needs no GPU, or takes its time on compilers, is left to CI.
_GPU_TESTS = ("backends", "test_loss.py", "test_functional.py", "test_modules.py", "test_ops.py")
_NO_GPU_TESTS = "not interpreted and not compilation and not on_cpu and not [torch- and not [torch]"
_TEST_WORKERS = 6
_TEST_SECONDS = 100  # after which a test has hung
_BATCH_SIZES = {"cifar10": (32768, 4096, 256), "av-mnist": (4096, 256), "digits": (512, 128)}
_TOO_LITTLE = 5.0  # seconds, in which no stage could start
_LOG_LIMIT = 1_000_000  # characters of one stage


@dataclass
class Outcome:
    """How a stage went.

    Args:
        stage: its name.
        status: ``ok``, ``failed``, ``timed out``, ``skipped``, ``no device``, or which part is absent: ``no tool``,
            ``no sources``.
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
    """What the stages share.

    Args:
        out: folder for what is to be kept.
        scratch: folder for everything else.
        environment: what the first stage found.
        data: folder with data sets; there need not be one.
        variants: settings to compare, as ``benchmarks.variants --setting`` takes them.
        without: backends that do not work here.
    """

    out: Path
    scratch: Path
    environment: dict[str, Any] = field(default_factory=dict)
    data: Path = ROOT / "data"
    variants: Sequence[str] = ()
    without: frozenset[str] = frozenset()

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
        absent: says which part of the project is missing for it; "" if none.
        variables: added to the environment.
        needs_device: whether it makes sense without a GPU.
        least: seconds that it gets in any case.
    """

    name: str
    weight: float
    command: Callable[[Run, float], list[str]]
    summarise: Callable[[Run, str], tuple[str, dict[str, Any]]]
    tool: str = ""
    absent: Callable[[], str] = lambda: ""
    variables: Callable[[Run], dict[str, str]] = lambda run: {}
    needs_device: bool = True
    least: float = 1.0


# ---- stages ---------------------------------------------------------------------------------------------------------


def _last_line(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    """What a process said last, before it was interrupted."""
    if output.rstrip().endswith("KeyboardInterrupt"):
        output = output.partition("Traceback (most recent call last):")[0]
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (lines[-1] if lines else "no output"), {}


def _describe(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    facts = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))
    tools = ", ".join(name for name, there in facts["tools"].items() if there) or "none"
    return f"{facts['device']}; torch {facts['versions']['torch']}; tools: {tools}", facts


def _no_sources() -> str:
    if not any((ROOT / "csrc").glob("*.cu")):
        return "csrc/ has no CUDA sources"
    package = ROOT / "gapkernels" / "backends" / "cuda"
    if not (package / "build.py").exists() and not (package / "build" / "__init__.py").exists():
        return "gapkernels.backends.cuda.build does not exist"
    return ""


def _smoke_command(run: Run, seconds: float) -> list[str]:
    out = ["--out", str(run.scratch / "smoke.json"), "--budget", str(0.9 * seconds)]
    return child_command("benchmarks.smoke", "--device", "cuda", *out)


def _smoke_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    found = json.loads((run.scratch / "smoke.json").read_text(encoding="utf-8"))
    unusable = [_backend(entry) for entry in found if not entry["usable"]]
    if len(unusable) == len(found):
        unusable = []  # it is something else that does not work, perhaps this check
    summary = "; ".join(f"{_backend(entry)} {entry['summary']}" for entry in found) or "no backend can run here"
    if unusable:
        summary += f"; left out from here on: {', '.join(unusable)}"
    return summary, {"backends": found, "unusable": unusable}


def _backend(entry: dict[str, Any]) -> str:
    name: str = entry["implementation"]
    return name.removeprefix("gapkernels-")


def _build_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    """Where there is no library in the end, every process would try to compile it again."""
    summary, _ = _last_line(run, output)
    built = summary.endswith(".so")
    if not built:
        errors = [line.strip() for line in output.splitlines() if re.search(r"\berror\b", line)]
        summary = (errors or [summary])[0]
    return summary, {} if built else {"unusable": ["cuda"]}


def _test_command(run: Run, seconds: float) -> list[str]:
    selection = " and ".join([_NO_GPU_TESTS, *(f"not {name}" for name in sorted(run.without))])
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-k", selection]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(_TEST_WORKERS)]  # most of the time goes into compiling Triton's kernels
        if importlib.util.find_spec("pytest_timeout") is not None:
            # Ends the worker, which xdist replaces: the only way out of a call that waits for a device for ever.
            options += ["--timeout", str(_TEST_SECONDS), "--timeout-method", "thread"]
    return child_command("pytest", *(f"python_tests/{name}" for name in _GPU_TESTS), *options)


def _test_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    """Counts from the lines that pytest writes after each test, which are there even if it was ended half-way."""
    before = r"(?:\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL) )?"
    one = re.compile(rf"^{before}(\S+::.*?)(?: ([A-Z]+)(?: \(.*)?)?$")
    found: list[tuple[str, str]] = []
    for line in output.splitlines():
        match = one.match(re.sub(r"\s+\[ *\d+%\]$", "", line.rstrip()))
        if match and (match[1] or match[3] in ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL")):
            found.append((match[1] or match[3], match[2]))
    if not found:
        raise ValueError("pytest ran no tests")
    counts = Counter(status for status, _ in found)
    of_backend: dict[str, Counter[str]] = {}
    for status, test in found:
        parameters = re.split(r"[\[\]-]", test)
        for name in ("triton", "cuda"):
            if name in parameters or f"test_{name}_on_gpu" in test:
                of_backend.setdefault(name, Counter())[status] += 1
    totals = {word.lower(): counts[word] for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    summary = ", ".join(f"{count} {word}" for word, count in totals.items())
    if of_backend:
        ratios = (f"{name} {c['PASSED']} of {c.total() - c['SKIPPED']}" for name, c in of_backend.items())
        summary += f" ({', '.join(ratios)})"
    reasons = re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", output, flags=re.MULTILINE)
    failures = [test for status, test in found if status in ("FAILED", "ERROR")]
    return summary, {**totals, "backends": of_backend, "failures": (reasons or failures)[:200]}


def _tune_command(run: Run, seconds: float) -> list[str]:
    sizes = ",".join(f"8192x{width}" for width in _TUNED_WIDTHS)
    options = ["--backends", "triton", "--sizes", sizes, "--modalities", "2", "--dtypes", "bfloat16"]
    return child_command("benchmarks.exercise", *options)


def _tune_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    path = run.out / "tuning.json"
    if not path.exists():
        return "no backend here has anything to tune", {}
    table = json.loads(path.read_text(encoding="utf-8"))
    return f"{len(table)} entries in tuning.json", {}


def _speed_command(run: Run, seconds: float) -> list[str]:
    # The last case may run over; the process itself should end the run, not its time limit.
    longest = max(20.0, seconds / 15)
    budget = ["--budget", str(0.85 * seconds), "--case-seconds", "0.5", "--call-seconds", str(longest)]
    budget += ["--hang-seconds", str(3 * longest)]
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


def _variants_command(run: Run, seconds: float) -> list[str]:
    settings = [word for setting in run.variants for word in ("--setting", setting)]
    out = ["--out", str(run.out / "variants.json"), "--budget", str(0.9 * seconds)]
    own_kernels = ["--select", "gapkernels-(triton|cuda)"]
    return child_command("benchmarks.variants", "--device", "cuda", *out, *own_kernels, *settings)


def _variants_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    content = json.loads((run.out / "variants.json").read_text(encoding="utf-8"))
    wins = Counter(f"{best['implementation']} {best['setting']}" for best in content["fastest"])
    if not wins:
        raise ValueError("nothing was measured")
    summary = "fastest: " + ", ".join(f"{name} {count}×" for name, count in wins.most_common())
    return summary, {"table": winner_lines(content["fastest"])}


def _sanitizer_command(run: Run, seconds: float) -> list[str]:
    out = ["--out", str(run.scratch / "sanitizer.json"), "--budget", str(0.9 * seconds)]
    return child_command("benchmarks.sanitize", *out)


def _sanitizer_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    found = json.loads((run.scratch / "sanitizer.json").read_text(encoding="utf-8"))
    parts = [f"{entry['backend']} {entry['tool']}: {entry['summary']}" for entry in found]
    return "; ".join(parts) or "no backend with kernels of its own can run here", {"checks": found}


def _dataset(run: Run) -> str:
    """CIFAR-10 where its files are at hand, else AV-MNIST where its are."""
    places = ("", "cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py")
    files = ("train-0.npz", "data_batch_1")
    if any((run.data / place / name).exists() for place in places for name in files):
        return "cifar10"
    return "av-mnist" if (run.data / "mnist").is_dir() and (run.data / "fsdd").is_dir() else "digits"


def _train_command(run: Run, seconds: float) -> list[str]:
    name = _dataset(run)
    baseline = "clip-ft" if name == "av-mnist" else "clip-lt"
    choice = ["--batch-sizes", ",".join(map(str, _BATCH_SIZES[name])), "--methods", f"{baseline},gap", "--seeds", "0"]
    choice += ["--device", "cuda", "--out", str(run.scratch / "training"), "--optim.precision", "bf16"]
    choice += ["--run.deterministic", "false", "--run.eval_every", "1000", "--run.checkpoint_every", "100000"]
    if name == "digits":
        return child_command("gapkernels.cli", "reproduce", "--dataset", "digits", *choice)
    # All samples, and networks small enough to see them often in the time there is.
    choice += ["--data-dir", str(run.data), "--data.train_samples", "null", "--run.threads", "8"]
    if name == "av-mnist":
        choice += ["--data.test_samples", "null", "--optim.epochs", "100"]
        return child_command("gapkernels.cli", "reproduce", "--dataset", "av-mnist-small", *choice)
    choice += ["--model.encoders.image.width", "32", "--model.embed_dim", "512", "--optim.epochs", "20"]
    choice += ["--optim.micro_batch_size", "8192"]
    return child_command("gapkernels.cli", "reproduce", "--dataset", "cifar10-small", *choice)


def _train_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    path = run.scratch / "training" / "results.json"
    if not path.exists():
        missing = re.search(r"needs (.+?): pip install", output)
        if missing:
            return f"needs {missing[1]}; carry wheels/ here, made by: {wheels_command(missing[1].split(', '))}", {}
        raise ValueError("no results.json")
    shutil.copyfile(path, run.out / "training.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for experiment in content["experiments"]:
        runs = experiment["methods"].items()
        gaps = ", ".join(f"gap {method['metrics']['gap']['mean']:.3f} with {name}" for name, method in runs)
        parts.append(f"batch {experiment['batch_size']}: {gaps}")
    return f"{content['dataset']}; {'; '.join(parts)}", {}


def wheels_command(missing: Sequence[str] = (), python: str = "") -> str:
    """The command that downloads what a machine without a network lacks, to be run where there is one.

    Args:
        missing: packages that must be among them.
        python: version of Python there, "3.12"; that of this one by default.
    """
    listed = ROOT / "benchmarks" / "wheels.txt"
    known = {line.partition("==")[0] for line in listed.read_text(encoding="utf-8").splitlines()}
    version = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    words = ["python3", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", version]
    for platform in ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64"):
        words += ["--platform", platform]
    words += ["-d", "wheels", "-r", str(listed.relative_to(ROOT)), *(name for name in missing if name not in known)]
    return shlex.join(words)


def _kernels_command(run: Run, seconds: float) -> list[str]:
    out = ["--out", str(run.scratch / "kernels.json"), "--budget", str(0.9 * seconds)]
    return child_command("benchmarks.kernels", "--device", "cuda", *out)


def _kernels_summary(run: Run, output: str) -> tuple[str, dict[str, Any]]:
    facts = json.loads((run.scratch / "kernels.json").read_text(encoding="utf-8"))
    return "; ".join(line for line in output.splitlines() if line.startswith("gapkernels-")), facts


def _tuning(run: Run) -> dict[str, str]:
    return {_TUNING_FILE: str(run.out / "tuning.json")}


# In the order of what a person with ten minutes wants to know first. Speed is that of the defaults, as users get them;
# what tuning would gain is one of the variants.
STAGES = (
    # Starting Python and torch on a cold machine takes a while, and so does compiling, whatever the budget.
    Stage(
        "environment",
        1,
        lambda run, seconds: child_command("benchmarks.describe"),
        _describe,
        needs_device=False,
        least=60.0,
    ),
    Stage(
        "build",
        20,
        lambda run, seconds: child_command("gapkernels.backends.cuda.build"),
        _build_summary,
        tool="nvcc",
        absent=_no_sources,
    ),
    Stage("smoke", 10, _smoke_command, _smoke_summary, least=120.0),
    Stage("correctness", 10, _test_command, _test_summary),
    Stage("speed", 20, _speed_command, _speed_summary),
    Stage("autotune", 3, _tune_command, _tune_summary, variables=lambda run: {**_tuning(run), "GAPKERNELS_TUNE": "1"}),
    Stage("variants", 10, _variants_command, _variants_summary, variables=_tuning),
    Stage("sanitizer", 6, _sanitizer_command, _sanitizer_summary, tool="compute-sanitizer"),
    Stage("training", 6, _train_command, _train_summary),
    Stage("kernels", 4, _kernels_command, _kernels_summary),
)


# ---- running them ---------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, run: Run, seconds: float) -> Outcome:
    """Run a stage, and never raise for what goes wrong in it."""
    if stage.needs_device and not run.has_device:
        return Outcome(stage.name, "no device", "needs an NVIDIA GPU and a torch that sees it")
    if stage.absent():
        return Outcome(stage.name, "no sources", stage.absent())
    if stage.tool and find_tool(stage.tool) is None:
        return Outcome(stage.name, "no tool", f"{stage.tool} not found")
    started = time.monotonic()
    variables = {WITHOUT_VARIABLE: ",".join(sorted(run.without)), **stage.variables(run)}
    ours = children()
    try:
        status, output = execute(stage.command(run, seconds), run.scratch / f"{stage.name}.log", seconds, variables)
    except OSError as error:
        return Outcome(stage.name, "failed", str(error), time.monotonic() - started)
    finally:
        end_orphans(ours)
    spent = time.monotonic() - started
    _keep_log(run, stage.name, output)
    try:
        summary, facts = stage.summarise(run, output)
    except Exception:  # whatever is wrong with the output of one stage, the next ones are worth having
        # Nothing to read: the last thing the process said is the best there is.
        summary, facts = _last_line(run, output)
        status = status or "failed"
    return Outcome(stage.name, status or "ok", summary[:600], spent, facts)


def _keep_log(run: Run, name: str, output: str) -> None:
    """Add what a stage printed to the log, of long output the beginning and the end."""
    if len(output) > _LOG_LIMIT:
        half = _LOG_LIMIT // 2
        output = f"{output[:half]}\n… {len(output) - _LOG_LIMIT} characters left out …\n{output[-half:]}"
    with (run.out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"{'=' * 20} {name} {'=' * 20}\n{output}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--budget", type=float, default=1500, help="seconds for everything (default: 1500)")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", default="", metavar="STAGE,…", help=f"of {', '.join(names)}")
    parser.add_argument("--skip", default="", metavar="STAGE,…", help="stages to leave out")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder with CIFAR-10 (default: data)")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "wheels", help="folder with packages missing here (default: wheels)"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:VARIABLE=VALUE,…",
        help="one more setting of the environment for the variants to compare",
    )
    options = parser.parse_args(arguments)
    only, skip = ([name for name in text.split(",") if name] for text in (options.only, options.skip))
    unknown = [name for name in [*only, *skip] if name not in names]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(names)}")
    # What there is to measure with has to be known in any case.
    left_out = {name for name in names if name in skip or (only and name not in only and name != "environment")}

    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="gapkernels-", ignore_cleanup_errors=True) as scratch:
        return _run_stages(options, left_out, Path(scratch))


def _run_stages(options: argparse.Namespace, left_out: set[str], scratch: Path) -> int:
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    wheels = unpack_wheels(options.wheels, scratch / "site")
    if wheels:
        path = [str(scratch / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        print(f"[wheels] {', '.join(wheels)}", flush=True)
    run = Run(out, scratch, data=options.data_dir.resolve(), variants=options.variant)
    end = time.monotonic() + options.budget
    outcomes: list[Outcome] = []
    for number, stage in enumerate(STAGES):
        rest = sum(later.weight for later in STAGES[number:] if later.name not in left_out)
        if stage.name in left_out:
            outcome = Outcome(stage.name, "skipped", "as asked for")
        elif end - time.monotonic() < _TOO_LITTLE:
            outcome = Outcome(stage.name, "skipped", "no time left")
        else:
            outcome = run_stage(stage, run, max(stage.least, (end - time.monotonic()) * stage.weight / rest))
        if stage.name == "environment":
            run = replace(run, environment=outcome.facts)
        run = replace(run, without=run.without.union(outcome.facts.get("unusable", ())))
        outcomes.append(outcome)
        print(f"[{stage.name}] {outcome.status}, {outcome.seconds:.0f} s: {outcome.summary}", flush=True)
        summary = {"budget": options.budget, "stages": [asdict(done) for done in outcomes]}
        (out / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    width = max(len(stage.name) for stage in STAGES)
    print()
    for outcome in outcomes:
        print(f"{outcome.stage:{width}}  {outcome.status:10}  {outcome.seconds:5.0f} s  {outcome.summary}")
    for table in filter(None, (outcome.facts.get("table") for outcome in outcomes)):
        print("\nfastest of each problem:", *table, sep="\n")
    print(f"\nresults: {options.out}")
    if (out / "speed.json").exists():
        name = re.sub(r"[^a-z0-9]+", "-", run.environment.get("device", "gpu").lower()).strip("-")
        target = f"benchmarks/results/{name}-{time.strftime('%Y-%m-%d')}.json"
        print(f"to publish: cp {options.out / 'speed.json'} {target} && python -m benchmarks.readme")
    return 1 if any(outcome.status in ("failed", "timed out") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
