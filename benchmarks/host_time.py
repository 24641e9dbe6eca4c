"""What a step of the loss costs the host: the Triton backend with its launches stubbed, no GPU needed.

    python -m benchmarks.host_time --size 1024x512

Small batches are bound by the host: a GPU waits for launches longer than it computes. Everything up to the driver's call
is real here: autograd, the plan, buffers, and Triton's way from arguments to a compiled kernel. The kernels are never
compiled, library products do nothing, and tensors lie in the CPU's memory, where an allocation costs about as much as from
torch's cache of GPU memory. Left out are therefore the driver's calls (2 to 3 µs each) and the thread in which autograd runs
the backward pass of a GPU.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gapkernels import gap_loss

# What torch does without launching anything: memory, views, and what only asks.
_NO_LAUNCH = ("empty", "view", "slice", "select", "expand", "as_strided", "detach", "split", "alias", "transpose", "t.", "permute", "unbind", "unsqueeze", "squeeze", "reshape", "resize", "set_", "lift_fresh")  # fmt: skip


@dataclass
class HostTime:
    """Of one step, forward and backward.

    Args:
        microseconds: median of all.
        forward, backward: medians of the two passes.
        launches: kernels of ours, library products and torch's own operations that launch something, in order.
        in_launches: microseconds from a launcher's call until the driver would be called, by kernel, all calls together.
        steps: how many were timed.
    """

    microseconds: float
    forward: float
    backward: float
    launches: list[str] = field(default_factory=list)
    in_launches: dict[str, float] = field(default_factory=dict)
    steps: int = 0


class _Kernel:
    """In place of a compiled one."""

    function = packed_metadata = None
    metadata = SimpleNamespace(shared=0)

    def launch_metadata(self, *args: object) -> None:
        return None

    def run(self, *args: object) -> None:
        return None

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
        kernel = self.device_caches[device][0][key] = _Kernel()
        return kernel

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


@contextlib.contextmanager
def _recorded(launches: list[str], seconds: dict[str, float]) -> Iterator[None]:
    """Note each launch, and the time from the launcher's call until the driver would be called."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def timed(self: Any, *args: object, **kwargs: object) -> object:
        started = time.perf_counter()
        result = run(self, *args, **kwargs)
        seconds[self.__name__] += time.perf_counter() - started
        launches.append(self.__name__)
        return result

    def product(total: Tensor, *args: object, **kwargs: object) -> Tensor:
        launches.append("library product")
        return total

    with (
        patch.object(JITFunction, "run", timed),
        patch.object(torch, "addmm", product),
        patch.object(Tensor, "addmm_", product),
    ):
        yield


class _TorchOperations(TorchDispatchMode):
    """Notes what torch itself would launch."""

    def __init__(self, launches: list[str]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.__module__, str(func).removeprefix("aten.")
        if func.namespace == "aten" and not name.startswith(_NO_LAUNCH) and not name.startswith(("_to_copy", "item")):
            self._launches.append(f"torch.{name.split('.')[0]}")
        del namespace
        return func(*args, **(kwargs or {}))


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
        started = time.perf_counter()
        loss = gap_loss(*embeddings, logit_scale=scale, backend="triton")
        between = time.perf_counter()
        loss.backward()
        return started, between, time.perf_counter()

    launches: list[str] = []
    spent: dict[str, float] = defaultdict(float)
    with stubbed():
        for _ in range(20):
            step()
        times = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            times.append(step())
        with _recorded(launches, spent):
            for _ in range(100):
                step()
        per_launch = {name: 1e6 * total / 100 for name, total in spent.items()}
        launches.clear()
        with _recorded(launches, spent), _TorchOperations(launches):
            step()

    def median(part: Callable[[tuple[float, float, float]], float]) -> float:
        return 1e6 * statistics.median(map(part, times))

    return HostTime(
        microseconds=median(lambda t: t[2] - t[0]),
        forward=median(lambda t: t[1] - t[0]),
        backward=median(lambda t: t[2] - t[1]),
        launches=launches,
        in_launches=per_launch,
        steps=len(times),
    )


def described(found: HostTime) -> str:
    """As a table."""
    lines = [
        f"{found.microseconds:.0f} µs a step ({found.forward:.0f} forward, {found.backward:.0f} backward), "
        f"{len(found.launches)} launches, median of {found.steps}",
        "",
        f"{'launched':34} {'times':>5} {'µs':>7}",
    ]
    for name in dict.fromkeys(found.launches):
        inside = f"{found.in_launches[name]:7.1f}" if name in found.in_launches else f"{'':7}"
        lines.append(f"{name:34} {found.launches.count(name):5} {inside}")
    rest = found.microseconds - sum(found.in_launches.values())
    lines.append(f"{'everything else':34} {'':5} {rest:7.1f}")
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
        options.out.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
