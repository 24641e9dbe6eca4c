"""Taking times: the clock of a device, repeated calls, and how busy other processes keep the processor meanwhile."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Clock = Callable[[], float]


@dataclass(frozen=True)
class Samples:
    """The times of some calls.

    Args:
        seconds: one for each call.
        cpu_share: share of all cores that this process used meanwhile.
        other_cpu_share: share that other processes used, which is what disturbs a measurement.
        discarded: how many calls were repeated because they were disturbed.
    """

    seconds: Sequence[float]
    cpu_share: float
    other_cpu_share: float
    discarded: int = 0


Sampler = Callable[[Callable[[], object], Callable[[], None], Clock, int], Samples]

_QUIET_SHARE = 0.15
_TICKS = 0.02  # seconds
_PROC_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class CpuUse:
    """Seconds since some origin: of the wall clock, of this process's threads, of all processes on all cores."""

    wall: float
    own: float
    all: float
    cores: int

    @classmethod
    def now(cls) -> CpuUse:
        """The present reading."""
        own = time.process_time()
        return cls(time.perf_counter(), own, _busy_seconds(own), os.cpu_count() or 1)

    @property
    def others(self) -> float:
        """Share of all cores that other processes used."""
        return max(0.0, self.all - self.own) / self.wall / self.cores

    def __sub__(self, earlier: CpuUse) -> CpuUse:
        return CpuUse(self.wall - earlier.wall, self.own - earlier.own, self.all - earlier.all, self.cores)


def _busy_seconds(own: float) -> float:
    """What all processes have used so far; only our own share where the system does not tell."""
    if not _PROC_STAT.exists():
        return own
    user, nice, system, _, _, *interrupts = map(int, _PROC_STAT.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def sample(
    call: Callable[[], object],
    prepare: Callable[[], None],
    clock: Clock,
    rounds: int,
    patience: int = 0,
) -> Samples:
    """Time a call some times, each time prepared for.

    Args:
        call: what to time.
        prepare: run before each call, untimed.
        clock: gives the time in seconds.
        rounds: number of calls.
        patience: repeat calls that other processes disturbed, up to this many times as often as there are rounds.
    """
    taken: list[tuple[float, float, CpuUse]] = []
    quiet = 0
    while quiet < rounds and len(taken) < rounds * (1 + patience):
        prepare()
        before = CpuUse.now()
        start = clock()
        call()
        seconds = clock() - start
        use = CpuUse.now() - before
        taken.append((use.others, seconds, use))
        # The system counts in ticks, which say nothing about a call as short as one of them.
        if use.others < max(_QUIET_SHARE, _TICKS / use.wall) or not patience:
            quiet += 1
    kept = sorted(taken, key=lambda entry: entry[0])[:rounds] if patience else taken
    uses = [use for _, _, use in kept]
    total = CpuUse(sum(u.wall for u in uses), sum(u.own for u in uses), sum(u.all for u in uses), uses[0].cores)
    return Samples(
        [seconds for _, seconds, _ in kept], total.own / total.wall / total.cores, total.others, len(taken) - len(kept)
    )


def clock_of(device: torch.device) -> Clock:
    """A clock in seconds for the work of a device; on a GPU the launches that it waits for count too."""
    if device.type != "cuda":
        return time.perf_counter
    last = torch.cuda.Event(enable_timing=True)
    last.record()
    seconds = 0.0

    def read() -> float:
        # Two events give their distance in float32: summed up here, so that precision does not fade with time.
        nonlocal last, seconds
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        seconds += last.elapsed_time(now) / 1e3
        last = now
        return seconds

    return read


def summarise(times: Sequence[float]) -> dict[str, float | int]:
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {
        "median": statistics.median(times),
        "iqr": quartiles[2] - quartiles[0],
        "fastest": min(times),
        "rounds": len(times),
    }


def cache_flush(device: torch.device) -> Callable[[], None]:
    """Something that pushes everything out of a GPU's L2 cache; on a CPU the embeddings may stay where they are."""
    if device.type != "cuda":
        return lambda: None
    buffer = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def flush() -> None:
        buffer.zero_()

    return flush
