"""Where a measurement was made: device, versions and commit, without names of machines or users."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata

import torch

import gapkernels
from benchmarks.processes import ROOT
from gapkernels.cpu import cpu_model

_PACKAGES = ("triton", "open_clip_torch", "inf-cl", "siglip-kernel", "pytorch-metric-learning", "pytest-benchmark")
# What a measurement depends on; results and the trainer may change under it.
_MEASURED = ("gapkernels", "benchmarks", "csrc", ":!benchmarks/results", ":!gapkernels/training")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model and number of cores in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} {'thread' if threads == 1 else 'threads'}"


def versions() -> dict[str, str]:
    """Versions of Python, torch and whatever takes part in the measurement and is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "gapkernels": gapkernels.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    found.update({package: version for package in _PACKAGES if (version := _version(package))})
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def commit() -> str:
    """The abbreviated commit, "+dirty" if measured code differs from it.

    Outside a repository it is what the variable GAPKERNELS_COMMIT says, or "unknown".
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no", "--", *_MEASURED) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GAPKERNELS_COMMIT") or "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
