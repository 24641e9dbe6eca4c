"""The command for GPU machines, as far as a machine without one can tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import exercise, gpu, kernels
from benchmarks.cases import Case
from benchmarks.gpu import Outcome, Run, Stage
from benchmarks.processes import ROOT, child_command, find_tool

NO_DEVICE = "needs an NVIDIA GPU and a torch that sees it"


def stage(code: str, summarise=gpu._last_line, **options) -> Stage:
    return Stage("it", 1, lambda run, seconds: [sys.executable, "-c", code], summarise, needs_device=False, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the run itself is made where there is a GPU")
def test_without_a_device_every_gpu_stage_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--budget", "60", "--skip", "speed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    stages = {entry["stage"]: entry for entry in json.loads((tmp_path / "gpu.json").read_text())["stages"]}
    assert list(stages) == [entry.name for entry in gpu.STAGES]
    assert stages["environment"]["status"] == "ok"
    assert stages["environment"]["facts"]["device_type"] == "cpu"
    assert stages["speed"]["status"] == "skipped"
    for name in set(stages) - {"environment", "speed"}:
        assert (stages[name]["status"], stages[name]["summary"]) == ("no device", NO_DEVICE)
    table = done.stdout.strip().splitlines()[-len(stages) - 2 : -2]
    assert [line.split()[0] for line in table] == list(stages)


def test_a_failing_stage_is_an_outcome(tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    crash = gpu.run_stage(stage("import os; print('before', flush=True); os.abort()"), run, 20)
    assert (crash.status, crash.summary) == ("failed", "before")
    absent = gpu.run_stage(stage("", tool="no-such-program"), run, 20)
    assert (absent.status, absent.summary) == ("no tool", "no-such-program not found")
    unreadable = gpu.run_stage(stage("print('hello')", summarise=gpu._speed_summary), run, 20)
    assert (unreadable.status, unreadable.summary) == ("failed", "hello")


def test_a_hanging_stage_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(4); open({str(child)!r}, 'w')"])
print("started", flush=True)
time.sleep(60)
"""
    outcome = gpu.run_stage(stage(code), Run(tmp_path, {}), 1.5)
    assert (outcome.status, outcome.summary) == ("timed out", "started")
    assert outcome.seconds < 10
    assert not child.exists()


def test_main_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STAGES", (stage("raise SystemExit(3)"), stage("print('fine')")))
    assert gpu.main(["--out", str(tmp_path), "--budget", "30"]) == 1
    outcomes = [Outcome(**entry) for entry in json.loads((tmp_path / "gpu.json").read_text())["stages"]]
    assert [(outcome.status, outcome.summary) for outcome in outcomes] == [("failed", "no output"), ("ok", "fine")]


def test_unknown_stage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--skip", "sped"])
    assert "unknown stage sped; there are environment, correctness" in capsys.readouterr().err


def test_parent_does_not_import_torch() -> None:
    code = "import sys, benchmarks.gpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_summary_of_tests(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    command = [*child_command("pytest", "-q", "-p", "no:cacheprovider"), f"--junitxml={tmp_path / 'tests.xml'}"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    summary, facts = gpu._test_summary(Run(tmp_path, {}), "")
    assert summary == "1 passed, 1 failures, 0 errors, 0 skipped"
    assert facts["failed"] == ["test_it::test_bad"]


def test_summary_of_the_sanitizer() -> None:
    text = "========= COMPUTE-SANITIZER\n12 cases on gapkernels-torch\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu._sanitizer_summary(Run(Path(), {}), text) == ("0 errors", {"errors": 0})


def test_exercise_runs_odd_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    exercise.main(["--device", "cpu", "--sizes", "2x1,3x7", "--dtypes", "float32,bfloat16", "--backends", "torch"])
    assert capsys.readouterr().out == "16 cases on gapkernels-torch\n"


def test_time_by_kernel_is_sorted_and_complete() -> None:
    found = kernels.time_by_kernel(Case("matmul", samples=64, width=8), torch.device("cpu"))
    shares = [entry["share"] for entry in found]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    assert any("mm" in entry["kernel"] for entry in found)


def test_nsight_output() -> None:
    output = (
        "==PROF== Connected\n12 cases\n"
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","usecond","register/thread"\n'
        '"0","tiles","12.5","168"\n"1","tiles","13.5","168"\n"2","sums","3.0","32"\n'
    )
    assert kernels.parse_nsight(output) == {
        "tiles": {"duration": "12.5 usecond", "registers": "168 register/thread"},
        "sums": {"duration": "3.0 usecond", "registers": "32 register/thread"},
    }
    assert kernels.parse_nsight("==ERROR== ERR_NVGPUCTRPERM") == {}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("_tile_sums_kernel", "_tile_sums_kernel"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::Add<float>>(int, float)",
            "vectorized_elementwise_kernel",
        ),
        ("sm90_xmma_gemm_bf16", "sm90_xmma_gemm_bf16"),
    ],
)
def test_base_name_of_a_kernel(name: str, base: str) -> None:
    assert kernels._base_name(name) == base


def test_find_tool() -> None:
    assert find_tool("no-such-program") is None
    assert find_tool("sh")
