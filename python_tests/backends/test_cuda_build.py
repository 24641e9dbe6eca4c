"""Compiling on the user's machine: what is found, what is said when something is missing, who waits for whom."""

import importlib.metadata
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gapkernels import backends, gap_loss
from gapkernels.backends import cuda
from gapkernels.backends.cuda import build


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_library_is_named_after_what_it_depends_on(cache, monkeypatch, tmp_path):
    first = build.library()
    assert first == build.library()
    assert first.is_relative_to(cache)
    copied = tmp_path / "csrc"
    copied.mkdir()
    for file in filter(Path.is_file, build.source_folder().iterdir()):
        (copied / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(build, "source_folder", lambda: copied)
    assert build.library() == first  # where they lie does not matter
    (copied / "entries.h").write_text("// changed")
    changed = build.library()
    assert changed != first
    monkeypatch.setenv(build.FLAGS_VARIABLE, "-DGAPKERNELS_CLUSTER=1")
    assert build.library() not in (first, changed)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("nvcc", None, "nvcc, which was not found"),
        ("cutlass_include", None, r"pip install 'gapkernels\[cuda\]'"),
        ("kernel_sources", [], "its sources are missing"),
        ("ninja", None, r"ninja is missing \(pip install 'gapkernels\[cuda\]'"),
    ],
)
def test_missing_tools_are_named(monkeypatch, name, value, said):
    monkeypatch.setattr(build, "nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(build, "nvcc_version", lambda program: (13, 0))
    monkeypatch.setattr(build, "cutlass_include", lambda: Path("include"))
    monkeypatch.setattr(build, name, lambda: value)
    assert build.missing_tool() is not None
    with pytest.raises(build.BuildError, match=rf"cannot be compiled: .*{said}.*backend='triton' needs no compiler"):
        build.build()


def test_old_compiler_is_named(monkeypatch):
    monkeypatch.setattr(build, "nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(build, "nvcc_version", lambda program: (11, 8))
    assert "need nvcc 12.4 or newer, found 11.8" in (build.missing_tool() or "")


def test_a_copy_of_the_headers_elsewhere_compiles_nothing_anew(monkeypatch, tmp_path):
    def headers(folder, version):
        (tmp_path / folder / "cutlass").mkdir(parents=True)
        (tmp_path / folder / "cutlass" / "cutlass.h").touch()
        (tmp_path / folder / "cutlass" / "version.h").write_text(version)
        monkeypatch.setenv(build.CUTLASS_VARIABLE, str(tmp_path / folder))
        return build.library()

    assert headers("one", "4.2.0") == headers("another", "4.2.0") != headers("newer", "4.3.0")


def test_headers_in_a_folder_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setenv(build.CUTLASS_VARIABLE, str(tmp_path))
    assert build.cutlass_include() is None
    header = tmp_path / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert build.cutlass_include() == tmp_path / "include"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_command_says_why_it_cannot_compile():
    run = subprocess.run([sys.executable, "-m", "gapkernels.backends.cuda.build"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("the CUDA kernels cannot be compiled: ")
    assert "Warning" not in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backend_says_why_it_cannot_be_used():
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot be used here: .*; choose backend='triton'"):
        gap_loss(x, x, backend="cuda")
    with pytest.raises(TypeError, match=r"takes bfloat16, float16 embeddings, got float32; choose backend='triton'"):
        gap_loss(x.float(), x.float(), backend="cuda")
    status = {s.name: s for s in backends.available()}["cuda"]
    assert not status.usable
    assert status.reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_only_hopper_is_taken(monkeypatch, capability):
    monkeypatch.setattr(cuda.triton_backend, "unusable_because", lambda device=None: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = cuda.unusable_because(torch.device("cuda"), torch.bfloat16)
    assert reason == "its kernels are for compute capability 9.0 (Hopper), not {}.{}".format(*capability)


def build_slowly(starts, results, works=True):
    """In a process of its own: a build whose compiler takes a while."""

    def compile_(target):
        starts.put(time.monotonic())
        time.sleep(0.5)
        if not works:
            raise build.BuildError("no such instruction")
        target.write_bytes(b"library")

    build._compile = compile_
    try:
        results.put(build.build().read_bytes())
    except build.BuildError as error:
        results.put(str(error))


@pytest.mark.parametrize(("works", "result"), [(True, b"library"), (False, "no such instruction")])
def test_processes_that_build_at_one_time_compile_once(cache, works, result):
    context = multiprocessing.get_context("fork")  # nothing to import
    starts, results = context.Queue(), context.Queue()
    workers = [context.Process(target=build_slowly, args=(starts, results, works)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [result] * 3
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    starts.get(timeout=5)
    assert starts.empty()


def test_a_failure_is_remembered_by_the_process_and_not_by_the_next(monkeypatch):
    calls = []

    def fail(target):
        calls.append(target)
        raise build.BuildError("no such instruction")

    monkeypatch.setattr(build, "_compile", fail)
    build._load.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(build.BuildError, match="no such instruction"):
                build.load()
        assert len(calls) == 1
        assert not build.is_loaded()
    finally:
        build._load.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda target: target.write_bytes(b"library"))
    assert build.build().read_bytes() == b"library"


def test_one_library_serves_every_torch_of_one_cuda(monkeypatch):
    def library(torch_version, cuda_version, machine="x86_64"):
        monkeypatch.setattr(torch, "__version__", torch_version)
        monkeypatch.setattr(torch.version, "cuda", cuda_version)
        monkeypatch.setattr("platform.machine", lambda: machine)
        return build.library()

    first = library("2.10.0+cu130", "13.0")
    assert library("2.13.0+cu132", "13.2") == first
    assert library("2.13.0+cu128", "12.8") != first
    assert library("2.10.0+cu130", "13.0", "aarch64") != first


def test_ninja_beside_the_python_that_runs_is_found(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ninja"
    program.write_text("#!/bin/sh\necho 1.11.1\n")
    program.chmod(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "empty" / "python"))
    assert build.ninja() is None
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert build.ninja() == program
    with build.ninja_on_path():  # torch runs it by its name
        assert subprocess.run(["ninja", "--version"], capture_output=True, text=True).stdout == "1.11.1\n"
    assert shutil.which("ninja") is None


def test_the_oldest_torch_of_the_binding_is_the_oldest_of_the_package():
    """The stable ABI gives what the oldest version has to every later one."""
    (flag,) = (flag for flag in build.BINDING_FLAGS if flag.startswith("-DTORCH_TARGET_VERSION="))
    version = int(flag.partition("=")[2], 16)
    oldest = next(r for r in importlib.metadata.requires("gapkernels") or () if r.startswith("torch"))
    assert oldest == f"torch>={version >> 56}.{version >> 48 & 0xFF}"


def test_interrupted_compilation_leaves_no_library(monkeypatch):
    def interrupted(target):
        (target.parent / "build").mkdir()
        (target.parent / "build" / target.name).write_bytes(b"half a library")
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.build()
    assert not build.library().exists()
    monkeypatch.setattr(build, "_compile", lambda target: target.write_bytes(b"library"))
    assert build.build().read_bytes() == b"library"


@pytest.fixture
def tools(monkeypatch):
    """A machine where everything is there, as far as can be seen before compiling."""
    monkeypatch.setattr(build, "nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(build, "nvcc_version", lambda program: (13, 0))
    monkeypatch.setattr(build, "cutlass_include", lambda: Path("cutlass-include"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_torch_is_asked_to_compile_all_sources_for_hopper(tools, monkeypatch, capsys):
    calls = []

    def load(name, sources, **options):
        calls.append((sources, options))
        (Path(options["build_directory"]) / f"{name}.so").write_bytes(b"library")

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    path = build.build()
    assert path.read_bytes() == b"library"
    ((sources, options),) = calls
    kernels = {f"similarity_{name}{variant}.cu" for name in ("stats", "grad") for variant in ("", "_resident", "_wide")}
    assert {Path(source).name for source in sources} == {"binding.cpp", "both_products.cu", *kernels}
    assert "-gencode=arch=compute_90a,code=sm_90a" in options["extra_cuda_cflags"]
    assert "-DUSE_CUDA" in options["extra_cflags"]
    assert options["extra_include_paths"] == ["cutlass-include"]
    assert options["is_python_module"] is False
    assert "compiling the CUDA kernels with nvcc 13.0" in capsys.readouterr().err
    assert build.build() == path
    assert len(calls) == 1


def test_what_the_compiler_reports_is_passed_on(tools, monkeypatch):
    def load(name, sources, **options):
        raise RuntimeError("Error building extension: no such instruction")

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    with pytest.raises(build.BuildError, match=r"backend='triton' needs no compiler\n.*no such instruction"):
        build.build()
    assert not build.library().exists()
