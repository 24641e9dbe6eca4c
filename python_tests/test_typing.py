"""What a type checker says of a user's program, by the annotations that the package ships."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mypy")

pytestmark = pytest.mark.slow  # mypy reads torch

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import torch
from torch import Tensor

from gapkernels import GapLoss, GapLossTerms, gap_loss, info_nce

x, y = torch.randn(8, 4), torch.randn(8, 4)

loss: Tensor = gap_loss(x, y, temperature=0.1, anchor=1, pairs="all")
terms: GapLossTerms = gap_loss(x, y, logit_scale=torch.tensor(10.0), cu_weight=0.5, return_terms=True)
gap: Tensor = terms.modality_gap
nce: Tensor | None = terms.info_nce
either: Tensor | GapLossTerms = gap_loss(x, y, return_terms=bool(len(x)))
other: Tensor = info_nce(x, y, x, backend="torch", normalize=False)

criterion = GapLoss(temperature=0.07, learn_temperature=True)
total: Tensor = criterion(x, y)
parts: GapLossTerms = criterion(x, y, return_terms=True)
"""
MISTAKES = {
    "gap_loss(x, y, temperture=1)": 'Unexpected keyword argument "temperture"|No overload variant',
    "gap_loss(x, y, temperture=1, return_terms=True)": 'Unexpected keyword argument "temperture"|No overload variant',
    "gap_loss(x, y, anchor='text')": "No overload variant|incompatible type",
    "gap_loss(x, y, return_terms=True).info_nse": 'has no attribute "info_nse"',
    "gap_loss(x, y).loss": 'has no attribute "loss"',
    "info_nce(x, y, cu_weight=0)": 'Unexpected keyword argument "cu_weight"',
    "GapLoss(temperture=1)": 'Unexpected keyword argument "temperture"',
    "criterion(x, y, retrun_terms=True)": 'Unexpected keyword argument "retrun_terms"|No overload variant',
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Messages by statement, from one run of mypy over all of them; "" stands for the program without mistakes."""
    folder = tmp_path_factory.mktemp("user")
    program = folder / "program.py"
    program.write_text(PROGRAM + "\n".join(MISTAKES) + "\n")
    first = PROGRAM.count("\n") + 1
    # Another folder than the checkout, as a user's: mypy then finds the package by its `py.typed`, or not at all.
    options = ["--strict", "--follow-imports=silent", "--no-error-summary", "--cache-dir", str(folder / "cache")]
    environment = {**os.environ, "MYPYPATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(program)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, list[str]] = {"": [], **{statement: [] for statement in MISTAKES}}
    for line in done.stdout.splitlines():
        _, number, message = line.split(":", maxsplit=2)
        index = int(number) - first
        found[list(MISTAKES)[index] if index >= 0 else ""].append(message.strip())
    return found


def test_a_correct_program_passes(checked: dict[str, list[str]]) -> None:
    assert checked[""] == [], textwrap.indent("\n".join(checked[""]), "  ")


@pytest.mark.parametrize("statement", MISTAKES)
def test_a_mistake_is_found(statement: str, checked: dict[str, list[str]]) -> None:
    assert any(any(part in message for part in MISTAKES[statement].split("|")) for message in checked[statement])
