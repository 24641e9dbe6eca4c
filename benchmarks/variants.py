"""Measure our kernels under several settings of the environment, and name the fastest for every problem.

    python -m benchmarks.variants --out variants.json --budget 120 --setting "mine:GAPKERNELS_BACKWARD=rows"

A setting is something the backends read when they start, so each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import VARIANTS
from benchmarks.processes import child_command, execute
from benchmarks.winners import DEFAULT, PROBLEM, fastest, lines

# Name → variables of the environment. What a backend offers to choose from belongs here.
SETTINGS: dict[str, dict[str, str]] = {
    DEFAULT: {},
    "rows": {"GAPKERNELS_BACKWARD": "rows"},
    "blocks": {"GAPKERNELS_BACKWARD": "blocks"},
    "tuned": {"GAPKERNELS_TUNE": "1"},
}
_HANG_SECONDS = 60.0
# Where a variable means something to one backend only, the others are not measured again.
_READ_BY = {"GAPKERNELS_BACKWARD": "triton", "GAPKERNELS_TUNE": "triton", "GAPKERNELS_NVCC_FLAGS": "cuda"}
_MEASURED = ("median", "iqr", "tflops", "utilisation", "peak_extra_bytes", "loss_error", "gradient_error")


def parse_setting(text: str) -> tuple[str, dict[str, str]]:
    """``NAME:VARIABLE=VALUE,VARIABLE=VALUE`` as a name and variables.

    Raises:
        ValueError: it has another form.
    """
    name, colon, assignments = text.partition(":")
    pairs = [part.partition("=") for part in assignments.split(",")]
    if not name or not colon or not all(variable and equals for variable, equals, _ in pairs):
        raise ValueError(f"a setting is NAME:VARIABLE=VALUE,…, got {text!r}")
    return name, {variable: value for variable, _, value in pairs}


def select(pattern: str, variables: Mapping[str, str]) -> str:
    """A pattern for the names of cases, narrowed to the backend that reads all of the variables."""
    readers = {_READ_BY.get(variable, "") for variable in variables}
    backend = readers.pop() if len(readers) == 1 else ""
    return f"^(?=.*(?:{pattern})).*-gapkernels-{backend}$" if backend else pattern


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file; written after every setting")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--select", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--case-seconds", type=float, default=0.5, help="about how long to repeat one case")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="NAME:VARIABLE=VALUE,…", help="one more to compare"
    )
    options = parser.parse_args(arguments)
    try:
        settings = {**SETTINGS, **dict(map(parse_setting, options.setting))}
    except ValueError as error:
        parser.error(str(error))
    document: dict[str, Any] = {"settings": settings, "rows": [], "skipped": [], "fastest": []}
    results.write(options.out, document)
    end = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory(prefix="gapkernels-") as scratch:
        for number, (name, variables) in enumerate(settings.items()):
            # The default setting is that of every backend, most of the others are read by one.
            rest = len(settings) - number + (name == DEFAULT)
            seconds = max(1.0, (end - time.monotonic()) * (2 if name == DEFAULT else 1) / rest)
            file = Path(scratch) / f"{number}.json"
            command = child_command("benchmarks.run", "--device", options.device, "--out", str(file))
            command += [
                "--suites",
                VARIANTS,
                "--select",
                select(options.select, variables),
                "--case-seconds",
                str(options.case_seconds),
            ]
            command += ["--budget", str(0.8 * seconds), "--hang-seconds", str(_HANG_SECONDS)]
            status, output = execute(command, file.with_suffix(".log"), seconds, variables)
            print(f"---- {name} {json.dumps(variables)} {status}\n{output}", flush=True)
            if file.exists():
                _add(document, name, file)
                results.write(options.out, document)
    print("\n".join(lines(document["fastest"])))


def _add(document: dict[str, Any], setting: str, file: Path) -> None:
    """Put the results of one setting into the document of all."""
    rows, skipped = results.read(file)
    for row in rows:
        facts = {name: row[name] for name in ("implementation", *PROBLEM, *_MEASURED)}
        document["rows"].append({**facts, "setting": setting})
    document["skipped"] += [{**entry, "setting": setting} for entry in skipped]
    if rows:
        document.update({key: rows[0][key] for key in ("device", "versions", "commit", "matmul_tflops")})
    document["fastest"] = fastest(document["rows"])


if __name__ == "__main__":
    main()
