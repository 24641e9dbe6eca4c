"""Child processes that import this checkout, installed or not. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_GRACE = 8.0  # seconds that an interrupted process has to say what it found so far


def child_environment(**variables: str) -> dict[str, str]:
    """Environment for a child process that imports this checkout, installed or not."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}


def child_command(module: str, *arguments: str) -> list[str]:
    """Command line that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def find_tool(name: str) -> str | None:
    """Path of a program, also where NVIDIA's packages install theirs."""
    profilers = sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(["/usr/local/cuda/bin", *profilers]))


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
    process.wait()


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
