"""The host's time of a step, measured with launches stubbed; in a process of its own, where nothing stays stubbed."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_launches_and_times_of_a_step(tmp_path):
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "benchmarks.host_time", "--size", "256x512", "--seconds", "0.2", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "16 launches" in run.stdout
    found = json.loads(out.read_text())
    kernels = [name for name in found["launches"] if not name.startswith("torch.")]
    assert len(kernels) == 16, kernels
    assert (kernels[0], kernels[-1]) == ("row_statistics_kernel", "scale_gradient_kernel")
    assert set(found["leading_up"]) == {*kernels, ""}
    assert 0 < found["forward"] < found["microseconds"]
