"""The scripts of examples/ run as they are, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_a_test_for_every_example():
    tested = re.findall(r"examples/(\w+\.py)\"", Path(__file__).read_text())
    assert sorted(set(tested)) == EXAMPLES


def test_plain_loop():
    result = run("examples/plain_loop.py").splitlines()[-1]
    gap, recall = (float(number) for number in re.findall(r"\d+\.\d+", result))
    assert gap < 0.2
    assert recall > 0.5  # chance is 1/1024


def test_large_batch():
    losses = [float(number) for number in re.findall(r"-?\d+\.\d{4}", run("examples/large_batch.py"))]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]


def test_two_processes():
    """Both processes return one loss, that of all 512 rows, and training lowers it."""
    pytest.importorskip("torch.distributed", reason="torch was built without torch.distributed")
    output = run(*["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "examples/two_processes.py")
    found = re.findall(r"rank (\d):((?: -?\d+\.\d{6})+)", output)  # lines of two processes may run together
    assert len(found) == 2
    by_rank = dict(found)
    assert set(by_rank) == {"0", "1"}
    assert by_rank["0"] == by_rank["1"]
    losses = [float(number) for number in by_rank["0"].split()]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5
