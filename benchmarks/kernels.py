"""Which kernels a step of the loss spends its time in.

python -m benchmarks.kernels --out kernels.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.implementations import IMPLEMENTATIONS, our_backends
from benchmarks.workload import embeddings, step


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="32768x512", help="N×D")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    samples, width = map(int, options.size.split("x"))
    found: dict[str, list[dict[str, Any]]] = {}
    for name in our_backends(device):
        kernels = time_by_kernel(Case(name, samples=samples, width=width, dtype="bfloat16"), device)
        found[name] = kernels[:12]
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: " + ", ".join(f"{kernel['kernel']} {kernel['share']:.0%}" for kernel in kernels[:3]))


if __name__ == "__main__":
    main()
