"""Headers of other versions of torch than the installed one, from wheels that are unpacked and not installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

VARIABLE = "GAPKERNELS_TEST_DOWNLOADS"
"""Tests that download run where this is 1."""

VERSIONS = ("2.10.0", "2.11.0")
"""The oldest that is supported, and one that machines with a GPU were found to have. Wheels of 0.9 and 0.5 GB."""


def include_folder(version: str) -> Path:
    """``torch/include`` of a version, 60 MB, kept in the user's cache; skips the test where the wheel cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gapkernels" / "torch-headers"
    target = cache / version
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _unpack_headers(_download(version, Path(scratch)), Path(scratch) / "unpacked")
            (Path(scratch) / "unpacked").replace(target)
    return target / "torch" / "include"


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", str(folder)]
    run = subprocess.run([*command, f"torch=={version}"], capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip(f"the wheel of torch {version} cannot be had: {run.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack_headers(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.startswith("torch/include/")])
