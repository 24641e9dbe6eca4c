"""Which kernels a step of the loss spends its time in, and in every variant of ours.

python -m benchmarks.kernels --out kernels.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.implementations import IMPLEMENTATIONS, KEEP_VARIABLE, our_backends
from benchmarks.workload import embeddings, step

SIZE = "32768x512"
"""N×D."""


@dataclass(frozen=True)
class Variant:
    """Kernels as they are not by default.

    Args:
        implementation: whose they are.
        environment: read when a process starts, by nvcc when the kernels are compiled.
        width: D, where it is another than that of all.
    """

    implementation: str
    environment: Mapping[str, str]
    width: int | None = None


def _of_cuda(name: str, *, width: int | None = None, **environment: str) -> Variant:
    return Variant("gapkernels-cuda", {"GAPKERNELS_CUDA_VARIANT": name, **environment}, width)


CUDA = ("streamed", "resident", "wide")
CLUSTER_OF_ONE = ("streamed", "resident")
TOO_LONG_TO_STAY = (768, 1024)
"""Rows of as many numbers are not resident."""
OTHER_SIDES = (2048, 8192)
VARIANTS = {
    **{name: _of_cuda(name) for name in CUDA},
    **{
        f"{name}, D = {width}": _of_cuda(name, width=width)
        for width in TOO_LONG_TO_STAY
        for name in CUDA
        if name != "resident"
    },
    **{
        f"{name}, cluster of one": _of_cuda(name, GAPKERNELS_NVCC_FLAGS="-DGAPKERNELS_CLUSTER=1")
        for name in CLUSTER_OF_ONE
    },
    "entries kept": Variant("gapkernels-triton", {KEEP_VARIABLE: "all"}),
    "products start early": Variant("gapkernels-triton", {"GAPKERNELS_EARLY_LAUNCH": "1"}),
    "products by the library": Variant("gapkernels-triton", {"GAPKERNELS_PRODUCTS": "library"}),
    **{
        f"products by Triton, D = {width}": Variant("gapkernels-cuda", {"GAPKERNELS_PRODUCTS": "triton"}, width)
        for width in TOO_LONG_TO_STAY
    },
    **{
        f"blocks of {side}": Variant("gapkernels-triton", {"GAPKERNELS_GRADIENT_BLOCK": str(side)})
        for side in OTHER_SIDES
    },
}


def label(variant: str) -> str:
    """The key of a variant in the result file."""
    return f"{VARIANTS[variant].implementation}: {variant}"


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


def measure_variant(variant: str, size: str) -> tuple[list[dict[str, Any]], str]:
    """The kernels of a variant, in a process of its own.

    Returns:
        ``(kernels, "")``, or nothing and why it could not be built or run.
    """
    chosen = VARIANTS[variant]
    implementation = chosen.implementation
    if chosen.width is not None:
        size = f"{size.partition('x')[0]}x{chosen.width}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.json"
        command = ["--implementation", implementation, "--device", "cuda", "--size", size, "--out", str(out)]
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.kernels", *command],
            env={**os.environ, **chosen.environment},
            capture_output=True,
            text=True,
        )
        if run.returncode != 0:
            return [], run.stderr[-2000:] or f"ended with status {run.returncode}"
        return json.loads(out.read_text(encoding="utf-8"))[implementation], ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default=SIZE, help="N×D")
    parser.add_argument("--implementation", help="this one only, without variants")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    samples, width = map(int, options.size.split("x"))
    found: dict[str, list[dict[str, Any]]] = {}

    def keep(name: str, kernels: list[dict[str, Any]]) -> None:
        found[name] = kernels
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: " + ", ".join(f"{kernel['kernel']} {kernel['share']:.0%}" for kernel in kernels[:3]))

    names = [options.implementation] if options.implementation else our_backends(device)
    for name in names:
        keep(name, time_by_kernel(Case(name, samples=samples, width=width, dtype="bfloat16"), device))
    if not options.implementation:
        for variant in VARIANTS:
            if VARIANTS[variant].implementation not in names:
                continue
            kernels, problem = measure_variant(variant, options.size)
            if problem:
                print(f"{label(variant)}: {problem}")
            else:
                keep(label(variant), kernels)


if __name__ == "__main__":
    main()
