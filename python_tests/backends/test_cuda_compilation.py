"""The CUDA sources compile for Hopper into what they were written for. Needs nvcc and CUTLASS's headers, no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gapkernels.backends.cuda import build

SPILLED_BYTES = 0
# One column tile per cluster is multicast; the other operand is each block's own.
EXPECTED = {
    "similarity_stats": {
        "HGMMA": 16,
        "UTMALDG": 2,
        "UTMALDG.3D.MULTICAST": 1,
        "MUFU.EX2": 512,
        "REDG": 2,
        "UTMASTG": 0,
    },
    "similarity_grad": {"HGMMA": 16, "UTMALDG": 2, "UTMALDG.3D.MULTICAST": 1, "MUFU.EX2": 640, "REDG": 0, "UTMASTG": 1},
}


def cuobjdump() -> str | None:
    """Triton's package carries one."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton")
    found = sorted(Path(triton.__file__).parent.rglob("cuobjdump*"))
    return str(found[0]) if found else None


def test_sources_are_the_two_kernels():
    assert [path.stem for path in build.kernel_sources()] == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_kernels_for_hopper(name, tmp_path):
    """One test: compiling is what takes the time."""
    if build.nvcc() is None or build.cutlass_include() is None:
        pytest.skip("nvcc or CUTLASS's headers are not installed")
    source, target = build.source_folder() / f"{name}.cu", tmp_path / f"{name}.o"
    run = subprocess.run([*build.nvcc_command(source, target), "-Xptxas", "-v"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert_nothing_is_lost(run.stderr)
    tool = cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump")
    listing = subprocess.run([tool, "-sass", str(target)], capture_output=True, text=True, check=True).stdout
    functions = listing.split("Function : ")[1:]
    assert len(functions) == 2  # bfloat16 and float16
    for function in functions:
        assert_instructions(function, EXPECTED[name])


def assert_nothing_is_lost(report):
    """What ptxas says of registers and of its own doubts."""
    spilled = [int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill", report)]
    assert len(spilled) == 4, report  # stores and loads of the bfloat16 and of the float16 kernel
    assert max(spilled) <= SPILLED_BYTES, report
    # Says that tensor-core instructions wait for each other, or that a change of registers was ignored.
    assert "Potential Performance Loss" not in report
    assert "setmaxnreg ignored" not in report


def assert_instructions(function, expected):
    code = [line for line in function.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)]
    for instruction, count in expected.items():
        found = sum(bool(re.search(rf"\s{re.escape(instruction)}\b", line)) for line in code)
        assert found == 0 if count == 0 else found >= count, (instruction, found)
    type_ = "BF16" if "bfloat16" in function.splitlines()[0] else ""
    products = [line for line in code if "HGMMA" in line]
    assert all("64x128x16" in line and type_ in line for line in products)
    # Both changes of registers: the warps that copy give some up, those that compute take them.
    assert sum("USETMAXREG" in line for line in code) == 2


def test_binding_compiles_for_cuda(tmp_path):
    """With the stream of torch's CUDA build, which the tests that run it on the CPU leave out."""
    include = Path(torch.__file__).parent / "include"
    if shutil.which("g++") is None or not include.exists():
        pytest.skip("there is no C++ compiler or no header of torch")
    source, target = build.source_folder() / "binding.cpp", tmp_path / "binding.o"
    flags = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", *build.BINDING_FLAGS]
    run = subprocess.run(
        ["g++", "-c", str(source), "-o", str(target), "-isystem", str(include), *flags], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert "U gapkernels::similarity_stats(gapkernels::StatsArguments const&, void*)" in symbols
    assert not re.search(r" U (at|c10)::", symbols)  # the unstable part of torch's interface
