"""Compiling the CPU kernels: for which processor, when, what is said; and what sanitizers say about them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gapkernels import cpu as processor
from gapkernels.backends import cpu, native_build
from gapkernels.backends.cpu import build

ROOT = Path(__file__).resolve().parents[2]

if (reason := cpu.unusable_because()) is not None:
    pytest.skip(reason, allow_module_level=True)


def run(*command: object, **variables: str) -> subprocess.CompletedProcess:
    """A command in a process of its own, with these sources and these variables."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def run_tests(selection: str, **variables: str) -> None:
    """Tests of the kernels and of the oracle's grid, with other kernels."""
    done = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", selection),
        *(f"python_tests/{name}.py" for name in ("backends/test_cpu_kernels", "backends/test_cpu_step", "test_loss")),
        **variables,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_instruction_set_can_be_chosen_among_those_of_the_processor(monkeypatch) -> None:
    libraries = set()
    for name in build.instruction_sets():
        monkeypatch.setenv(build.ISA_VARIABLE, name)
        assert build.instruction_set() == name
        libraries.add(build.library())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.delenv(build.ISA_VARIABLE)
    assert build.instruction_set() == "AVX2"
    assert build.library() in libraries
    monkeypatch.setenv(build.FLAGS_VARIABLE, "-O1 -g")
    assert build.library() not in libraries
    monkeypatch.setenv(build.ISA_VARIABLE, "AVX-512")
    with pytest.raises(ValueError, match=r"GAPKERNELS_CPU_ISA=AVX-512: this machine accepts AVX2$"):
        build.instruction_set()


@pytest.mark.parametrize(
    ("flags", "is_amd", "expected"),
    [
        ("avx512_bf16 amx_bf16", False, "AVX512-BF16"),
        ("avx512_bf16", True, "AVX512-BF16"),
        ("avx512_bf16", False, "AVX-512"),  # Intel's take longer than float32's
        ("", True, "AVX-512"),
    ],
)
def test_the_fastest_instruction_set_is_taken(monkeypatch, flags, is_amd, expected) -> None:
    monkeypatch.delenv(build.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(processor, "has", lambda flag: flag in flags.split())
    monkeypatch.setattr(processor, "is_amd", lambda: is_amd)
    processor.multiplies_bfloat16.cache_clear()
    try:
        assert build.instruction_set() == expected
        assert processor.multiplies_bfloat16() == (expected == "AVX512-BF16")
    finally:
        processor.multiplies_bfloat16.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", list(build.INSTRUCTION_SETS))
def test_the_kernels_for_other_processors(instruction_set) -> None:
    """All of these two files passes too, with the same variable; here what differs most, to save time."""
    if instruction_set not in build.instruction_sets() or instruction_set == build.instruction_set():
        pytest.skip("the other tests are of these kernels here, or the processor lacks it")
    kernels = "kernels and (63 or 65 or 257 or 2100-2 or errors or any_shape)"
    oracle = "test_loss and cpu and (degenerate or modalities or (sizes and (-3- or -129-)))"
    run_tests(f"({kernels}) or ({oracle})", GAPKERNELS_CPU_ISA=instruction_set)


@pytest.mark.slow
def test_the_kernels_for_processors_with_products_of_bfloat16() -> None:
    """Emulated where the processor has none; where it has, other tests are of these kernels."""
    if build.instruction_sets()[:1] != ["AVX-512"]:
        pytest.skip("other tests are of these kernels here, or the processor lacks AVX-512")
    kernels = "kernels and bfloat16 and (63 or 65 or 257 or any_shape)"
    steps = "step and bfloat16"
    oracle = "test_loss and cpu and bfloat16 and (degenerate or (sizes and (-3- or -129-)))"
    flags = "-DEMULATE_BF16_PRODUCTS"
    run_tests(f"({kernels}) or ({steps}) or ({oracle})", GAPKERNELS_CPU_ISA="AVX-512", GAPKERNELS_CXX_FLAGS=flags)


@pytest.mark.slow
def test_sanitizers_find_nothing() -> None:
    """Addresses and undefined behaviour, over all functions; and they do find an access that is made on purpose."""
    compiler = build.compiler()
    assert compiler is not None
    names = "libasan.so", "libubsan.so"
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip(f"{compiler} comes without {' and '.join(names)}")
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    program = Path(__file__).with_name("small_cases_on_cpu.py")
    variables = {build.FLAGS_VARIABLE: flags}
    compiled = run("-m", "gapkernels.backends.cpu.build", **variables)
    assert compiled.returncode == 0, compiled.stderr
    # Python and torch keep memory until the process ends.
    done = run(program, **variables, LD_PRELOAD=" ".join(found), ASAN_OPTIONS="detect_leaks=0:exitcode=99")
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == "found on purpose\nall cases done\n"
    assert "heap-buffer-overflow" in done.stderr


def test_a_failed_compilation_is_remembered(tmp_path, monkeypatch, capsys) -> None:
    target, calls = tmp_path / "name_key" / "name.so", []

    def compile_into(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise native_build.BuildError("no compiler")
        (folder / "name.so").write_text("library")
        return folder / "name.so"

    for _ in range(2):
        with pytest.raises(native_build.BuildError, match="no compiler"):
            native_build.build(target, compile_into, "a test")
    assert len(calls) == 1
    assert native_build.build(target, compile_into, "a test", again=True) == target
    assert native_build.build(target, compile_into, "a test") == target
    assert len(calls) == 2


def test_auto_compiles_only_where_it_may(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv(native_build.VARIABLE, "0")
    monkeypatch.setattr(build, "is_loaded", lambda: False)
    cpu.ready.cache_clear()
    assert not cpu.ready()
    cpu.ready.cache_clear()


def test_unusable_on_other_devices_and_types() -> None:
    assert "cuda" in str(cpu.unusable_because(torch.device("cuda")))
    assert "int64" in str(cpu.unusable_because(torch.device("cpu"), torch.int64))
