"""The command for GPU machines, as far as a machine without one can tell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import exercise, gpu, harness, kernels, memory, sanitize, smoke, variants, winners
from benchmarks import run as run_benchmarks
from benchmarks.cases import Case
from benchmarks.gpu import Outcome, Run, Stage
from benchmarks.implementations import IMPLEMENTATIONS, our_backends
from benchmarks.processes import (
    ROOT,
    WITHOUT_VARIABLE,
    child_command,
    child_environment,
    execute,
    find_tool,
    unpack_wheels,
)
from gapkernels.training.config import load_config, parse_override

NO_DEVICE = "needs an NVIDIA GPU and a torch that sees it"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    return Run(tmp_path / "out", tmp_path / "scratch")


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
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "log.txt"}


def test_order_of_stages() -> None:
    names = [entry.name for entry in gpu.STAGES]
    assert names[:5] == ["environment", "build", "smoke", "correctness", "speed"]
    assert names[5:] == ["autotune", "variants", "sanitizer", "training", "kernels"]


def test_a_failing_stage_is_an_outcome(run: Run) -> None:
    crash = gpu.run_stage(stage("import os; print('before', flush=True); os.abort()"), run, 20)
    assert (crash.status, crash.summary) == ("failed", "before")
    absent = gpu.run_stage(stage("", tool="no-such-program"), run, 20)
    assert (absent.status, absent.summary) == ("no tool", "no-such-program not found")
    nothing = gpu.run_stage(stage("", absent=lambda: "nothing to build"), run, 20)
    assert (nothing.status, nothing.summary) == ("no sources", "nothing to build")
    unreadable = gpu.run_stage(stage("print('hello')", summarise=gpu._speed_summary), run, 20)
    assert (unreadable.status, unreadable.summary) == ("failed", "hello")


def test_a_hanging_stage_is_ended_with_its_children(run: Run, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(4); open({str(child)!r}, 'w')"])
print("started", flush=True)
time.sleep(60)
"""
    outcome = gpu.run_stage(stage(code), run, 1.5)
    assert (outcome.status, outcome.summary) == ("timed out", "started")
    assert outcome.seconds < 10
    assert not child.exists()


def test_a_stage_that_ends_by_itself_leaves_no_children(run: Run, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"import time; time.sleep(2); open({str(child)!r}, 'w')"
    starts = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}])"
    assert gpu.run_stage(stage(starts), run, 20).status == "ok"
    time.sleep(2.5)
    assert not child.exists()


def test_what_a_crashed_stage_left_in_another_session_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: whoever adopts orphans does so for good."""
    child = tmp_path / "child"
    inner = f"import time; time.sleep(3); open({str(child)!r}, 'w')"
    crash = "import os, subprocess, sys; "
    crash += f"subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True); os.abort()"
    outer = f"""
import sys
from benchmarks import gpu
gpu.STAGES = (gpu.Stage("it", 1, lambda run, s: [sys.executable, "-c", {crash!r}], gpu._last_line, needs_device=False),)
gpu.main(["--out", {str(tmp_path / "out")!r}, "--budget", "30"])
"""
    subprocess.run([sys.executable, "-c", outer], cwd=ROOT, check=True, timeout=20)
    time.sleep(3)
    assert not child.exists()


def test_an_interrupted_parent_ends_its_child(tmp_path: Path) -> None:
    """The tools that start processes of their own are interrupted too when their stage runs out of time."""
    child = tmp_path / "child"
    inner = f"import time; time.sleep(3); open({str(child)!r}, 'w')"
    outer = f"""
import sys
from pathlib import Path
from benchmarks.processes import execute
execute([sys.executable, "-c", {inner!r}], Path({str(tmp_path / "inner.log")!r}), 60, {{}})
"""
    status, _ = execute([sys.executable, "-c", outer], tmp_path / "outer.log", 1.5, {})
    assert status == "timed out"
    time.sleep(3)
    assert not child.exists()


def test_long_output_is_cut_in_the_middle(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_LOG_LIMIT", 100)
    gpu.run_stage(stage("print('begin' + 'x' * 1000 + 'end')"), run, 20)
    log = (run.out / "log.txt").read_text()
    assert "begin" in log
    assert "909 characters left out" in log
    assert log.endswith("end\n\n")


def test_main_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STAGES", (stage("raise SystemExit(3)"), stage("print('fine')")))
    assert gpu.main(["--out", str(tmp_path), "--budget", "30"]) == 1
    outcomes = [Outcome(**entry) for entry in json.loads((tmp_path / "gpu.json").read_text())["stages"]]
    assert [(outcome.status, outcome.summary) for outcome in outcomes] == [("failed", "no output"), ("ok", "fine")]


def test_no_stage_starts_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STAGES", (stage("print('fine')"),))
    assert gpu.main(["--out", str(tmp_path), "--budget", "1"]) == 0
    (entry,) = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert (entry["status"], entry["summary"]) == ("skipped", "no time left")


def test_unknown_stage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--skip", "sped"])
    assert "unknown stage sped; there are environment, build" in capsys.readouterr().err


def test_only_some_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [Stage(n, 1, lambda run, s: [sys.executable, "-c", "print(1)"], gpu._last_line) for n in "abc"]
    monkeypatch.setattr(gpu, "STAGES", (stage("print(0)"), *stages))
    assert gpu.main(["--out", str(tmp_path), "--only", "a,c", "--skip", "c,it"]) == 0
    outcomes = [Outcome(**entry) for entry in json.loads((tmp_path / "gpu.json").read_text())["stages"]]
    assert [(o.stage, o.status) for o in outcomes] == [
        ("it", "skipped"),
        ("a", "ok"),
        ("b", "skipped"),
        ("c", "skipped"),
    ]


def test_a_backend_that_does_not_work_is_left_out_from_there_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(run: Run, output: str) -> tuple[str, dict[str, list[str]]]:
        return output.strip(), {"unusable": ["cuda"]}

    show = f"import os; print('without', os.environ[{WITHOUT_VARIABLE!r}])"
    monkeypatch.setattr(gpu, "STAGES", (stage(show, summarise=found), stage(show)))
    gpu.main(["--out", str(tmp_path), "--budget", "30"])
    outcomes = [Outcome(**entry) for entry in json.loads((tmp_path / "gpu.json").read_text())["stages"]]
    assert [outcome.summary for outcome in outcomes] == ["without", "without cuda"]
    selection = gpu._test_command(Run(tmp_path, tmp_path, without=frozenset({"cuda"})), 60)
    assert selection[selection.index("-k") + 1].endswith("and not [torch] and not cuda")


def test_backends_to_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv(WITHOUT_VARIABLE, "cuda")
    assert our_backends(cpu) == ["gapkernels-torch"]
    monkeypatch.setenv(WITHOUT_VARIABLE, "cuda,torch")
    assert our_backends(cpu) == []


def test_kernels_that_were_not_compiled_are_not_tried_again(run: Run) -> None:
    summary, facts = gpu._build_summary(run, "compiling\n/cache/gapkernels_cuda.so\n")
    assert (summary, facts) == ("/cache/gapkernels_cuda.so", {})
    output = "[1/3] nvcc\nx.cu(7): error: no such thing\nninja: build stopped: subcommand failed.\n"
    assert gpu._build_summary(run, output) == ("x.cu(7): error: no such thing", {"unusable": ["cuda"]})


def test_description_is_found_among_warnings(run: Run) -> None:
    facts = {"device": "GPU", "versions": {"torch": "2"}, "tools": {"nvcc": True, "ncu": False}}
    summary, read = gpu._describe(run, f"warning\n{json.dumps(facts)}\nanother warning\n")
    assert (summary, read) == ("GPU; torch 2; tools: nvcc", facts)


def test_smoke(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, but for the second backend, which hangs."""

    def execute_here(command: list[str], log: Path, seconds: float, variables: dict[str, str]) -> tuple[str, str]:
        assert command[1:3] == ["-m", "benchmarks.run"]
        assert seconds >= 45
        if log.stem == "gapkernels-triton":
            return "timed out", "compiling\n"
        run_benchmarks.main(command[3:])
        return ended.pop(), ""

    ended = ["timed out", ""]
    monkeypatch.setattr(smoke, "execute", execute_here)
    monkeypatch.setattr(smoke, "our_backends", lambda device: ["gapkernels-torch", "gapkernels-triton"])
    monkeypatch.setattr(memory, "measure", lambda *_, **__: 0)
    monkeypatch.setitem(harness._MATMUL_SIZE, "cpu", 64)
    assert smoke.main(["--out", str(run.scratch / "smoke.json"), "--device", "cpu", "--budget", "60"]) == 1
    summary, facts = gpu._smoke_summary(run, "")
    assert re.fullmatch(
        r"torch 2 problems, error \d+e-0\d; triton timed out after 0 problems \(compiling\); "
        r"left out from here on: triton",
        summary,
    )
    assert facts["unusable"] == ["triton"]
    assert [len(entry["rows"]) for entry in facts["backends"]] == [2, 0]
    (run.scratch / "smoke.json").write_text(json.dumps(facts["backends"][1:]))
    assert gpu._smoke_summary(run, "")[1]["unusable"] == []
    # One that has shown that it works and is then slow stays in.
    slow = smoke.check("gapkernels-torch", "cpu", 60, run.scratch)
    assert (slow["usable"], slow["summary"]) == (True, "timed out after 2 problems")


def test_parent_does_not_import_torch() -> None:
    code = "import sys, benchmarks.gpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


TESTS = """
import pytest
@pytest.fixture(params=["torch", "triton"])
def backend(request): return request.param
def test_good(backend): pass
@pytest.mark.parametrize("kind", ["far - away"])
def test_bad(kind, backend): assert backend == "torch", "wrong there"
def test_skipped(): pytest.skip("not now")
"""


@pytest.mark.parametrize("options", [[], ["-p", "xdist", "-n", "2"]], ids=["one process", "xdist"])
def test_summary_of_tests(run: Run, tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    command = child_command("pytest", "-v", "-ra", "--tb=short", "-p", "no:cacheprovider", "-k", gpu._NO_GPU_TESTS)
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take longer to import than the tests to run
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env={**os.environ, **plugins}, capture_output=True, text=True
    )
    summary, facts = gpu._test_summary(run, done.stdout)
    assert summary == "1 passed, 1 failed, 0 error, 1 skipped (triton 1 of 2)"
    assert facts["backends"] == {"triton": {"PASSED": 1, "FAILED": 1}}
    assert len(facts["failures"]) == 1
    assert facts["failures"][0].startswith("test_it.py::test_bad[triton-far - away] - AssertionError: wrong there")
    # Ended half-way, without a summary of its own:
    summary, _ = gpu._test_summary(run, done.stdout.partition("= FAILURES =")[0])
    assert summary == "1 passed, 1 failed, 0 error, 1 skipped (triton 1 of 2)"
    summary, _ = gpu._test_summary(run, "python_tests/backends/test_cuda_on_gpu.py::test_cuda_graph PASSED [ 50%]")
    assert summary == "1 passed, 0 failed, 0 error, 0 skipped (cuda 1 of 1)"
    with pytest.raises(ValueError, match="no tests"):
        gpu._test_summary(run, "ERROR: file or directory not found: python_tests")


def test_grid_names_tests_that_exist() -> None:
    assert all((ROOT / "python_tests" / name).exists() for name in gpu._GPU_TESTS)


MEMCHECK = """========= COMPUTE-SANITIZER
running gap-N2-D1-bfloat16-M2-forward+backward-gapkernels-cuda
========= Invalid __global__ read of size 4 bytes
=========     at gapkernels::sums<int>(float *)+0x1b0 in similarity.cu:14
=========     by thread (31,0,0) in block (0,0,0)
running gap-N3-D7-bfloat16-M2-forward+backward-gapkernels-cuda
12 cases on gapkernels-cuda
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """running a
========= Error: Race reported between Write access at _tile_sums_kernel+0xa0 in x.py:3
=========     and Read access at _tile_sums_kernel+0xb0 in x.py:4 [16 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_summary_of_the_sanitizer(run: Run) -> None:
    found = sanitize.read(MEMCHECK, "failed")
    assert (found["errors"], found["cases"], found["summary"]) == (1, 2, "1 errors in 2 cases")
    assert found["kernels"] == {"gapkernels::sums<int>": 1}
    found = sanitize.read(RACECHECK, "failed")
    assert (found["errors"], found["kernels"]) == (1, {"_tile_sums_kernel": 2})
    ended = sanitize.read("running a\nrunning b\n", "timed out")
    assert (ended["errors"], ended["summary"]) == (None, "no summary after 2 cases (timed out)")
    entries = [{"backend": "cuda", "tool": "memcheck", **found}]
    (run.scratch / "sanitizer.json").write_text(json.dumps(entries))
    assert gpu._sanitizer_summary(run, "") == ("cuda memcheck: 1 errors in 1 cases", {"checks": entries})
    (run.scratch / "sanitizer.json").write_text("[]")
    assert "no backend with kernels of its own" in gpu._sanitizer_summary(run, "")[0]


def test_exercise_goes_on_where_a_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--sizes", "3x7", "--modalities", "2", "--backends", "torch", "--losses", "gap"]
    refusing = replace(IMPLEMENTATIONS["gapkernels-torch"], build=lambda case: refuse)

    def refuse(z: list[torch.Tensor]) -> torch.Tensor:
        if z[0].dtype == torch.float32:
            raise TypeError("no float32")
        return z[0].sum() + z[1].sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, "gapkernels-torch", refusing)
        exercise.main([*options, "--dtypes", "float32,bfloat16", "--progress"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["running", "refused", "running", "1"]
        with pytest.raises(SystemExit, match="refused"):
            exercise.main([*options, "--dtypes", "float32"])


def test_data_and_command_of_the_training(tmp_path: Path) -> None:
    run = Run(tmp_path, tmp_path, data=tmp_path / "data")
    assert gpu._dataset(run) == "digits"
    assert gpu._train_command(run, 60)[4:6] == ["--dataset", "digits"]
    for part, expected in (("mnist", "digits"), ("fsdd", "av-mnist")):
        (tmp_path / "data" / part).mkdir(parents=True)
        assert gpu._dataset(run) == expected
    command = gpu._train_command(run, 60)
    assert command[4:8] == ["--dataset", "av-mnist-small", "--batch-sizes", "4096,256"]
    options = dict(pair for pair in zip(command[4::2], command[5::2], strict=True) if "." in pair[0])
    settings = {name.removeprefix("--"): parse_override(value) for name, value in options.items()}
    config = load_config("av-mnist-small", overrides=settings)
    assert (config.data.train_samples, config.data.test_samples, config.optim.epochs) == (None, None, 100)
    for place in ("cifar10/train-0.npz", "cifar-10-batches-py/data_batch_1"):
        file = tmp_path / "data" / place
        file.parent.mkdir(parents=True)
        file.touch()
        assert gpu._dataset(run) == "cifar10"
        file.unlink()
    file.touch()
    command = gpu._train_command(run, 60)
    assert command[4:8] == ["--dataset", "cifar10-small", "--batch-sizes", "32768,4096,256"]
    assert str(tmp_path / "data") in command


def test_training_says_what_to_carry(run: Run) -> None:
    error = "gapkernels: error: gapkernels reproduce needs pydantic, tqdm: pip install 'gapkernels[train]'"
    summary, _ = gpu._train_summary(run, error)
    assert summary.startswith("needs pydantic, tqdm; carry wheels/ here, made by: python3 -m pip download --no-deps")
    assert summary.endswith("-r benchmarks/wheels.txt tqdm")
    with pytest.raises(ValueError, match=r"results\.json"):
        gpu._train_summary(run, "Traceback")


def test_training_results_are_kept(run: Run) -> None:
    (run.scratch / "training").mkdir()
    experiment = {"batch_size": 1024, "methods": {"gap": {"metrics": {"gap": {"mean": 0.1234, "std": 0.0}}}}}
    content = {"dataset": "digits", "experiments": [experiment]}
    (run.scratch / "training" / "results.json").write_text(json.dumps(content))
    assert gpu._train_summary(run, "")[0] == "digits; batch 1024: gap 0.123 with gap"
    assert json.loads((run.out / "training.json").read_text()) == content


def test_wheels_are_importable_without_pip(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "answer = 42")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
    assert unpack_wheels(tmp_path / "wheels", tmp_path / "site") == ["carried-1.0-py3-none-any.whl"]
    code = "import carried; from importlib.metadata import version; print(carried.answer, version('carried'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "42 1.0\n"
    assert unpack_wheels(tmp_path / "absent", tmp_path / "site") == []


def test_setting_of_a_variant() -> None:
    assert variants.parse_setting("a:X=1,Y=b=c") == ("a", {"X": "1", "Y": "b=c"})
    for text in ("a", "a:X", ":X=1", "a:=1"):
        with pytest.raises(ValueError, match="NAME:VARIABLE=VALUE"):
            variants.parse_setting(text)


def test_a_setting_is_measured_where_it_means_something() -> None:
    assert variants.select("N512", {}) == "N512"
    assert variants.select("N512", {"OTHER": "1"}) == "N512"
    pattern = variants.select("gapkernels-(triton|cuda)|torch", variants.SETTINGS["rows"])
    names = [Case(f"gapkernels-{name}").id for name in ("torch", "triton", "cuda")]
    assert [bool(re.search(pattern, name)) for name in names] == [False, True, False]


def test_variants_are_compared_by_problem(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: how others are started is tested above, and what they do in test_harness."""
    seen: list[str | None] = []

    def execute_here(command: list[str], log: Path, seconds: float, variables: dict[str, str]) -> tuple[str, str]:
        assert command[1:3] == ["-m", "benchmarks.run"]
        seen.append(variables.get("OMP_NUM_THREADS"))
        run_benchmarks.main(command[3:])
        return "", ""

    monkeypatch.setattr(variants, "execute", execute_here)
    monkeypatch.setattr(memory, "measure", lambda *_, **__: 0)
    monkeypatch.setitem(harness._MATMUL_SIZE, "cpu", 64)
    out = tmp_path / "variants.json"
    monkeypatch.setattr(variants, "SETTINGS", {name: variants.SETTINGS[name] for name in ("default", "tuned")})
    choice = ["--select", "N512-D128.*torch", "--case-seconds", "0.01", "--setting", "one:OMP_NUM_THREADS=1"]
    variants.main(["--out", str(out), "--device", "cpu", "--budget", "240", *choice])
    assert seen == [None, None, "1"]
    content = json.loads(out.read_text())
    assert set(content["settings"]) == {*variants.SETTINGS, "one"}
    assert {row["setting"] for row in content["rows"]} == set(content["settings"]) - {"tuned"}
    (best,) = content["fastest"]
    assert best["median"] == min(row["median"] for row in content["rows"])
    assert best["speedup_over_default"] >= 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("gap N=512 D=128 float32")
    (run.out / "variants.json").write_text(out.read_text())
    summary, facts = gpu._variants_summary(run, "")
    assert summary == f"fastest: gapkernels-torch {best['setting']} 1×"
    assert facts == {"table": [line]}


def test_fastest_of_each_problem() -> None:
    problem = {"loss": "gap", "width": 8, "dtype": "float32", "modalities": 2, "backward": True}
    facts = {"implementation": "gapkernels-ours", "iqr": 0.0, "utilisation": 0.5, "gradient_error": 1e-3}
    rows = [
        {**problem, **facts, "samples": n, "setting": s, "median": m}
        for n, s, m in ((64, "default", 2.0), (64, "rows", 1.0), (128, "default", 3.0), (128, "rows", 4.0))
    ]
    best = variants.fastest(rows)
    found = [(b["samples"], b["setting"], b["speedup_over_default"]) for b in best]
    assert found == [(64, "rows", 2.0), (128, "default", 1.0)]
    assert variants.fastest(rows[1:2])[0]["speedup_over_default"] is None
    assert [re.sub(" +", " ", line) for line in winners.lines(best)] == [
        "gap N=64 D=8 float32 ours rows 1000 ms utilisation 0.50 2.00× the default (ours default 2000)",
        "gap N=128 D=8 float32 ours default 3000 ms utilisation 0.50 1.00× the default (ours rows 4000)",
    ]


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
        ("void gapkernels::(anonymous namespace)::pingpong<gapkernels::(anonymous namespace)::S>(int)", "pingpong"),
    ],
)
def test_base_name_of_a_kernel(name: str, base: str) -> None:
    assert kernels._base_name(name) == base


def test_find_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_tool("no-such-program") is None
    assert find_tool("sh")
    program = tmp_path / "compute-sanitizer" / "a-tool-of-cuda"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool(program.name) == str(program)


def test_programs_of_this_python_are_found_where_its_environment_is_not_activated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripts = sysconfig.get_path("scripts")
    monkeypatch.setenv("PATH", "/usr/bin")
    assert child_environment()["PATH"] == f"/usr/bin{os.pathsep}{scripts}"
