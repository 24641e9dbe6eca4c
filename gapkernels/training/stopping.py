"""A request to end (SIGTERM), which a training grants behind its current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from gapkernels.training.processes import Processes


class StopRequest:
    """Waits for SIGTERM while the block lasts: schedulers send it before they take a machine away.

    With several processes the signal may reach each in another step. They agree without waiting for each other: what
    one has seen by a step all know behind the next, and they stop there together.

    Args:
        processes: that train together.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._received = False
        self._exchange: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> StopRequest:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def reached(self) -> bool:
        """Tell whether to stop here; every process asks behind each step and gets the same answer."""
        if self._processes.size == 1:
            return self._received
        earlier, received = self._exchange, torch.tensor([float(self._received)])
        self._exchange = dist.all_reduce(received, dist.ReduceOp.MAX, async_op=True), received
        if earlier is None:
            return False
        work, seen = earlier
        work.wait()
        return bool(seen)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._exchange is not None and error is None:
            self._exchange[0].wait()
