"""Watch our kernels with compute-sanitizer: invalid accesses to memory, and races on shared memory, on odd sizes.

python -m benchmarks.sanitize --out sanitizer.json --budget 120
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.exercise import ODD_SIZES
from benchmarks.implementations import GPU_BACKENDS, IMPLEMENTATIONS, our_backends
from benchmarks.processes import child_command, execute, find_tool

TOOLS = ("memcheck", "racecheck")
# torch's own allocator hands out parts of large blocks, inside which no access is ever out of bounds.
_VARIABLES = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def check(backend: str, tool: str, sizes: str, seconds: float, scratch: Path) -> dict[str, Any]:
    """Run a backend under one tool of compute-sanitizer.

    Returns:
        Backend, tool, how it ended, how many cases ran, errors in all and by kernel, and one line on it.
    """
    exercise = child_command("benchmarks.exercise", "--device", "cuda", "--backends", backend, "--sizes", sizes)
    exercise += ["--dtypes", "bfloat16,float32", "--modalities", "2", "--progress"]
    command = [find_tool("compute-sanitizer") or "", "--tool", tool, "--error-exitcode", "9", *exercise]
    status, output = execute(command, scratch / f"{backend}-{tool}.log", seconds, _VARIABLES)
    print(f"---- {backend} {tool}\n{output}", flush=True)
    return {"backend": backend, "tool": tool, **read(output, status)}


def read(output: str, status: str) -> dict[str, Any]:
    """What compute-sanitizer and the exercise under it printed."""
    totals = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
    errors = int(totals[-1]) if totals else None
    cases = len(re.findall(r"^running ", output, flags=re.MULTILINE))
    # memcheck: "    at kernel+0x10 in file.cu:7"; racecheck: "Write access at kernel+0x10 and Read access at …".
    kernels = Counter(re.findall(r"\bat (?:0x\w+ in )?([\w:~<>, ()]+?)(?:\([^)]*\))?\+0x", output))
    refused = re.search(r"(Device not supported|Failed to initialize.*|Target application.*error.*)", output)
    summary = f"{errors} errors in {cases} cases" if errors is not None else f"no summary after {cases} cases"
    if refused:
        summary += f" ({refused[1].strip()})"
    elif status == "timed out":
        summary += " (timed out)"
    return {"status": status or "ok", "cases": cases, "errors": errors, "kernels": dict(kernels), "summary": summary}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file; written after every check")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--sizes", default=ODD_SIZES, help="N×D, comma-separated, for instance 129x100")
    parser.add_argument("--backends", default="", help="comma-separated; those with kernels of their own by default")
    parser.add_argument("--tools", default=",".join(TOOLS), help="of compute-sanitizer, comma-separated")
    options = parser.parse_args(arguments)
    usable = [IMPLEMENTATIONS[name].backend for name in our_backends(torch.device("cuda"))]
    backends = options.backends.split(",") if options.backends else [n for n in usable if n in GPU_BACKENDS]
    checks = [(backend, tool) for tool in options.tools.split(",") for backend in backends]
    end = time.monotonic() + options.budget
    found: list[dict[str, Any]] = []
    options.out.write_text("[]\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="gapkernels-") as scratch:
        for number, (backend, tool) in enumerate(checks):
            seconds = max(1.0, (end - time.monotonic()) / (len(checks) - number))
            found.append(check(backend, tool, options.sizes, seconds, Path(scratch)))
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for entry in found:
        print(f"{entry['backend']} {entry['tool']}: {entry['summary']}")
    return 1 if any(entry["errors"] != 0 for entry in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
