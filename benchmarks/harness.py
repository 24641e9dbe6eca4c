"""The one way in which everything is timed, and what every measured row carries.

Times are the device's own: CUDA events around each call, with the L2 cache overwritten before it; a monotonic clock on
a CPU. A row also has the rate of a large ``torch.matmul`` of the same process, which is the yardstick for utilisation.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import environment, memory, oracle
from benchmarks.cases import Case
from benchmarks.implementations import IMPLEMENTATIONS, Implementation, Loss, Unavailable
from benchmarks.inputs import embeddings

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

_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
_MATMUL_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
_MATMUL_CALLS = 7
_MATMUL_VALID_SECONDS = 60.0  # a shared machine changes its speed
_QUIET_SHARE = 0.15
_TICKS = 0.02  # seconds
_PROC_STAT = Path("/proc/stat")
_MOST_ROUNDS = 40
_FEWEST_ROUNDS = 3
_ONE_ROUND_ABOVE = {"cpu": 10.0, "cuda": 1.5}  # seconds that the products alone would take at the yardstick's rate
_MOST_HANGS = 2
_EXACT_BYTES = 2**31  # of exact gradients kept for the other implementations of a problem
_ORACLE_OPERATIONS = {"cpu": 8192**2 * 512, "cuda": 65536**2 * 768}  # N²D up to which float64 is affordable


@dataclass(eq=False)  # not frozen: Python itself sets the traceback of an exception
class Skipped(Exception):
    """A case that gives no row, and why.

    Args:
        kind: ``missing`` (not installed or not for this device), ``unsupported`` (refuses the case), ``memory``,
            ``time``, or ``hung`` (gave no answer).
        reason: for the reader.
    """

    kind: Literal["missing", "unsupported", "memory", "time", "hung"]
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass
class Session:
    """What the cases of one run share.

    Args:
        device: where to measure.
        case_seconds: rounds of one case take about this long.
        call_seconds: a call that is expected to take longer is left out, unless its case is marked slow.
        wait_seconds: spend up to this long on every case waiting while other processes keep the CPU busy.
        patience: repeat calls that other processes disturbed, up to this many times as often as calls are needed.
        cpu_time: time calls by the CPU time that this process uses, which equals the wall clock of an idle machine as
            long as there is one thread; for machines that are never idle.
        memory_limit: most bytes a process may have in a measurement of memory; on a CPU only. 0: 60 % of what is free.
        matmul_size: rows and columns of the yardstick's operands. 0: enough for full speed.
    """

    device: torch.device
    case_seconds: float = 5.0
    call_seconds: float = 60.0
    wait_seconds: float = 0.0
    patience: int = 0
    cpu_time: bool = False
    memory_limit: int = 0
    matmul_size: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    _wait_until: float = 0.0
    _matmul: dict[str, float] = field(default_factory=dict)
    _matmul_at: float = -math.inf
    _last_call: dict[Case, tuple[int, float]] = field(default_factory=dict)
    _out_of_memory: dict[Case, int] = field(default_factory=dict)
    _exact: dict[Case, tuple[float, list[Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cpu_time and (self.device.type != "cpu" or torch.get_num_threads() != 1):
            raise ValueError("the CPU time of a call is its duration on a CPU and with one thread only")
        if not self.memory_limit:
            self.memory_limit = memory.available_bytes() * 6 // 10
        if not self.matmul_size:
            self.matmul_size = _MATMUL_SIZE[self.device.type]

    def measure(
        self, case: Case, sampler: Sampler | None = None, known: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Measure a case.

        Args:
            case: what to measure.
            sampler: how to collect the times of one call; None for the session's own way.
            known: an earlier row of the case, to be timed again. Memory and errors, which other processes do not
                disturb, are taken over if the code is still the same.

        Returns:
            The row, in types that JSON knows.

        Raises:
            Skipped: there is no row; it is remembered in ``skipped``.
        """
        try:
            return self._measure(case, sampler or self._sample, known)
        except Skipped as skipped:
            self.give_up(case, skipped)
            raise
        finally:
            gc.collect()
            if self.device.type == "cuda":
                # After an error that leaves the device unusable this fails as well, and has nothing new to say.
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()

    def give_up(self, case: Case, why: Skipped) -> None:
        """Remember a case without a row."""
        label = IMPLEMENTATIONS[case.implementation].label
        self.skipped.append({**_describe(case), "label": label, "kind": why.kind, "reason": why.reason})

    def matmul_rate(self) -> dict[str, float]:
        """Operations per second of a large product by ``torch.matmul``, and on a CPU by oneDNN.

        Measured again now and then: the best so far counts, as whatever disturbs it makes it slower.
        """
        if time.monotonic() - self._matmul_at > _MATMUL_VALID_SECONDS:
            for name, rate in self._measure_matmul().items():
                self._matmul[name] = max(rate, self._matmul.get(name, 0.0))
            self._matmul_at = time.monotonic()
        return self._matmul

    def remember(self, row: Mapping[str, Any]) -> None:
        """Learn from an earlier run how long a call takes."""
        case = Case(**{field.name: row[field.name] for field in fields(Case) if field.name in row})
        samples, _ = self._last_call.get(_without_size(case), (0, 0.0))
        if case.samples > samples:
            self._last_call[_without_size(case)] = (case.samples, row["fastest"])

    def _measure(self, case: Case, sampler: Sampler, known: Mapping[str, Any] | None) -> dict[str, Any]:
        implementation = IMPLEMENTATIONS[case.implementation]
        try:
            function = implementation.function(case, self.device)
        except Unavailable as error:
            raise Skipped("missing", str(error)) from error
        self._refuse_hopeless(case)
        self._wait_until = time.monotonic() + self.wait_seconds
        self._wait_until_quiet()
        try:
            if known is not None and known["commit"] == environment.commit():
                peak = known["peak_extra_bytes"]
                errors = {name: known[name] for name in ("loss_error", "gradient_error")}
            else:
                peak = self._peak_memory(case, function)
                errors = self._errors(case, implementation, function)
            timing = self._time(case, implementation, function, sampler)
            return self._row(case, implementation, timing, peak, errors)
        except memory.OutOfMemory as error:
            self._out_of_memory[_without_size(case)] = case.samples
            raise Skipped("memory", str(error)) from error
        except subprocess.TimeoutExpired as error:
            raise Skipped("time", f"one call takes more than {error.timeout:.0f} s") from error
        except Exception as error:  # a peer may fail in any way; that is its result
            if memory.is_out_of_memory(error):
                self._out_of_memory[_without_size(case)] = case.samples
                raise Skipped("memory", self._memory_reason()) from error
            message = next(iter(str(error).splitlines()), "")
            raise Skipped("unsupported", f"{type(error).__name__}: {message[:160]}") from error

    def _refuse_hopeless(self, case: Case) -> None:
        """Leave out a case whose smaller sibling was too large or too slow already; all take O(N²) time.

        Nor is somebody asked again and again who gives no answer, which takes the others' time.
        """
        asked = (case.implementation, "hung")
        hung = [entry for entry in self.skipped if (entry["implementation"], entry["kind"]) == asked]
        if len(hung) >= _MOST_HANGS:
            raise Skipped("hung", f"not tried: {len(hung)} other cases gave no answer")
        if case.samples > self._out_of_memory.get(_without_size(case), case.samples):
            raise Skipped("memory", f"out of memory at N = {self._out_of_memory[_without_size(case)]} already")
        samples, seconds = self._last_call.get(_without_size(case), (case.samples, 0.0))
        expected = seconds * (case.samples / samples) ** 2
        if case.samples > samples and expected > self.call_seconds and not case.slow:
            raise Skipped("time", f"a call would take about {expected:.0f} s (N = {samples}: {seconds:.1f} s)")

    def _wait_until_quiet(self) -> None:
        """Give other processes time to finish; what still disturbs a measurement is recorded with it."""
        while time.monotonic() < self._wait_until and _busy_share(0.5) > _QUIET_SHARE:
            time.sleep(1.0)

    def _clock(self) -> Clock:
        return time.process_time if self.cpu_time else clock_of(self.device)

    def _sample(self, call: Callable[[], object], prepare: Callable[[], None], clock: Clock, rounds: int) -> Samples:
        return sample(call, prepare, clock, rounds, self.patience, self._wait_until_quiet)

    def _measure_matmul(self) -> dict[str, float]:
        size, dtype = self.matmul_size, _MATMUL_DTYPE[self.device.type]
        left, right = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        products: dict[str, Callable[[], object]] = {"matmul": lambda: torch.matmul(left, right)}
        if self.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            products["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        flush, clock = _cache_flush(self.device), self._clock()
        rates = {}
        for name, product in products.items():
            sample(product, flush, clock, 2)
            times = self._sample(product, flush, clock, _MATMUL_CALLS).seconds
            rates[name] = 2 * size**3 / statistics.median(times)
        return rates

    # ---- memory and errors --------------------------------------------------------------------------------------

    def _peak_memory(self, case: Case, function: Loss) -> int | None:
        if self.device.type == "cuda":
            inputs = embeddings(case, self.device)
            if not self._takes_long(case):
                step(function, inputs, case.backward)  # compiles, tunes, creates library handles
                _clear_gradients(inputs)
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            step(function, inputs, case.backward)
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        if not memory.available():
            return None
        return memory.measure(case, self.memory_limit, timeout=60 + (3600 if case.slow else 4 * self.call_seconds))

    def _memory_reason(self) -> str:
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            return f"{memory.OUT_OF_MEMORY} ({total / 1e9:.0f} GB GPU)"
        return memory.OUT_OF_MEMORY

    def _errors(self, case: Case, implementation: Implementation, function: Loss) -> dict[str, float | None]:
        """Relative errors of loss and gradients against float64; None where they are not measured."""
        affordable = case.samples**2 * case.width <= _ORACLE_OPERATIONS[self.device.type]
        if not implementation.exact or not affordable:
            return {"loss_error": None, "gradient_error": None}
        inputs = embeddings(case, self.device)
        exact_loss, exact_gradients = self._exact_result(case, inputs)
        loss = step(function, inputs, case.backward)
        gradients = [z.grad for z in inputs if z.grad is not None]
        return {
            "loss_error": abs(loss.double().item() - exact_loss) / abs(exact_loss),
            "gradient_error": oracle.relative_error(gradients, exact_gradients) if case.backward else None,
        }

    def _exact_result(self, case: Case, inputs: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Loss and gradients in float64, kept in the computer's memory for the next implementation of the problem."""
        problem = replace(case, implementation="")
        if problem not in self._exact:
            loss, gradients = oracle.loss_and_gradients(case, inputs)
            self._exact[problem] = (loss, [gradient.cpu() for gradient in gradients])
            while len(self._exact) > 1 and self._exact_bytes() > _EXACT_BYTES:
                del self._exact[next(iter(self._exact))]
        return self._exact[problem]

    def _exact_bytes(self) -> int:
        return sum(gradient.nbytes for _, gradients in self._exact.values() for gradient in gradients)

    # ---- time -----------------------------------------------------------------------------------------------------

    def _time(self, case: Case, implementation: Implementation, function: Loss, sampler: Sampler) -> dict[str, Any]:
        inputs = embeddings(case, self.device)
        clock = self._clock()
        flush = _cache_flush(self.device)

        def call() -> None:
            step(function, inputs, case.backward)

        def prepare() -> None:
            _clear_gradients(inputs)
            flush()

        # The call that warms up also tells how many rounds there is time for. A long call does neither.
        rounds = 1
        if not self._takes_long(case):
            warm_up = sample(
                call, prepare, clock, 2 if implementation.compiled or self.device.type == "cuda" else 1
            ).seconds
            rounds = min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, int(self.case_seconds / warm_up[-1])))
        samples = sampler(call, prepare, clock, rounds)
        times = samples.seconds
        if case.samples >= self._last_call.get(_without_size(case), (0, 0.0))[0]:
            self._last_call[_without_size(case)] = (case.samples, min(times))
        return {
            **_summarise(times),
            "discarded_rounds": samples.discarded,
            "cpu_share": samples.cpu_share,
            "other_cpu_share": samples.other_cpu_share,
        }

    def _takes_long(self, case: Case) -> bool:
        """Whether a call takes so long that what the first one does beside its work hardly shows."""
        return case.operations() / self.matmul_rate()["matmul"] > _ONE_ROUND_ABOVE[self.device.type]

    def _row(
        self,
        case: Case,
        implementation: Implementation,
        timing: dict[str, Any],
        peak: int | None,
        errors: dict[str, float | None],
    ) -> dict[str, Any]:
        matmul = self.matmul_rate()
        operations = case.operations()
        if implementation.operations is not None:
            operations = implementation.operations * case.samples**2 * case.width
        rate = operations / timing["median"]
        return {
            **_describe(case),
            "label": implementation.label,
            "note": implementation.note,
            "device": environment.device_name(self.device),
            "device_type": self.device.type,
            "versions": environment.versions(),
            "commit": environment.commit(),
            "clock": "CPU time" if self.cpu_time else "wall" if self.device.type == "cpu" else "device",
            **timing,
            "operations": operations,
            "tflops": rate / 1e12,
            "utilisation": rate / matmul["matmul"],
            "matmul_tflops": matmul["matmul"] / 1e12,
            "matmul_dtype": str(_MATMUL_DTYPE[self.device.type]).removeprefix("torch."),
            "onednn_tflops": matmul["onednn"] / 1e12 if "onednn" in matmul else None,
            "peak_extra_bytes": peak,
            "gradient_bytes": case.gradient_bytes(),
            **errors,
        }


def step(function: Loss, inputs: Sequence[Tensor], backward: bool) -> Tensor:
    """What is measured: the loss, and its gradients if asked for."""
    if not backward:
        with torch.no_grad():
            return function(inputs)
    loss = function(inputs)
    loss.backward()
    return loss.detach()


def sample(
    call: Callable[[], object],
    prepare: Callable[[], None],
    clock: Clock,
    rounds: int,
    patience: int = 0,
    wait: Callable[[], None] = lambda: None,
) -> Samples:
    """Time a call some times, each time prepared for.

    Args:
        call: what to time.
        prepare: run before each call, untimed.
        clock: gives the time in seconds.
        rounds: number of calls.
        patience: repeat calls that other processes disturbed, up to this many times as often as there are rounds.
        wait: run after a disturbed call; may wait for calmer times.
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
        else:
            wait()
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


def _summarise(times: Sequence[float]) -> dict[str, float | int]:
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {
        "median": statistics.median(times),
        "iqr": quartiles[2] - quartiles[0],
        "fastest": min(times),
        "rounds": len(times),
    }


def _cache_flush(device: torch.device) -> Callable[[], None]:
    """Something that pushes everything out of a GPU's L2 cache; on a CPU the embeddings may stay where they are."""
    if device.type != "cuda":
        return lambda: None
    buffer = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def flush() -> None:
        buffer.zero_()

    return flush


def _clear_gradients(inputs: Sequence[Tensor]) -> None:
    for z in inputs:
        z.grad = None


def _describe(case: Case) -> dict[str, Any]:
    return {key: value for key, value in asdict(case).items() if key != "slow"}


def _without_size(case: Case) -> Case:
    return replace(case, samples=0, slow=False)


@dataclass(frozen=True)
class CpuUse:
    """Seconds since some origin: of the wall clock, of this process's threads, of all processes on all cores."""

    wall: float
    own: float
    all: float
    cores: int

    @classmethod
    def now(cls) -> CpuUse:
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


def _busy_share(seconds: float) -> float:
    """Share of all cores in use over the next moments."""
    before = CpuUse.now()
    time.sleep(seconds)
    use = CpuUse.now() - before
    return use.all / use.wall / use.cores
