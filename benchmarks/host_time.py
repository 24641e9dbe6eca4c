"""What a step of the loss costs the host: the Triton backend with its launches stubbed, no GPU needed.

    python -m benchmarks.host_time --size 1024x512

Small batches are bound by the host: a GPU waits for launches longer than it computes. Everything up to the driver's
call is real here: autograd, buffers, and the way from arguments to a compiled kernel; steps are those of a training
that has begun, which repeat the launches of the second without the plan. Kernels are never
compiled, library products do nothing, nothing is filled with zeros, sums take one row, and tensors lie in the CPU's
memory, where an allocation costs about as much as from torch's cache of GPU memory. Left out are therefore the driver's
calls (2 to 3 µs each) and the second thread, in which autograd runs the backward pass of a GPU. What is counted is the
time of the thread on the processor: other processes disturb it little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.results import commit, device_name, versions
from gapkernels import gap_loss

# What torch does without launching anything: memory, views, and what only asks.
_NO_LAUNCH = (
    "alias", "as_strided", "detach", "empty", "expand", "item", "new_empty", "permute", "reshape", "select", "slice",
    "split", "squeeze", "t.", "transpose", "unbind", "unsqueeze", "view", "_local_scalar_dense",
)  # fmt: skip


@dataclass
class HostTime:
    """Of one step, forward and backward.

    Args:
        microseconds: median of all.
        fastest: of every twentieth step at least; what a machine that others disturb is best compared by.
        forward, backward: medians of the two passes.
        launches: kernels of ours, library products and torch's own operations that launch something, in order.
        leading_up: microseconds from one launch of ours (or the step's begin) to the next, by the kernel launched then,
            all launches of a step together; ``""`` is what follows the last.
        steps: how many were timed.
    """

    microseconds: float
    fastest: float
    forward: float
    backward: float
    launches: list[str] = field(default_factory=list)
    leading_up: dict[str, float] = field(default_factory=dict)
    steps: int = 0


class _Kernel:
    """In place of a compiled one."""

    function = packed_metadata = None
    listener: Callable[[str], None] | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    def launch_metadata(self, *args: object) -> None:
        return None

    def run(self, *args: object) -> None:
        if _Kernel.listener is not None:
            _Kernel.listener(self.name)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.run


@contextlib.contextmanager
def stubbed(capability: int = 90, processors: int = 132) -> Iterator[None]:
    """Let ``backend="triton"`` take tensors on the CPU as if they were on such a GPU, and launch nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from gapkernels import backends
    from gapkernels.backends import triton as triton_backend

    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )

    def compile_(self: Any, key: str, signature: object, device: int, *rest: object) -> _Kernel:
        kernel = self.device_caches[device][0][key] = _Kernel(self.__name__)
        return kernel

    add_up = Tensor.sum

    def sum_of_a_row(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        return add_up(self[:1] if self.dim() > 1 else self, *args, **kwargs)

    properties = SimpleNamespace(multi_processor_count=processors, major=capability // 10, minor=capability % 10)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (triton.runtime.driver, "_active", driver),
            (JITFunction, "_do_compile", compile_),
            (triton_backend, "unusable_because", lambda device=None, dtype=None: None),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch, "addmm", _library_product),
            (Tensor, "addmm_", _library_product),
            (torch, "zeros", torch.empty),
            (torch, "zeros_like", torch.empty_like),
            (Tensor, "new_zeros", Tensor.new_empty),
            (Tensor, "sum", sum_of_a_row),
        ):
            stack.enter_context(patch.object(owner, name, value))
        backends._create.cache_clear()
        try:
            yield
        finally:
            backends._create.cache_clear()


def _library_product(total: Tensor, *args: object, **kwargs: object) -> Tensor:
    """In place of torch's."""
    return total


def _leading_up(step: Callable[[], object], steps: int = 200) -> dict[str, float]:
    """Microseconds from launch to launch, by kernel."""
    spent: dict[str, float] = defaultdict(float)
    last = 0.0

    def launched(name: str) -> None:
        nonlocal last
        now = time.thread_time()
        spent[name] += now - last
        last = now

    with patch.object(_Kernel, "listener", launched):
        for _ in range(steps):
            last = time.thread_time()
            step()
            spent[""] += time.thread_time() - last
    return {name: 1e6 * total / steps for name, total in spent.items()}


def _launches(step: Callable[[], object]) -> list[str]:
    """What one step launches: kernels of ours in order, then what torch does."""
    names: list[str] = []

    def noted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            names.append(name)
            return function(*args, **kwargs)

        return call

    with (
        patch.object(_Kernel, "listener", names.append),
        patch.object(torch, "addmm", noted("library product", _library_product)),
        patch.object(Tensor, "addmm_", noted("library product", _library_product)),
        patch.object(torch, "zeros", noted("torch.zeros", torch.empty)),
        patch.object(torch, "zeros_like", noted("torch.zeros_like", torch.empty_like)),
        patch.object(Tensor, "new_zeros", noted("torch.new_zeros", Tensor.new_empty)),
        torch.autograd.profiler.profile(use_kineto=False) as profile,
    ):
        step()
    of_torch = [event for event in profile.function_events if _does_launch(event)]
    names += [
        f"torch.{event.name.removeprefix('aten::')}"
        for event in of_torch
        if not any(map(_does_launch, event.cpu_children))
    ]
    return names


def _does_launch(event: Any) -> bool:
    return event.name.startswith("aten::") and not event.name.removeprefix("aten::").startswith(_NO_LAUNCH)


def measure(
    samples: int, width: int, modalities: int = 2, learn_temperature: bool = True, seconds: float = 2.0
) -> HostTime:
    """The host time of one step with all terms, in bf16.

    Args:
        samples, width: N and D.
        modalities: how many.
        learn_temperature: whether the logit scale has a gradient.
        seconds: how long to repeat the step.
    """
    embeddings = [torch.randn(samples, width).bfloat16().requires_grad_() for _ in range(modalities)]
    scale = torch.tensor(14.3, requires_grad=learn_temperature)
    leaves = [*embeddings, scale] if learn_temperature else embeddings

    def step() -> tuple[float, float, float]:
        for leaf in leaves:
            leaf.grad = None
        started = time.thread_time()
        loss = gap_loss(*embeddings, logit_scale=scale, backend="triton")
        between = time.thread_time()
        loss.backward()
        return started, between, time.thread_time()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with stubbed():
            for _ in range(20):
                step()
            times = []
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                times.append(step())
            leading_up = _leading_up(step)
            launches = _launches(step)
    finally:
        torch.set_num_threads(threads)

    def median(part: Callable[[tuple[float, float, float]], float]) -> float:
        return 1e6 * statistics.median(map(part, times))

    return HostTime(
        microseconds=median(lambda t: t[2] - t[0]),
        fastest=1e6 * sorted(t[2] - t[0] for t in times)[len(times) // 20],
        forward=median(lambda t: t[1] - t[0]),
        backward=median(lambda t: t[2] - t[1]),
        launches=launches,
        leading_up=leading_up,
        steps=len(times),
    )


def described(found: HostTime) -> str:
    """As a table."""
    lines = [
        f"{found.microseconds:.0f} µs a step ({found.forward:.0f} forward, {found.backward:.0f} backward; "
        f"the fastest {found.fastest:.0f}), "
        f"{sum(not name.startswith('torch.') for name in found.launches)} launches and "
        f"{sum(name.startswith('torch.') for name in found.launches)} by torch, median of {found.steps}",
        "",
        f"{'launched':34} {'times':>5} {'µs until then':>14}",
    ]
    for name in dict.fromkeys(found.launches):
        until = f"{found.leading_up[name]:14.1f}" if name in found.leading_up else ""
        lines.append(f"{name:34} {found.launches.count(name):5} {until}".rstrip())
    lines.append(f"{'after the last':34} {'':5} {found.leading_up['']:14.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="1024x512", help="N×D")
    parser.add_argument("--modalities", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to repeat the step")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    samples, width = map(int, options.size.split("x"))
    found = measure(samples, width, options.modalities, seconds=options.seconds)
    print(described(found))
    if options.out is not None:
        content = {
            "device": device_name(torch.device("cpu")),
            "versions": versions(),
            "commit": commit(),
            "datetime": datetime.now(timezone.utc).isoformat(),
            "samples": samples,
            "width": width,
            "modalities": options.modalities,
            "host_time": asdict(found),
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
