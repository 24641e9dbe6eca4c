"""The CUDA backend's host code, order of tiles and formulas against the float64 oracle, on the CPU.

In a process of its own: the launcher's other kernels run in Triton's interpreter, which is decided when Triton is
imported. See ``cuda_cases.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from gapkernels.backends.cuda import build

if build.ninja() is None:
    pytest.skip("ninja is not installed", allow_module_level=True)

CASES = Path(__file__).parent / "cuda_cases.py"


def test_backend_matches_the_definition():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
