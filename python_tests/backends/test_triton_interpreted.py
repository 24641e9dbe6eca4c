"""The Triton kernels against the float64 oracle without a GPU: in Triton's interpreter, in processes of their own.

Whether kernels are interpreted is decided when Triton is first imported, so these tests run
``triton_cases.py`` in a subprocess with TRITON_INTERPRET=1. bf16 is left out: the interpreter's ``tl.dot`` computes on
the bits of bf16 operands (Triton 3.6 and 3.8).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

CASES = Path(__file__).parent / "triton_cases.py"


GROUPS = {
    "values": "values",
    "degenerate": "degenerate",
    "range": "range",
    "deterministic": "deterministic",
    "blocks": "blocks",
    "tiles": "tiles",
    "distributed": "distributed",
    "products": "both_products",
    "repeated": "repeated",
    "contrasts": "contrast",
    "kept": "kept",
}


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted_kernels_match_the_definition(group):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            str(CASES),
            "-k",
            GROUPS[group],
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
