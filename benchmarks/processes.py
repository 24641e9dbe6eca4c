"""Child processes that import this checkout, installed or not. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_VARIABLE = "GAPKERNELS_BENCHMARKS_WITHOUT"  # see implementations.our_backends
_GRACE = 8.0  # seconds that an interrupted process has to say what it found so far
_DYING = 10.0  # seconds that a killed process may take; one in the hands of a driver can take for ever
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def child_environment(**variables: str) -> dict[str, str]:
    """Environment for a child process that imports this checkout, installed or not.

    The programs that came with this Python, ninja among them, are found even if its environment is not activated.
    """
    imports = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    programs = [*filter(None, [os.environ.get("PATH")]), sysconfig.get_path("scripts")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(imports), "PATH": os.pathsep.join(programs), **variables}


def child_command(module: str, *arguments: str) -> list[str]:
    """Command line that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def find_tool(name: str) -> str | None:
    """Path of a program, also where Python's and NVIDIA's packages install theirs."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if home]
    folders = [f"{home}/{part}" for home in homes for part in ("bin", "compute-sanitizer")]
    folders += sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)
    folders.append(sysconfig.get_path("scripts"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def execute(command: list[str], log: Path, seconds: float, variables: dict[str, str]) -> tuple[str, str]:
    """Run a command with a time limit, its output in a log file.

    Args:
        command: what to run, in the root of the checkout.
        log: file for both of its output streams.
        seconds: after which it is interrupted, and ended with all its children soon after.
        variables: added to its environment.

    Returns:
        "" or what went wrong (``failed``, ``timed out``), and the output.
    """
    with log.open("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(**variables),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be ended with it
        )
        try:
            status = "failed" if process.wait(timeout=seconds) else ""
        except subprocess.TimeoutExpired:
            # As Ctrl-C does: pytest prints its summary then.
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_GRACE)
            status = "timed out"
        finally:
            _kill(process)
    return status, log.read_text(encoding="utf-8", errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_DYING)


def adopt_orphans() -> None:
    """Become the parent of whatever our children leave behind, in sessions of its own too; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """Process ids of our children; none where the system does not tell."""
    found: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found.update(map(int, file.read_text().split()))
    return found


def end_orphans(known: set[int]) -> None:
    """End the children beyond those known, and what they leave behind in turn."""
    end = time.monotonic() + _DYING
    while (orphans := children() - known) and time.monotonic() < end:
        for orphan in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(orphan, os.WNOHANG)
        time.sleep(0.05)


def unpack_wheels(folder: Path, site: Path) -> list[str]:
    """Unpack wheels where Python can import them from, which needs neither pip nor a network.

    Args:
        folder: holds files `*.whl` made for this Python.
        site: to be put on ``PYTHONPATH``.

    Returns:
        The names of the files.
    """
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return [wheel.name for wheel in wheels]
