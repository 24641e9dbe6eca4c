"""Compiles ``csrc/`` once per machine into torch's extension cache and loads the result.

    python -m gapkernels.backends.cuda.build        ahead of time, instead of at the first use

Several processes may ask at one time: one compiles, the others wait for it and share its success or failure. A library
appears under its final name only when it is complete, so that an interrupted compilation leaves nothing that could be
taken for one. A process that failed to compile does not try again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NAME = "gapkernels_cuda"
OLDEST_NVCC = (12, 4)
CUTLASS_VARIABLE = "GAPKERNELS_CUTLASS"
FLAGS_VARIABLE = "GAPKERNELS_NVCC_FLAGS"
"""More flags for nvcc, to measure a variant: ``-DGAPKERNELS_CLUSTER=1``. Each choice has a library of its own."""

# The kernels see no header of torch. Without NDEBUG an assertion inside CUTLASS's main loop is a function call, around
# which the compiler serialises the tensor cores' instructions.
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "-gencode=arch=compute_90a,code=sm_90a",
    # torch's build switches these off; CUTLASS's number types are made of them.
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
)
# The oldest torch whose stable ABI has what the binding uses: 2.10. What is compiled with any later one runs with all.
BINDING_FLAGS = ("-O2", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; says what is missing or what the compiler reported."""


def source_folder() -> Path:
    """``csrc/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def kernel_sources() -> list[Path]:
    """The files nvcc compiles."""
    return sorted(source_folder().glob("*.cu"))


def cutlass_include() -> Path | None:
    """The folder of CUTLASS's headers: GAPKERNELS_CUTLASS, or the package nvidia-cutlass; None if there is neither."""
    if chosen := os.environ.get(CUTLASS_VARIABLE):
        folder = Path(chosen)
        return next((f for f in (folder, folder / "include") if (f / "cutlass" / "cutlass.h").exists()), None)
    package = importlib.util.find_spec("cutlass_library")
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(package.submodule_search_locations[0]) / "source" / "include"
    return folder if (folder / "cutlass" / "cutlass.h").exists() else None


def _cutlass_version() -> str:
    """The header that says which CUTLASS it is, wherever it lies; empty if there is none."""
    include = cutlass_include()
    header = None if include is None else include / "cutlass" / "version.h"
    return header.read_text(encoding="utf-8") if header is not None and header.exists() else ""


def nvcc() -> Path | None:
    """The compiler that torch's own extensions would use; where torch has no CUDA, one on the PATH."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME or os.environ.get("CUDA_HOME")
    program = Path(home, "bin", "nvcc") if home else shutil.which("nvcc")
    return Path(program) if program and Path(program).exists() else None


@functools.cache
def nvcc_version(program: Path) -> tuple[int, int]:
    """Its release as numbers."""
    output = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", output)
    if found is None:
        raise BuildError(f"{program} --version names no release:\n{output}")
    return int(found[1]), int(found[2])


def ninja() -> Path | None:
    """On the PATH, or beside the Python that runs, which need not be on it: ``.venv/bin/python`` by its path."""
    folders = (None, str(Path(sys.executable).parent), sysconfig.get_path("scripts"))
    found = (shutil.which("ninja", path=folder) for folder in folders)
    return next((Path(program) for program in found if program), None)


@contextmanager
def ninja_on_path() -> Iterator[None]:
    """Torch calls ninja by its name only."""
    program = ninja()
    before = os.environ.get("PATH", "")
    if program is not None and shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([str(program.parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def missing_tool() -> str | None:
    """What stands in the way of compiling, with the remedy; None if nothing is known to."""
    if sys.platform != "linux":
        return "its kernels are compiled on Linux only"
    if not kernel_sources():
        return f"its sources are missing: no .cu files in {source_folder()}"
    compiler = nvcc()
    if compiler is None:
        return "its kernels are compiled with nvcc, which was not found (install the CUDA toolkit or set CUDA_HOME)"
    if nvcc_version(compiler) < OLDEST_NVCC:
        return "its kernels need nvcc {}.{} or newer, found {}.{}".format(*OLDEST_NVCC, *nvcc_version(compiler))
    if cutlass_include() is None:
        if chosen := os.environ.get(CUTLASS_VARIABLE):
            return f"there are no CUTLASS headers in {CUTLASS_VARIABLE}={chosen}"
        return "CUTLASS's headers are missing (pip install 'gapkernels[cuda]')"
    if ninja() is None:
        return "ninja is missing (pip install 'gapkernels[cuda]')"
    return None


def nvcc_flags() -> list[str]:
    """The flags of this version and those of GAPKERNELS_NVCC_FLAGS."""
    return [*NVCC_FLAGS, *os.environ.get(FLAGS_VARIABLE, "").split()]


def nvcc_command(source: Path, output: Path) -> list[str]:
    """The command that compiles one kernel source, as the build does but for what torch adds."""
    compiler, include = nvcc(), cutlass_include()
    assert compiler is not None
    assert include is not None
    return [str(compiler), "-c", str(source), "-o", str(output), f"-I{include}", "-Xcompiler", "-fPIC", *nvcc_flags()]


def library() -> Path:
    """Where the compiled kernels are, or will be: one folder for each state of sources, flags and versions.

    Of torch's version the stable ABI asks for nothing; of CUDA's the runtime library's name contains the first number.
    """
    from torch.utils import cpp_extension

    digest = hashlib.sha256()
    for file in sorted(path for path in source_folder().iterdir() if path.is_file()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    versions = (torch.version.cuda or "").split(".")[0], _cutlass_version(), platform.machine()
    digest.update(repr((nvcc_flags(), BINDING_FLAGS, versions)).encode())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    return root / f"{NAME}_{digest.hexdigest()[:16]}" / f"{NAME}.so"


def build() -> Path:
    """Compile the kernels unless that has been done, and return the library.

    Raises:
        BuildError: a tool is missing or the compilation failed; the library goes on with other backends.
    """
    target = library()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    asked = time.time()
    with (target.parent / "lock").open("w") as lock:
        # The system lets go of this lock when its process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            failure = target.parent / "failure.txt"
            if failure.exists() and failure.stat().st_mtime > asked:
                raise BuildError(failure.read_text(encoding="utf-8"))  # of the process that this one waited for
            try:
                _compile(target)
            except BuildError as error:
                failure.write_text(str(error), encoding="utf-8")
                raise
            failure.unlink(missing_ok=True)
    return target


def _compile(target: Path) -> None:
    from torch.utils import cpp_extension

    reason = missing_tool()
    if reason is None and torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    if reason is not None:
        raise BuildError(f"the CUDA kernels cannot be compiled: {reason}; backend='triton' needs no compiler")
    compiler, include = nvcc(), cutlass_include()
    assert compiler is not None
    version = "{}.{}".format(*nvcc_version(compiler))
    print(
        f"gapkernels: compiling the CUDA kernels with nvcc {version}, once, about a minute → {target.parent}",
        file=sys.stderr,
        flush=True,
    )
    started = time.monotonic()
    scratch = target.parent / "build"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with ninja_on_path():
            cpp_extension.load(
                NAME,
                [str(source_folder() / "binding.cpp"), *map(str, kernel_sources())],
                extra_cflags=list(BINDING_FLAGS),
                extra_cuda_cflags=nvcc_flags(),
                extra_include_paths=[str(include)],
                build_directory=str(scratch),
                with_cuda=True,
                is_python_module=False,
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise BuildError(
            f"the CUDA kernels could not be compiled; backend='triton' needs no compiler\n{error}"
        ) from error
    (scratch / f"{NAME}.so").replace(target)
    print(f"gapkernels: compiled in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def load() -> None:
    """Make the operators ``torch.ops.gapkernels_cuda`` available in this process, compiling them if need be.

    Raises:
        BuildError: see ``build``; a second call says so again without compiling again.
    """
    if (failure := _load()) is not None:
        raise BuildError(failure)


@functools.cache
def _load() -> str | None:
    """What went wrong, or None."""
    try:
        compiled = build()
    except BuildError as error:
        return str(error)
    if not hasattr(torch.ops.gapkernels_cuda, "similarity_stats"):  # compiling loads them too
        torch.ops.load_library(str(compiled))
    return None


def is_loaded() -> bool:
    """Whether ``load`` has done its work in this process."""
    return _load.cache_info().currsize > 0 and _load() is None


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(str(error))
