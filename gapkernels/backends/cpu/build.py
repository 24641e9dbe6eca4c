"""Compiles ``csrc/cpu`` for this machine's processor.

python -m gapkernels.backends.cpu.build        ahead of time, instead of at the first use

GAPKERNELS_CPU_ISA=AVX2 (or AVX-512, AVX512-BF16) takes an instruction set that is not the processor's fastest, to test
or to measure its code. GAPKERNELS_CXX_FLAGS adds flags for the compiler, a sanitizer's for instance. Each choice has a
library of its own; both are read when the kernels are loaded, once in a process.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

from gapkernels import cpu
from gapkernels.backends import native_build
from gapkernels.backends.native_build import BuildError

NAME = "gapkernels_cpu"
ISA_VARIABLE = "GAPKERNELS_CPU_ISA"
FLAGS_VARIABLE = "GAPKERNELS_CXX_FLAGS"
COMPILE_TIME = "about 30 s of one core"

FLAGS = (
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # what is to be fused says so
    "-fvisibility=hidden",
)
INSTRUCTION_SETS = {
    "AVX512-BF16": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
        "-mprefer-vector-width=512",
    ),
    "AVX-512": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        "-mprefer-vector-width=512",
    ),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}


def instruction_sets() -> list[str]:
    """Those of ``INSTRUCTION_SETS`` that the processor and torch have, the richest first."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return list(INSTRUCTION_SETS) if cpu.has("avx512_bf16") else ["AVX-512", "AVX2"]
    return ["AVX2"] if capability == "AVX2" else []


def instruction_set() -> str | None:
    """What the kernels are compiled for: GAPKERNELS_CPU_ISA, or the fastest there is; None if there is none.

    Raises:
        ValueError: GAPKERNELS_CPU_ISA names what this machine does not have.
    """
    present, chosen = instruction_sets(), os.environ.get(ISA_VARIABLE)
    if not chosen:
        slow = set() if cpu.multiplies_bfloat16() else {"AVX512-BF16"}
        return next((name for name in present if name not in slow), None)
    if chosen not in present:
        accepted = ", ".join(present) or "nothing: it has neither AVX2 nor AVX-512"
        raise ValueError(f"{ISA_VARIABLE}={chosen}: this machine accepts {accepted}")
    return chosen


def extra_flags() -> list[str]:
    """The flags of GAPKERNELS_CXX_FLAGS, for the compiler and for the linker."""
    return shlex.split(os.environ.get(FLAGS_VARIABLE, ""))


def compiler() -> str | None:
    """The C++ compiler: CXX, or the first of the usual names on the PATH."""
    names = [chosen] if (chosen := os.environ.get("CXX")) else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def sources() -> list[Path]:
    """The files the compiler is called with."""
    return sorted((native_build.source_folder() / "cpu").glob("*.cpp"))


def missing_tool() -> str | None:
    """What stands in the way of compiling, with the remedy; None if nothing is known to."""
    if sys.platform != "linux":
        return "its kernels are compiled on Linux only"
    if not sources():
        return f"its sources are missing: no .cpp files in {native_build.source_folder() / 'cpu'}"
    if compiler() is None:
        chosen = os.environ.get("CXX")
        return f"CXX={chosen} was not found" if chosen else "a C++ compiler is missing (g++ 11 or clang++ 14, or newer)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return f"Python's headers are missing (the package python{sys.version_info.major}.{sys.version_info.minor}-dev)"
    if native_build.ninja() is None:
        return "ninja is missing (pip install ninja)"
    return None


def library() -> Path:
    """Where the compiled kernels are, or will be."""
    files = (native_build.source_folder() / "cpu").glob("*")
    versions = torch.__version__, sysconfig.get_config_var("SOABI")
    return native_build.library_path(NAME, files, (FLAGS, instruction_set(), extra_flags(), versions))


def build(again: bool = False) -> Path:
    """Compile the kernels unless that has been done, and return the library.

    Args:
        again: whether to try again what failed before.

    Raises:
        BuildError: a tool is missing or the compilation failed; the library goes on with other backends.
    """
    what = f"the CPU kernels for {instruction_set()} ({COMPILE_TIME})"
    try:
        return native_build.build(library(), _compile, what, again)
    except BuildError as error:
        raise BuildError(
            f"the CPU kernels could not be compiled; backend='torch' needs no compiler\n{error}"
        ) from error


def _compile(folder: Path) -> Path:
    reason = missing_tool()
    if reason is not None:
        raise BuildError(reason)
    chosen, program = instruction_set(), compiler()
    if chosen is None:
        raise BuildError(f"they need AVX2 or AVX-512, and torch reports {torch.backends.cpu.get_cpu_capability()}")
    assert program is not None
    torch_folder = Path(torch.__file__).parent
    include = [f"-isystem{torch_folder / 'include'}", f"-isystem{sysconfig.get_paths()['include']}"]
    commands = {}
    for source in sources():
        flags = [*FLAGS, *INSTRUCTION_SETS[chosen], *extra_flags()]
        command = [program, *flags, *include, "-c", str(source), "-o", f"{source.stem}.o"]
        commands[f"{source.stem}.o"] = ([str(source)], command)
    objects = list(commands)
    # libgomp is left to be found in torch: linked by name, a second one with a second pool of threads might be loaded.
    lib = torch_folder / "lib"
    link = [
        program,
        "-shared",
        *extra_flags(),
        *objects,
        f"-L{lib}",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{lib}",
        "-o",
        f"{NAME}.so",
    ]
    commands[f"{NAME}.so"] = (objects, link)
    native_build.run_ninja(folder, commands)
    return folder / f"{NAME}.so"


@functools.cache
def load() -> ModuleType:
    """The module of kernels, compiled if need be.

    Raises:
        BuildError: see ``build``.
    """
    path = str(build())
    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"the compiled CPU kernels cannot be loaded: {error}") from error
    return module


def is_loaded() -> bool:
    """Whether ``load`` has done its work in this process."""
    return load.cache_info().currsize > 0


if __name__ == "__main__":
    try:
        print(build(again=True))
    except (BuildError, ValueError) as error:
        sys.exit(str(error))
