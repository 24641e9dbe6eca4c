"""What this installation can do: versions, devices, backends and optional packages."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gapkernels import __version__
from gapkernels.cpu import cpu_model
from gapkernels.errors import UserError

# Extras that add an ability to the package; `bench` and `dev` are for working on it.
EXTRAS = ("metrics", "train", "triton", "cuda")


def describe_environment() -> dict[str, Any]:
    """Return versions, devices, backends and optional packages, in types that JSON knows."""
    return {
        "gapkernels": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "devices": _devices(),
        "backends": _backends(),
        "packages": _packages(),
    }


def format_environment(environment: dict[str, Any]) -> str:
    """Lay out what `describe_environment` returned for a terminal."""
    versions = ("gapkernels", "python", "platform", "torch", "triton", "cuda", "rocm")
    sections = {
        "versions": [(name, environment[name] or "none") for name in versions],
        "devices": [(entry["name"], entry["description"]) for entry in environment["devices"]],
        "backends": [
            (
                entry["name"],
                ("usable" if entry["usable"] else "not usable") + (f": {entry['reason']}" if entry["reason"] else ""),
            )
            for entry in environment["backends"]
        ],
        "optional packages": [
            (entry["name"], entry["version"] or f"missing: {install_command(entry['extra'])}")
            for entry in environment["packages"]
        ],
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    blocks = [
        "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows)])
        for title, rows in sections.items()
    ]
    return "\n\n".join(blocks)


def source_commit(*paths: str) -> str | None:
    """Return the commit of the checkout that this package runs from, with `+dirty` if files differ from it.

    Args:
        *paths: which files count, as git takes them; relative to the checkout. All of `gapkernels` by default.

    Returns:
        Twelve digits. Outside a checkout what the variable GAPKERNELS_COMMIT says, None without it.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # a repository further up would be that of somebody else
        return os.environ.get("GAPKERNELS_COMMIT")

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *(paths or ("gapkernels",)))
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+dirty" if changed else head


def require(extra: str, purpose: str) -> None:
    """Raise unless every package of an extra is installed.

    Args:
        extra: name of the extra (`train`).
        purpose: what needs it, for the message.

    Raises:
        UserError: names the missing packages and the command that installs them.
    """
    missing = [name for name in _requirements(extra) if package_version(name) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}: {install_command(extra)}")


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'gapkernels[{extra}]'"


def _requirements(extra: str) -> list[str]:
    """Return the packages of an extra, as the installed package or the checkout it runs from declares them."""
    names: list[str] = []
    for line in _declared_requirements():
        if not re.search(rf"extra\s*==\s*['\"]{extra}['\"]", line):
            continue
        own_extra = re.match(r"gapkernels\[(\w+)\]", line)
        names += _requirements(own_extra[1]) if own_extra else re.findall(r"^[\w.-]+", line)
    return names


def _declared_requirements() -> list[str]:
    """Return every requirement in the form of package metadata: `name>=1; extra == 'train'`."""
    try:
        return metadata.requires("gapkernels") or []
    except metadata.PackageNotFoundError:
        return _requirements_of_checkout(Path(__file__).parents[1] / "pyproject.toml")


def _requirements_of_checkout(path: Path) -> list[str]:
    """Return what `pyproject.toml` declares; nothing where there is no such file or Python cannot read TOML (3.10)."""
    try:
        import tomllib
    except ModuleNotFoundError:
        return []
    if not path.is_file():
        return []
    extras = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return [f"{line} extra == '{extra}'" for extra, lines in extras.items() for line in _with_marker(lines)]


def _with_marker(requirements: list[str]) -> list[str]:
    """Return requirements that end where one more condition may follow."""
    return [f"{line} and" if ";" in line else f"{line};" for line in requirements]


def package_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[dict[str, Any]]:
    extra_of = {name: extra for extra in reversed(EXTRAS) for name in _requirements(extra)}
    return [
        {"name": name, "version": package_version(name), "extra": extra} for name, extra in sorted(extra_of.items())
    ]


def _devices() -> list[dict[str, str]]:
    threads = torch.get_num_threads()
    cpu = f"{cpu_model()}, {os.cpu_count()} cores, torch uses {threads} threads"
    devices = [{"name": "cpu", "description": cpu}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"capability {properties.major}.{properties.minor}"
        devices.append({"name": f"cuda:{index}", "description": f"{properties.name}, {capability}, {memory}"})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "description": "Apple GPU"})
    return devices


def _backends() -> list[dict[str, Any]]:
    from gapkernels import backends

    return [{"name": name, "usable": usable, "reason": reason} for name, usable, reason in backends.available()]
