"""Result files: the layout of pytest-benchmark's JSON, with every row's facts in ``extra_info``."""

from __future__ import annotations

import datetime
import functools
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gapkernels
from benchmarks.implementations import IMPLEMENTATIONS
from gapkernels.benchmark_report.results import Problem
from gapkernels.cpu import cpu_model, has
from gapkernels.environment import package_version, source_commit

# What a measurement depends on; results and the trainer may change under it.
_MEASURED = ("gapkernels", "benchmarks", "csrc", ":!benchmarks/results", ":!gapkernels/training")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model, its richest instructions for products and the number of cores in use.

    A processor of one name may come with and without AMX, where a hypervisor hides it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    richest = next((f"{name}, " for flag, name in instructions.items() if has(flag)), "")
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {richest}{threads} {'thread' if threads == 1 else 'threads'}"


def versions() -> dict[str, str]:
    """Versions of Python, torch and whatever takes part in the measurement and is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "gapkernels": gapkernels.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    peers = [entry.package.partition("==")[0] for entry in IMPLEMENTATIONS.values() if entry.package]
    packages = {package: package_version(package) for package in ("triton", *peers, "pytest-benchmark")}
    return {**found, **{package: version for package, version in packages.items() if version}}


@functools.cache
def commit() -> str:
    """The commit of what is measured, "unknown" outside a checkout."""
    return source_commit(*_MEASURED) or "unknown"


def document(rows: Sequence[dict[str, Any]], skipped: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A result file for rows that were measured without pytest."""
    share_yardstick(rows)
    return {
        "machine_info": {},
        "commit_info": {"id": commit()},
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "benchmarks": [
            {"name": row["implementation"], "stats": {"median": row["median"]}, "extra_info": row} for row in rows
        ],
        "skipped": list(skipped),
    }


def share_yardstick(rows: Sequence[dict[str, Any]]) -> None:
    """Relate all rows of a run to the best yardstick that was measured in it, early rows to a later one too.

    Those that were measured in turns have their own, which took turns with them.
    """
    rows = [row for row in rows if "turns" not in row]
    for name in ("matmul_tflops", "onednn_tflops"):
        known = [row[name] for row in rows if row[name] is not None]
        for row in rows:
            row[name] = max(known, default=None)
    for row in rows:
        row["utilisation"] = row["tflops"] / row["matmul_tflops"]


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a result file, and what it lacks."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [entry["extra_info"] for entry in content["benchmarks"]], content["skipped"]


def identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one case from another, in a row, in a skipped case or in a case itself."""
    return tuple(entry[name] for name in ("implementation", *Problem._fields))
