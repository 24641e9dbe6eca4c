"""What training steps cost: time, processor time and memory, with evaluations and checkpoints left out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from gapkernels.reading import Count, Quantity, Strict

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class StepCost(Strict):
    """The cost of the training steps that one process took.

    Args:
        steps: how many there were.
        seconds: mean time of a step.
        cpu_seconds: mean processor time of a step, over all threads: with one thread the time of a step on a processor
            of its own, however busy the machine is.
        peak_bytes: most memory at once; None where the system does not tell. On a GPU what tensors take there; on a CPU
            what the whole process has in memory, data set and libraries included.
    """

    steps: Count
    seconds: Annotated[Quantity, Field(ge=0)]
    cpu_seconds: Annotated[Quantity, Field(ge=0)]
    peak_bytes: Count | None = None


class StepMeter:
    """A stopwatch for training steps, which also watches memory.

    Args:
        device: where training takes place. Work queued there is waited for whenever the watch stops, not at every step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = self._cpu_seconds = 0.0
        self._peaks: list[int] = []

    def start(self) -> None:
        """Count from here on."""
        _forget_peak(self._device)
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Count no further."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds += time.perf_counter() - self._began
        self._cpu_seconds += time.process_time() - self._cpu_began
        peak = _peak(self._device)
        if peak is not None:
            self._peaks.append(peak)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        self.stop()
        yield
        self.start()

    def cost(self, steps: int) -> StepCost | None:
        """Return the cost of each of the steps that were taken meanwhile, None if there were none."""
        if not steps:
            return None
        return StepCost(
            steps=steps,
            seconds=self._seconds / steps,
            cpu_seconds=self._cpu_seconds / steps,
            peak_bytes=max(self._peaks, default=None),
        )


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:  # some containers forbid it; the peak is then that of the whole process
            return


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform != "linux":
        return None
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024
