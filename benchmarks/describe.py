"""Print what there is to measure with, as JSON: device, versions, tools, usable backends.

python -m benchmarks.describe
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import torch

from benchmarks import environment
from benchmarks.processes import ROOT, find_tool
from gapkernels.backends import available

_TOOLS = ("nvcc", "compute-sanitizer", "ncu", "ninja", "g++")


def describe() -> dict[str, Any]:
    """What a GPU run depends on; without paths and names of the machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {
        "device": environment.device_name(device),
        "device_type": device.type,
        "versions": environment.versions(),
        "commit": environment.commit(),
        "tools": {name: find_tool(name) is not None for name in _TOOLS},
        "backends": {status.name: status.reason for status in available() if status.usable},
        "tests": (ROOT / "python_tests").is_dir(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["memory_bytes"] = properties.total_memory
        facts["processors"] = properties.multi_processor_count
        facts["l2_bytes"] = properties.L2_cache_size
        facts["driver"] = _query("driver_version")
        facts["clocks"] = _query("clocks.max.sm,clocks.max.mem,power.limit")
    return facts


def _query(fields: str) -> str | None:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    print(json.dumps(describe()))
