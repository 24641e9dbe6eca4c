"""The one way in which everything is timed, and what every measured row carries.

Times are the device's own: CUDA events around each call, with the L2 cache overwritten before it; a monotonic clock on
a CPU. On a GPU steps back to back are timed as well, whose launches hide behind the step before, as in training. A row
also has the rate of a large ``torch.matmul`` of the same process, which is the yardstick for utilisation.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import memory, options, oracle, results
from benchmarks.cases import Case, option_of
from benchmarks.implementations import IMPLEMENTATIONS, LOGIT_SCALE, Implementation, Unavailable
from benchmarks.timing import Clock, Sampler, Samples, cache_flush, clock_of, sample, summarise
from benchmarks.workload import Loss, clear_gradients, embeddings, step

_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
_MATMUL_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
_MATMUL_CALLS = 7
_MATMUL_VALID_SECONDS = 60.0  # a shared machine changes its speed
_MOST_ROUNDS = 40
_FEWEST_ROUNDS = 3
_BACK_TO_BACK_RUNS = 3
_ONE_ROUND_ABOVE = {"cpu": 10.0, "cuda": 1.5}  # seconds that the products alone would take at the yardstick's rate
_MOST_HANGS = 2
_EXACT_BYTES = 2**31  # of exact gradients kept for the other implementations of a problem
_ORACLE_OPERATIONS = {"cpu": 8192**2 * 512, "cuda": 65536**2 * 768}  # N²D up to which float64 is affordable
_DENSE_ORACLE_SAMPLES = 2048  # likewise N for options, whose definition is dense


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
        setting: of the environment that the kernels are measured under, named in rows and skipped cases beside the
            implementation; "" for what users get.
        patience: repeat calls that other processes disturbed, up to this many times as often as calls are needed.
        memory_limit: most bytes a process may have in a measurement of memory; on a CPU only. 0: 60 % of what is free.
        matmul_size: rows and columns of the yardstick's operands. 0: enough for full speed.
    """

    device: torch.device
    case_seconds: float = 5.0
    call_seconds: float = 60.0
    setting: str = ""
    patience: int = 0
    memory_limit: int = 0
    matmul_size: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    _matmul: dict[str, float] = field(default_factory=dict)
    _matmul_at: float = -math.inf
    _last_call: dict[Case, tuple[int, float]] = field(default_factory=dict)
    _out_of_memory: dict[Case, int] = field(default_factory=dict)
    _exact: dict[Case, tuple[float, list[Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.memory_limit:
            self.memory_limit = memory.available_bytes() * 6 // 10
        if not self.matmul_size:
            self.matmul_size = _MATMUL_SIZE[self.device.type]

    def measure(self, case: Case, sampler: Sampler | None = None) -> dict[str, Any]:
        """Measure a case.

        Args:
            case: what to measure.
            sampler: how to collect the times of one call; None for the session's own way.

        Returns:
            The row, in types that JSON knows.

        Raises:
            Skipped: there is no row; it is remembered in ``skipped``.
        """
        try:
            return self._measure(case, sampler or self._sample)
        except Skipped as skipped:
            self.give_up(case, skipped)
            raise
        finally:
            gc.collect()
            if self.device.type == "cuda":
                # After an error that leaves the device unusable this fails as well, and has nothing new to say.
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()

    def describe(self, case: Case) -> dict[str, Any]:
        """A case with its label, in types that JSON knows."""
        facts = {**asdict(case), "label": IMPLEMENTATIONS[case.implementation].label}
        del facts["slow"]
        if self.setting:
            facts["implementation"] += f":{self.setting}"
            facts["label"] += f", {self.setting}"
        return facts

    def describe_skip(self, case: Case, why: Skipped) -> dict[str, Any]:
        """A case without a row, likewise."""
        return {**self.describe(case), "kind": why.kind, "reason": why.reason}

    def give_up(self, case: Case, why: Skipped) -> None:
        """Remember a case without a row."""
        self.skipped.append(self.describe_skip(case, why))

    def matmul_rate(self) -> dict[str, float]:
        """Operations per second of a large product by ``torch.matmul``, and on a CPU by oneDNN.

        Measured again now and then: the best so far counts, as whatever disturbs it makes it slower.
        """
        if time.monotonic() - self._matmul_at > _MATMUL_VALID_SECONDS:
            for name, rate in self.measure_matmul().items():
                self._matmul[name] = max(rate, self._matmul.get(name, 0.0))
            self._matmul_at = time.monotonic()
        return self._matmul

    def remember(self, row: Mapping[str, Any]) -> None:
        """Learn from an earlier run how long a call takes."""
        case = Case(**{field.name: row[field.name] for field in fields(Case) if field.name in row})
        samples, _ = self._last_call.get(_without_size(case), (0, 0.0))
        if case.samples > samples:
            self._last_call[_without_size(case)] = (case.samples, row["fastest"])

    def _measure(self, case: Case, sampler: Sampler) -> dict[str, Any]:
        implementation = IMPLEMENTATIONS[case.implementation]
        try:
            function = implementation.function(case, self.device)
        except Unavailable as error:
            raise Skipped("missing", str(error)) from error
        self._refuse_hopeless(case)
        try:
            peak = self._peak_memory(case, function)
            errors = self._errors(case, implementation, function)
            times = self._time(case, implementation, function, sampler)
            return self._row(case, implementation, times, peak, errors)
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

        An implementation that has hung twice is not tried again: it would take the others' time.
        """
        asked = (self.describe(case)["implementation"], "hung")
        hung = [entry for entry in self.skipped if (entry["implementation"], entry["kind"]) == asked]
        if len(hung) >= _MOST_HANGS:
            raise Skipped("hung", f"not tried: {len(hung)} other cases gave no answer")
        if case.samples > self._out_of_memory.get(_without_size(case), case.samples):
            raise Skipped("memory", f"out of memory at N = {self._out_of_memory[_without_size(case)]} already")
        samples, seconds = self._last_call.get(_without_size(case), (case.samples, 0.0))
        expected = seconds * (case.samples / samples) ** 2
        if case.samples > samples and expected > self.call_seconds and not case.slow:
            raise Skipped("time", f"a call would take about {expected:.0f} s (N = {samples}: {seconds:.1f} s)")

    def _sample(self, call: Callable[[], object], prepare: Callable[[], None], clock: Clock, rounds: int) -> Samples:
        return sample(call, prepare, clock, rounds, self.patience)

    def measure_matmul(self) -> dict[str, float]:
        """The rates of `matmul_rate` at this moment, whatever was measured before."""
        size, dtype = self.matmul_size, _MATMUL_DTYPE[self.device.type]
        left, right = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        products: dict[str, Callable[[], object]] = {"matmul": lambda: torch.matmul(left, right)}
        if self.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            products["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        flush, clock = cache_flush(self.device), clock_of(self.device)
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
                clear_gradients(inputs)
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
        if option_of(case.loss):
            affordable = case.samples <= _DENSE_ORACLE_SAMPLES
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
            if option_of(case.loss):
                loss, gradients = options.exact(inputs, LOGIT_SCALE, case, case.backward)
            else:
                loss, gradients = oracle.loss_and_gradients(inputs, LOGIT_SCALE, case.loss, case.backward)
            self._exact[problem] = (loss, [gradient.cpu() for gradient in gradients])
            while len(self._exact) > 1 and self._exact_bytes() > _EXACT_BYTES:
                del self._exact[next(iter(self._exact))]
        return self._exact[problem]

    def _exact_bytes(self) -> int:
        return sum(gradient.nbytes for _, gradients in self._exact.values() for gradient in gradients)

    # ---- time -----------------------------------------------------------------------------------------------------

    def _time(self, case: Case, implementation: Implementation, function: Loss, sampler: Sampler) -> dict[str, Any]:
        inputs = embeddings(case, self.device)
        clock = clock_of(self.device)
        flush = cache_flush(self.device)

        def call() -> None:
            step(function, inputs, case.backward)

        def prepare() -> None:
            clear_gradients(inputs)
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
        return {**timing(samples), "back_to_back": self._back_to_back(case, function, inputs, rounds)}

    def _back_to_back(self, case: Case, function: Loss, inputs: Sequence[Tensor], steps: int) -> float | None:
        """Seconds per step, median of some runs of steps with nothing in between; None on a CPU, which has no queue."""
        if self.device.type != "cuda":
            return None
        clock, seconds = clock_of(self.device), []
        for _ in range(_BACK_TO_BACK_RUNS):
            start = clock()
            for _ in range(steps):
                clear_gradients(inputs)
                step(function, inputs, case.backward)
            seconds.append((clock() - start) / steps)
        return statistics.median(seconds)

    def _takes_long(self, case: Case) -> bool:
        """Whether a call takes so long that what the first one does beside its work hardly shows."""
        return case.operations() / self.matmul_rate()["matmul"] > _ONE_ROUND_ABOVE[self.device.type]

    def _row(
        self,
        case: Case,
        implementation: Implementation,
        times: dict[str, Any],
        peak: int | None,
        errors: dict[str, float | None],
    ) -> dict[str, Any]:
        matmul = self.matmul_rate()
        operations = case.operations()
        if implementation.operations is not None:
            operations = implementation.operations * case.samples**2 * case.width
        row = {
            **self.describe(case),
            "note": implementation.note,
            "device": results.device_name(self.device),
            "device_type": self.device.type,
            "versions": results.versions(),
            "commit": results.commit(),
            "clock": "wall" if self.device.type == "cpu" else "device",
            **times,
            "operations": operations,
            "matmul_tflops": matmul["matmul"] / 1e12,
            "matmul_dtype": str(_MATMUL_DTYPE[self.device.type]).removeprefix("torch."),
            "onednn_tflops": matmul["onednn"] / 1e12 if "onednn" in matmul else None,
            "peak_extra_bytes": peak,
            "gradient_bytes": case.gradient_bytes(),
            **errors,
        }
        return {**row, **_rates(row)}


def with_turns(
    row: Mapping[str, Any], turns: Sequence[Samples], matmul: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """A row whose times are those of several turns, taken between those of other implementations of its problem.

    Its yardstick took turns with it, so the medians of both are compared and not the best that one of them met.
    """
    together = Samples(
        [seconds for samples in turns for seconds in samples.seconds],
        statistics.mean(samples.cpu_share for samples in turns),
        statistics.mean(samples.other_cpu_share for samples in turns),
        sum(samples.discarded for samples in turns),
    )
    yardstick = {f"{name}_tflops": statistics.median(rates[name] for rates in matmul) / 1e12 for name in matmul[0]}
    row = {**row, **timing(together), **yardstick, "turns": len(turns)}
    return {**row, **_rates(row)}


def timing(samples: Samples) -> dict[str, Any]:
    """What a row says of the times of its calls."""
    return {
        **summarise(samples.seconds),
        "discarded_rounds": samples.discarded,
        "cpu_share": samples.cpu_share,
        "other_cpu_share": samples.other_cpu_share,
    }


def _rates(row: Mapping[str, Any]) -> dict[str, float]:
    rate = row["operations"] / row["median"]
    return {"tflops": rate / 1e12, "utilisation": rate / row["matmul_tflops"] / 1e12}


def _without_size(case: Case) -> Case:
    return replace(case, samples=0, slow=False)
