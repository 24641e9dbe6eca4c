"""Which kernels a step of the loss spends its time in, and what Nsight Compute says of the first ones.

python -m benchmarks.kernels --out kernels.json
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.harness import step
from benchmarks.implementations import GPU_BACKENDS, IMPLEMENTATIONS, our_backends
from benchmarks.inputs import embeddings
from benchmarks.processes import child_command, execute, find_tool

_MAIN_KERNELS = 3
_METRICS = {
    "gpu__time_duration.sum": "duration",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_pipe_percent",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "exponentials_pipe_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}


def time_by_kernel(case: Case, device: torch.device, steps: int = 3) -> list[dict[str, Any]]:
    """The kernels of some steps by time, longest first.

    Returns:
        Name, share of the time of all kernels, calls per step, and milliseconds per step of each.
    """
    function = IMPLEMENTATIONS[case.implementation].function(case, device)
    inputs = embeddings(case, device)
    step(function, inputs, case.backward)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step(function, inputs, case.backward)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if time > 0:
            spent[event.name].append(time)
    total = sum(map(sum, spent.values()))
    return [
        {
            "kernel": name,
            "share": sum(times) / total,
            "calls": len(times) / steps,
            "milliseconds": sum(times) / steps / 1e3,
        }
        for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))
    ]


def nsight(kernels: Sequence[str], case: Case, seconds: float) -> dict[str, dict[str, str]]:
    """Metrics of one launch of each kernel.

    Raises:
        RuntimeError: Nsight Compute is absent, may not read the counters, or took too long.
    """
    tool = find_tool("ncu")
    if tool is None:
        raise RuntimeError("ncu not found")
    workload = ["--sizes", f"{case.samples}x{case.width}", "--dtypes", case.dtype, "--modalities", "2"]
    workload += ["--losses", case.loss, "--backends", case.implementation.removeprefix("gapkernels-")]
    # Function names alone: ncu's default name of a C++ kernel leaves out its parameters too.
    names = "|".join(re.escape(_base_name(kernel)) for kernel in kernels)
    metrics, end = list(_METRICS), time.monotonic() + seconds
    while True:
        command = [tool, "--csv", "--page", "raw", "--target-processes", "all", "--launch-count", "8"]
        command += ["--clock-control", "none"]  # the clocks are those of the other measurements
        command += ["--kernel-name", f"regex:^({names})$", "--metrics", ",".join(metrics)]
        command += child_command("benchmarks.exercise", "--device", "cuda", *workload)
        with tempfile.TemporaryDirectory(prefix="gapkernels-") as scratch:
            status, output = execute(command, Path(scratch) / "ncu.log", max(1.0, end - time.monotonic()), {})
        found = parse_nsight(output)
        if found:
            return found
        errors = [line.strip("= ") for line in output.splitlines() if re.search("error", line, re.IGNORECASE)]
        # Names of metrics differ between architectures and versions: go on without those that it complains about.
        unknown = [name for name in metrics if any(name in line for line in errors)]
        if not unknown or len(unknown) == len(metrics) or status == "timed out":
            raise RuntimeError(status if status == "timed out" else errors[0] if errors else "ncu gave no metrics")
        metrics = [name for name in metrics if name not in unknown]


def parse_nsight(output: str) -> dict[str, dict[str, str]]:
    """The first launch of each kernel in ncu's raw CSV page, whose second line holds units."""
    lines = output.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    heading, units, *rows = list(csv.reader(io.StringIO("\n".join(lines[start:]))))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        values, unit_of = dict(zip(heading, row, strict=False)), dict(zip(heading, units, strict=False))
        metrics = {
            short: f"{values[metric]} {unit_of[metric]}".strip()
            for metric, short in _METRICS.items()
            if values.get(metric, "n/a") not in ("", "n/a")
        }
        found.setdefault(values["Kernel Name"], metrics)
    return found


def _base_name(kernel: str) -> str:
    """The name of a kernel without return type, template arguments, namespaces and parameters."""
    plain = re.sub(r"<.*", "", kernel.replace("(anonymous namespace)::", "")).split("(")[0].split()[-1]
    return plain.split("::")[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="32768x512", help="N×D")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for everything")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    samples, width = map(int, options.size.split("x"))
    summary: dict[str, Any] = {}
    end = time.monotonic() + options.budget
    names = our_backends(device)
    with_kernels = [name for name in names if IMPLEMENTATIONS[name].backend in GPU_BACKENDS]
    for name in names:
        case = Case(name, samples=samples, width=width, dtype="bfloat16")
        entry: dict[str, Any] = {"kernels": [], "nsight": None}
        try:
            kernels = time_by_kernel(case, device)
            entry["kernels"] = kernels[:12]
            if name not in with_kernels:
                raise RuntimeError("has no kernels of its own")
            seconds = (end - time.monotonic()) / (len(with_kernels) - with_kernels.index(name))
            entry["nsight"] = nsight([kernel["kernel"] for kernel in kernels[:_MAIN_KERNELS]], case, seconds)
        except RuntimeError as error:
            entry["nsight_reason"] = next(iter(str(error).splitlines()), "")
        summary[name] = entry
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        first = ", ".join(f"{_base_name(k['kernel'])} {k['share']:.0%}" for k in entry["kernels"][:_MAIN_KERNELS])
        print(f"{name}: {first}; Nsight Compute: {entry.get('nsight_reason', 'measured')}")


if __name__ == "__main__":
    main()
