"""The host's time of a step, measured with launches stubbed; in a process of its own, where nothing stays stubbed."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_launches_and_times_of_a_step(tmp_path):
    out = tmp_path / "host.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.host_time",
        "--size",
        "1024x512",
        "--seconds",
        "0.5",
        "--out",
        str(out),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "11 launches" in run.stdout
    found = json.loads(out.read_text())["host_time"]
    kernels = [name for name in found["launches"] if not name.startswith("torch.")]
    assert len(kernels) == 11, kernels
    assert (kernels[0], kernels[-1]) == ("row_statistics_kernel", "row_gradients_kernel")
    assert set(found["leading_up"]) == {*kernels, ""}
    assert 0 < found["forward"] < found["microseconds"]
    # The target is 350 µs; planned every time a step took 840. A busy machine takes twice as long.
    assert found["fastest"] < 700, run.stdout
