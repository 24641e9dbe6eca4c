"""The Triton kernels against the float64 oracle without a GPU: in Triton's interpreter, in processes of their own.

Whether kernels are interpreted is decided when Triton is first imported, so these tests run
``triton_cases.py`` in a subprocess with TRITON_INTERPRET=1. bf16 is left out: the interpreter's ``tl.dot`` computes on
the bits of bf16 operands (Triton 3.6 and 3.8).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

CASES = Path(__file__).parent / "triton_cases.py"

# Each group is a process, whose start takes as long as a good many cases.
GROUPS = {
    "values": ["values"],
    "numerics": ["degenerate", "range", "deterministic"],
    "blocks": ["blocks", "tiles", "both_products"],
    "distributed": ["distributed"],
    "repeated": ["repeated"],
    "contrasts": ["contrast", "kept"],
}


def test_every_case_is_in_one_group():
    cases = re.findall(r"^def (test_\w+)", CASES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert cases
    for case in cases:
        assert sum(case.startswith(f"test_{kind}") for kinds in GROUPS.values() for kind in kinds) == 1, case


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted_kernels_match_the_definition(group):
    kinds = " or ".join(f"test_{kind}" for kind in GROUPS[group])
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"),
            *(str(CASES), "-k", kinds),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
