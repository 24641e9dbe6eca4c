"""Child processes that import this checkout, installed or not. Nothing here imports torch."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def child_environment(**variables: str) -> dict[str, str]:
    """Environment for a child process that imports this checkout, installed or not."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}


def child_command(module: str, *arguments: str) -> list[str]:
    """Command line that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def find_tool(name: str) -> str | None:
    """Path of a program, also where CUDA installs its own."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
