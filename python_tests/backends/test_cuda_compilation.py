"""The CUDA sources compile for Hopper into what they were written for. Needs nvcc and CUTLASS's headers, no GPU."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_headers

from gapkernels.backends.cuda import build

SPILLED_BYTES = 0
# One column tile per cluster is multicast; the other operand is each block's own. No branch repeats a copy or the loop
# of products: 16 instructions are the first step and the loop's body.
STATS = {
    "HGMMA": 16,
    "UTMALDG": 2,
    "UTMALDG.3D.MULTICAST": 1,
    "MUFU.EX2": 768,
    "STG.E.128": 32,  # entries that are kept, eight at a time
    "REDG": 2,
    "UTMASTG": 0,
}
GRAD = {"HGMMA": 16, "UTMALDG": 2, "UTMALDG.3D.MULTICAST": 1, "MUFU.EX2": 768, "REDG": 0, "UTMASTG": 20, "STSM": 80}
# Each of two consumers has 64 rows of 256 columns: one instruction instead of two, twice as many column sums.
WIDE = {"HGMMA": 8}
# Both products have a loop of their own; a tile leaves in eight pieces, put or added.
PRODUCTS = {
    "HGMMA": 16,
    "UTMALDG": 4,
    "UTMALDG.3D.MULTICAST": 2,
    "MUFU.EX2": 0,
    "UTMASTG": 8,
    "UTMAREDG.2D.ADD": 8,
    "REDG": 0,
}
EXPECTED = {
    "both_products": PRODUCTS,
    "similarity_stats": STATS,
    "similarity_stats_resident": STATS,
    "similarity_stats_wide": {**STATS, **WIDE, "REDG": 3},
    "similarity_grad": GRAD,
    "similarity_grad_resident": GRAD,
    "similarity_grad_wide": {**GRAD, **WIDE},
}
REGISTERS = dict.fromkeys(EXPECTED, (40, 232)) | {"similarity_grad_wide": (56, 224)}
"""What producers and consumers of a kernel may use, as in ``csrc/persistent_sm90.cuh``."""


def cuobjdump() -> str | None:
    """Triton's package carries one."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton")
    found = sorted(Path(triton.__file__).parent.rglob("cuobjdump*"))
    return str(found[0]) if found else None


def test_sources_are_the_kernels():
    assert [path.stem for path in build.kernel_sources()] == sorted(EXPECTED)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("similarity")])
def test_sources_include_how_their_rows_are_copied(name):
    """Which variants that are compiled together would have from one another."""
    text = (build.source_folder() / f"{name}.cu").read_text(encoding="utf-8")
    for way in ("Streamed", "Resident"):
        assert (f"run<{way}, " in text) == (f'#include "{way.lower()}_sm90.cuh"' in text)


def together(name):
    """The kernel whose variant this is: all of them are compiled at once, CUTLASS read once, in two thirds of the time.

    What the compiler makes of a kernel does not depend on the others.
    """
    return name.removesuffix("_resident").removesuffix("_wide")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of object files and of what ptxas reported, filled by whichever of pytest's workers comes first."""
    if build.nvcc() is None or build.cutlass_include() is None:
        pytest.skip("nvcc or CUTLASS's headers are not installed")
    of_this_process = tmp_path_factory.getbasetemp()
    folder = (of_this_process.parent if "PYTEST_XDIST_WORKER" in os.environ else of_this_process) / "cuda"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            compile_side_by_side(folder)
            (folder / "complete").touch()
    return folder


def compile_side_by_side(folder):
    running = {}
    for kernel in sorted({together(name) for name in EXPECTED}):
        sources = [source for source in build.kernel_sources() if together(source.stem) == kernel]
        unit = folder / f"{kernel}.cu"
        unit.write_text("".join(f'#include "{source}"\n' for source in sources))
        command = [*build.nvcc_command(unit, unit.with_suffix(".o")), "-Xptxas", "-v"]
        running[kernel] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    reports = {kernel: process.communicate()[1] for kernel, process in running.items()}
    tool = cuobjdump()
    for kernel, process in running.items():
        assert process.returncode == 0, reports[kernel][-4000:]
        (folder / f"{kernel}.txt").write_text(reports[kernel])
        if tool is not None:
            with (folder / f"{kernel}.sass").open("w") as listing:
                subprocess.run([tool, "-sass", str(folder / f"{kernel}.o")], stdout=listing, check=True)


def variant_of(function):
    """What distinguishes the names of the sources, from the name of a compiled function."""
    name = function.splitlines()[0]
    if "Resident" in name:
        return "_resident"
    return "_wide" if re.search(r"EpilogueI(S3_)?Li256E", name) else ""


@pytest.mark.parametrize("kernel", sorted({together(name) for name in EXPECTED}))
def test_nothing_is_lost(kernel, compiled):
    """What ptxas says of registers and of its own doubts."""
    report = (compiled / f"{kernel}.txt").read_text()
    functions = 2 * sum(together(name) == kernel for name in EXPECTED)  # bfloat16 and float16 of every variant
    spilled = [int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill", report)]
    assert len(spilled) == 2 * functions, report  # stores and loads
    assert max(spilled) <= SPILLED_BYTES, report
    # No copy of the parameters: copy descriptors are read where the launch put them.
    assert report.count(" 0 bytes stack frame") == functions, report
    # Says that tensor-core instructions wait for each other, or that a change of registers was ignored.
    assert "Potential Performance Loss" not in report
    assert "setmaxnreg ignored" not in report


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_kernels_for_hopper(name, compiled):
    listing = compiled / f"{together(name)}.sass"
    if not listing.exists():
        pytest.skip("there is no cuobjdump")
    functions = listing.read_text().split("Function : ")[1:]
    functions = [function for function in functions if together(name) + variant_of(function) == name]
    assert len(functions) == 2  # bfloat16 and float16
    for function in functions:
        assert_instructions(function, name)


def assert_instructions(function, name):
    code = [line for line in function.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/ +\S", line)]
    for instruction, count in EXPECTED[name].items():
        found = sum(bool(re.search(rf"\s{re.escape(instruction)}\b", line)) for line in code)
        assert found == 0 if count == 0 else found >= count, (instruction, found)
    type_ = "BF16" if "bfloat16" in function.splitlines()[0] else ""
    products = [line for line in code if "HGMMA" in line]
    shape = "64x256x16" if name.endswith("wide") or name == "both_products" else "64x128x16"
    assert all(shape in line and type_ in line for line in products)
    # The first step and the body of a loop, nothing else: a product by another way would have no pipeline.
    assert len(products) == EXPECTED[name]["HGMMA"]
    # Divisions by variables go by multiplications; one costs a warp the time of about forty dependent instructions.
    assert not any("MUFU.RCP" in line for line in code)
    # Both changes of registers: the warps that copy give some up, those that compute take them. Nothing says so if one
    # uses more than it has.
    changes = [number for number, line in enumerate(code) if "USETMAXREG" in line]
    assert len(changes) == 2
    producer_registers, consumer_registers = REGISTERS[name]
    (taken,) = (number for number in changes if "TRY_ALLOC" in code[number])
    (given,) = (number for number in changes if "DEALLOC" in code[number])
    assert f"{consumer_registers:#x}" in code[taken]
    assert f"{producer_registers:#x}" in code[given]
    consumers, producers = reachable(code, taken), reachable(code, given)
    assert all(re.search(r"\b(BSYNC|EXIT)\b", code[number]) for number in consumers & producers)  # one end for both
    assert sum("HGMMA" in code[number] for number in consumers) == len(products)
    assert any("UTMALDG" in code[number] for number in producers)
    assert largest_register(code[number] for number in consumers) < consumer_registers
    assert largest_register(code[number] for number in producers) < producer_registers


def reachable(code, start):
    """Numbers of the instructions that may follow this one. The compiler puts those of either role anywhere."""
    places = {int(re.search(r"/\*([0-9a-f]{4,})\*/", line)[1], 16): number for number, line in enumerate(code)}
    found, todo = set(), [start]
    while todo:
        number = todo.pop()
        if number in found or number == len(code):
            continue
        found.add(number)
        instruction = code[number].partition("*/")[2].partition(";")[0].strip()
        if re.search(r"\b(BRA|BSSY|CALL|JMP|WARPSYNC)\b", instruction):
            todo += [places[t] for t in (int(t, 16) for t in re.findall(r"\b0x[0-9a-f]+", instruction)) if t in places]
        if not re.match(r"(BRA(\.\S+)? +0x|EXIT|JMP|RET)", instruction):
            todo.append(number + 1)
    return found


def largest_register(code):
    return max(int(number) for line in code for number in re.findall(r"\bR(\d+)\b", line))


@pytest.fixture(scope="module")
def binding(tmp_path_factory):
    """The binding's object file, with the stream of torch's CUDA build, which the tests on the CPU leave out."""
    return compile_binding(Path(torch.__file__).parent / "include", tmp_path_factory.mktemp("binding"))


def compile_binding(include, folder):
    """Compile the binding with the headers of some torch; the kernels see none."""
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    target = folder / "binding.o"
    flags = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", *build.BINDING_FLAGS, "-O0"]
    source = build.source_folder() / "binding.cpp"
    run = subprocess.run(
        ["g++", "-c", str(source), "-o", str(target), "-isystem", str(include), *flags], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return target


def symbols_of_torch(binding):
    """What an object file takes from torch's libraries, all of it in plain C."""
    listing = subprocess.run(["nm", "-C", str(binding)], capture_output=True, text=True, check=True).stdout
    assert "U gapkernels::similarity_stats(gapkernels::StatsArguments const&, void*)" in listing
    assert not re.search(r" U (at|c10|torch)::", listing)
    return set(re.findall(r" U ((?:aoti_)?torch_\w+)$", listing, flags=re.MULTILINE))


def test_binding_uses_the_stable_interface_only(binding):
    assert "aoti_torch_get_current_cuda_stream" in symbols_of_torch(binding)


@pytest.mark.skipif(
    os.environ.get(torch_headers.VARIABLE) != "1",
    reason=f"downloads wheels of torch, 1.4 GB; make test-slow sets {torch_headers.VARIABLE}=1",
)
@pytest.mark.parametrize("version", torch_headers.VERSIONS)
def test_binding_compiles_with_older_headers_to_the_same_symbols(version, binding, tmp_path):
    """Which is why one build serves all: what it takes of the newest torch, the oldest has."""
    older = compile_binding(torch_headers.include_folder(version), tmp_path)
    assert symbols_of_torch(older) == symbols_of_torch(binding)


# What the test below runs: the operators are there, and a launch that fails says so.
CALL = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x, ones = torch.randn(300, 64).half(), torch.ones(300)
sums = torch.zeros(300), torch.zeros(300)
try:
    torch.ops.gapkernels_cuda.similarity_stats(
        [x], [ones], [x], [ones], [torch.ones(())], [False], [False], None, 0, 100.0, 0, *sums, []
    )
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_library_links_loads_and_reports_a_failed_launch(compiled, binding, tmp_path):
    """The library as users get it, but for torch's CUDA part: a stand-in names the stream."""
    (tmp_path / "stream.c").write_text(
        "int aoti_torch_get_current_cuda_stream(int d, void** s) { *s = 0; return d * 0; }"
    )
    libraries = Path(torch.__file__).parent / "lib"
    target = tmp_path / "library.so"
    link = [str(build.nvcc()), "-shared", "-Xcompiler", "-fPIC", "-o", str(target)]
    link += [str(tmp_path / "stream.c"), str(binding), *(str(o) for o in sorted(compiled.glob("*.o")))]
    link += [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", "-Xlinker", "--no-undefined"]
    run = subprocess.run(link, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    run = subprocess.run([sys.executable, "-c", CALL, str(target)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert re.search(r"similarity_stats could not be launched: .*(driver|device)", run.stdout)
    assert "TMA" not in run.stderr  # asked before the copy engine's descriptors are made
