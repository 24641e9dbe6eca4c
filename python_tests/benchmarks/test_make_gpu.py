"""The parts of `make gpu`, as far as a machine without a GPU can tell."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import implementations, kernels, run_once
from benchmarks.cases import Case
from benchmarks.implementations import IMPLEMENTATIONS
from gapkernels.training.config import load_config, parse_override

ROOT = Path(__file__).resolve().parents[2]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
MADE_UP = """
gpu-crash: ; @$(STAGE) crash 100 sh -c 'echo before; kill -SEGV $$$$'
gpu-hang: ; @$(STAGE) hang 100 sh -c 'echo waiting; sleep 4; touch $(GPU_OUT)/late & sleep 60'
gpu-imports: ; @$(STAGE) imports 100 $(GPU_PYTHON) -c 'import carried; print("imported", carried.answer)'
"""


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments, f"GPU_PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)


@needs_make
def test_a_part_that_crashes_or_hangs_takes_nothing_from_the_others(tmp_path: Path) -> None:
    makefile, out = tmp_path / "made-up.mk", tmp_path / "out"
    makefile.write_text(MADE_UP)
    (out / "site").mkdir(parents=True)
    (out / "site" / "carried.py").write_text("answer = 42")
    stages = "GPU_STAGES=crash hang left-out imports"
    done = make("gpu", stages, "GPU_SKIP=left-out", "GPU_SECONDS=2", f"GPU_OUT={out}", MAKEFILES=str(makefile))
    assert done.returncode != 0
    lines = (out / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["crash", "hang", "imports"]
    assert "failed" in lines[0]
    assert "timed out" in lines[1]
    assert lines[1].endswith("waiting")
    assert " ok " in lines[2]
    assert lines[2].endswith("imported 42")
    assert lines == [line for line in done.stdout.splitlines() if line in lines]
    assert (out / "crash.log").read_text().startswith("before")
    assert not (out / "late").exists()


@needs_make
def test_commands_name_modules_and_options_that_exist(tmp_path: Path) -> None:
    """What the recipes run, without running it."""
    stages = make("--dry-run", "gpu", f"GPU_OUT={tmp_path}").stdout
    assert "gpu-info gpu-build gpu-tests-triton gpu-tests-cuda gpu-speed" in stages.replace("\\\n", "")
    text = make(
        "--dry-run", *(f"gpu-{name}" for name in ("speed", "settings", "kernels", "memcheck", "nsight", "tests-cuda"))
    ).stdout
    words = text.split()
    modules = {words[index + 1] for index, word in enumerate(words[:-1]) if word == "-m"}
    assert {"benchmarks.run", "benchmarks.run_once", "benchmarks.kernels", "pytest"} <= modules
    for module in modules - {"pytest"}:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    for path in (word for word in words if word.startswith("python_tests/")):
        assert (ROOT / path).exists()
    assert "-n " not in text, "tests of one GPU run in one process"


@needs_make
@pytest.mark.parametrize(
    ("files", "preset"),
    [
        ([], "digits"),
        (["mnist/train"], "digits"),
        (["mnist/train", "fsdd/0.wav"], "av-mnist-small"),
        (["fsdd/0.wav", "cifar-10-batches-py/data_batch_1"], "cifar10-small"),
        (["cifar10/train-0.npz"], "cifar10-small"),
    ],
)
def test_training_takes_the_data_at_hand_and_settings_that_exist(files: list[str], preset: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    words = make("--dry-run", "gpu-training", f"GPU_DATA={tmp_path}").stdout.replace("\\\n", "").split()
    assert words[words.index("--dataset") + 1] == preset
    pairs = itertools.pairwise(words)
    settings = {name[2:]: parse_override(value) for name, value in pairs if name.startswith("--") and "." in name}
    assert load_config(preset, overrides=settings).optim.precision == "bf16"


def test_peers_packages_are_carried(capsys: pytest.CaptureFixture[str]) -> None:
    implementations._main()
    packages = capsys.readouterr().out.split()
    assert "inf-cl==1.2.1" in packages
    assert all("==" in package for package in packages)


def test_run_once_runs_odd_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    run_once.main(["--device", "cpu", "--sizes", "2x1,3x7", "--dtypes", "float32,bfloat16", "--backends", "torch"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("running gap-N2-D1-float32-M2")
    assert lines[-1] == "16 cases on gapkernels-torch"


def test_run_once_goes_on_where_a_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--sizes", "3x7", "--modalities", "2", "--backends", "torch", "--losses", "gap"]

    def refuse(z: list[torch.Tensor]) -> torch.Tensor:
        if z[0].dtype == torch.float32:
            raise TypeError("no float32")
        return z[0].sum() + z[1].sum()

    build: Callable[[Case], Callable[[list[torch.Tensor]], torch.Tensor]] = lambda case: refuse  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, "gapkernels-torch", replace(IMPLEMENTATIONS["gapkernels-torch"], build=build))
        run_once.main([*options, "--dtypes", "float32,bfloat16"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["running", "refused", "running", "1"]
        with pytest.raises(SystemExit, match="refused"):
            run_once.main([*options, "--dtypes", "float32"])


def test_time_by_kernel_is_sorted_and_complete() -> None:
    found = kernels.time_by_kernel(Case("matmul", samples=64, width=8), torch.device("cpu"))
    shares = [entry["share"] for entry in found]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    assert any("mm" in entry["kernel"] for entry in found)
