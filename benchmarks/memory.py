"""Peak memory of one call on a CPU, beyond its inputs: a process of its own, and the kernel's own count.

Linux keeps the largest resident size of a process (``VmHWM``) and lets it be set back to the present one, so no peak
falls between two samples. The process gives freed memory back at once (see ``_ENVIRONMENT``); without that, memory
kept from an earlier call would hide part of the peak.

    python -m benchmarks.memory '{"implementation": "authors", "samples": 4096, ...}' LIMIT_BYTES
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.workload import embeddings, step

# A fixed threshold (glibc would raise it with use): blocks above it go back to the system as soon as they are freed.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
_ROOT = Path(__file__).resolve().parent.parent
_STATUS = Path("/proc/self/status")
_WARM_UP_SAMPLES = 64
OUT_OF_MEMORY = "out of memory"


class OutOfMemory(Exception):
    """The call wanted more memory than it may have."""


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """How far the resident memory of this process rises during a call, above what is resident before it.

    Call it in a process with the environment that ``measure`` sets.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}: peak memory on a CPU is measured on Linux only")


def available() -> bool:
    """Whether this system keeps the count."""
    return sys.platform == "linux" and Path("/proc/self/clear_refs").exists()


def available_bytes() -> int:
    """Memory that a process could take without others being swapped out."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def measure(case: Case, limit_bytes: int, timeout: float) -> int:
    """Peak memory of a case beyond its inputs, gradients included.

    Args:
        case: what to run.
        limit_bytes: most memory the process may have in all.
        timeout: seconds after which to give up.

    Raises:
        OutOfMemory: it wanted more than the limit.
        RuntimeError: the process failed otherwise.
        subprocess.TimeoutExpired: it took too long.
    """
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(dataclasses.asdict(case)), str(limit_bytes)]
    environment = {**os.environ, **_ENVIRONMENT}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode == 0:
        return int(json.loads(done.stdout.splitlines()[-1])["peak_extra_bytes"])
    # The kernel ends a process with signal 9 when the machine itself runs out.
    if done.returncode == -9 or OUT_OF_MEMORY in done.stderr:
        raise OutOfMemory(f"{OUT_OF_MEMORY} (limit {limit_bytes / 2**30:.1f} GiB)")
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    raise RuntimeError(last[0][:200])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or Python means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))


def _main() -> None:
    case, limit = Case(**json.loads(sys.argv[1])), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    device = torch.device("cpu")
    implementation = IMPLEMENTATIONS[case.implementation]
    function = implementation.function(case, device)
    # Libraries start their threads and set up their kernels in the first call, which is no memory of the loss. A
    # compiler also works in the first call of every shape, so there the first call must be the case itself.
    first = case if implementation.compiled else dataclasses.replace(case, samples=_WARM_UP_SAMPLES)
    try:
        warm_up = function if implementation.compiled else implementation.function(first, device)
        step(warm_up, embeddings(first, device), case.backward)
        inputs = embeddings(case, device)
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(lambda: step(function, inputs, case.backward))}))
    except Exception as error:
        if is_out_of_memory(error):
            sys.exit(OUT_OF_MEMORY)
        raise


if __name__ == "__main__":
    _main()
