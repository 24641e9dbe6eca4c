"""Compiles native code once per machine into torch's cache of extensions.

Several processes may ask at one time: one compiles, the others wait for it. A library appears under its final name only
when it is complete, so that an interrupted compilation leaves nothing that could be taken for one. A compilation that
failed is remembered: the same sources, flags and versions are not tried again until somebody asks for it by command.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

VARIABLE = "GAPKERNELS_BUILD"
"""Set to 0 to forbid compilations that nobody asked for by name or by command."""


class BuildError(RuntimeError):
    """Native code cannot be compiled here; says what is missing or what the compiler reported."""


def source_folder() -> Path:
    """``csrc/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def may_compile() -> bool:
    """Whether a compilation may start without being asked for."""
    return os.environ.get(VARIABLE, "1") != "0"


def ninja() -> str | None:
    """The program that runs compilers side by side: the one of this Python's environment, else one on the PATH."""
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja")


def cache_folder() -> Path:
    """Where torch keeps compiled extensions."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return (
        Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch_extensions")
    )


def library_path(name: str, files: Iterable[Path], settings: object) -> Path:
    """Where a library is, or will be: one folder for each state of its sources and of its settings.

    Args:
        name: of the library.
        files: sources and headers.
        settings: flags and versions; its ``repr`` counts.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return cache_folder() / f"{name}_{digest.hexdigest()[:16]}" / f"{name}.so"


def build(target: Path, compile_into: Callable[[Path], Path], what: str, again: bool = False) -> Path:
    """Compile a library unless that has been done, and return it.

    Args:
        target: from ``library_path``.
        compile_into: compiles in an empty folder and returns the library there.
        what: for the line that says what is being done: ``"the CPU kernels for AVX2 (about 30 s of one core)"``.
        again: whether to try again what failed before.

    Raises:
        BuildError: the compilation failed, now or before.
    """
    if target.exists():
        return target
    failure = target.with_name("failed")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        # The system lets go of this lock when its process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        if failure.exists() and not again:
            raise BuildError(failure.read_text(encoding="utf-8"))
        scratch = target.parent / "build"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        print(f"gapkernels: compiling {what}, once → {target.parent}", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            compiled = compile_into(scratch)
        except BuildError as error:
            failure.write_text(str(error), encoding="utf-8")
            raise
        compiled.replace(target)
        failure.unlink(missing_ok=True)
        print(f"gapkernels: compiled in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return target


def run_ninja(folder: Path, commands: dict[str, tuple[list[str], list[str]]]) -> None:
    """Run commands side by side, each as soon as what it needs is there.

    Args:
        folder: where outputs go.
        commands: per output, ``(inputs, command)``; inputs that are outputs of other commands come first.

    Raises:
        BuildError: ninja is missing or a command failed; ends with what it printed.
    """
    program = ninja()
    if program is None:
        raise BuildError("ninja is missing (pip install ninja)")
    lines = ["ninja_required_version = 1.5"]
    for output, (inputs, command) in commands.items():
        escaped = " ".join(_shell(argument) for argument in command).replace("$", "$$")
        lines += [f"rule make_{output.replace('.', '_')}", f"  command = {escaped}"]
        lines += [f"build {output}: make_{output.replace('.', '_')} {' '.join(map(_ninja_path, inputs))}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = subprocess.run([program], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{done.stdout[-4000:]}{done.stderr[-1000:]}")


def _shell(argument: str) -> str:
    import shlex

    return shlex.quote(argument)


def _ninja_path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
