"""Does every backend answer at all? Each in a process of its own, so that one which hangs costs its share of time only.

    python -m benchmarks.smoke --out smoke.json --budget 60

Kernels that nobody has run on a device before may hang it. Whoever does so here, or crashes, is left out of what comes
later (``benchmarks.gpu``), where it would cost the others their time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import SMOKE
from benchmarks.implementations import IMPLEMENTATIONS, our_backends
from benchmarks.processes import child_command, execute

# Of the time that is left, for one backend; most of it goes into compiling, which must not be taken for a hang.
_SHARE, _LEAST_SECONDS = 0.6, 45.0


def check(name: str, device: str, seconds: float, scratch: Path) -> dict[str, Any]:
    """Run one backend.

    Returns:
        Whether it is usable, one line on it, and its rows. One that answers, and then takes long, is.
    """
    file = scratch / f"{name}.json"
    command = child_command("benchmarks.run", "--device", device, "--out", str(file), "--suites", SMOKE)
    command += [f"--select=-{name}$", "--case-seconds", "0.1"]
    status, output = execute(command, file.with_suffix(".log"), seconds, {})
    print(f"---- {name} {status}\n{output}", flush=True)
    rows, skipped = results.read(file) if file.exists() else ([], [])
    entry: dict[str, Any] = {"implementation": name, "usable": bool(rows) and not skipped, "rows": rows}
    if status:
        said = output.strip().splitlines()[-1:]
        entry["summary"] = f"{status} after {len(rows)} problems" + (f" ({said[0].strip()[:160]})" if said else "")
    elif skipped:
        entry["summary"] = f"{len(rows)} problems, then {skipped[0]['reason']}"
    else:
        errors = [row["gradient_error"] for row in rows if row["gradient_error"] is not None]
        entry["summary"] = f"{len(rows)} problems, error {max(errors, default=float('nan')):.0e}"
    return entry


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file; written after every backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for everything")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.budget
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gapkernels-") as scratch:
        for name in our_backends(torch.device(options.device)):
            seconds = max(_LEAST_SECONDS, (end - time.monotonic()) * _SHARE)
            found.append(check(name, options.device, seconds, Path(scratch)))
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for entry in found:
        print(f"{IMPLEMENTATIONS[entry['implementation']].backend}: {entry['summary']}")
    return 0 if found and all(entry["usable"] for entry in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
