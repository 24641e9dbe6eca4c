"""The processes that train one model together: what torchrun starts, each with a part of every batch.

The first process alone writes files, prints and draws bars. Whatever could fail on one process only (reading data,
taking the lock of a folder) is done through `everywhere` or `on_first`, so that all end with one message instead of
waiting for the one that has gone.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gapkernels.errors import SharedError, UserError, printable
from gapkernels.training.device import choose_device

Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others; the first one scores the test split meanwhile."""

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """This process among those of a training, and the device it trains on.

    Args:
        device: of this process.
        rank: of this process, 0 for the first.
        size: how many there are.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and draws."""
        return self.rank == 0

    @property
    def group(self) -> str | None:
        """What the loss is told of the processes."""
        return "world" if self.size > 1 else None

    def part(self, samples: Tensor) -> Tensor:
        """Return this process's samples of a batch, whose size the number of processes divides."""
        return samples.chunk(self.size)[self.rank]

    def on_first(self, call: Callable[[], Result]) -> Result:
        """Run something on the first process only, and return its result on all.

        Raises:
            SharedError: on every process, if the call raises a `UserError` there.
        """
        if self.size == 1:
            return call()
        outcome: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.is_first:
            try:
                outcome[0] = call()
            except Exception as error:
                failure, outcome = error, [None, _describe(error)]
        dist.broadcast_object_list(outcome, src=0)
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        if outcome[1] is not None:
            raise SharedError(outcome[1]) from failure
        return outcome[0]

    def everywhere(self, call: Callable[[], Result]) -> Result:
        """Run something without communication on every process.

        Raises:
            SharedError: on every process, if the call fails on any; names the process if it is not the first.
        """
        if self.size == 1:
            return call()
        result, failure = None, None
        try:
            result = call()
        except Exception as error:
            failure = error
        failures: list[Any] = [None] * self.size
        dist.all_gather_object(failures, None if failure is None else _describe(failure))
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        for rank, message in enumerate(failures):
            if message is not None:
                raise SharedError(message if rank == 0 else f"process {rank}: {message}") from failure
        return result  # type: ignore[return-value]

    def require_same(self, what: str, value: Any) -> None:
        """Raise on every process unless all have one value."""
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise SharedError(f"{what} must be the same on every process, and process {rank} has another than 0")

    def gather_rows(self, own: Tensor, total: int) -> Tensor:
        """Concatenate rows of all processes, of which the last may have fewer or none: `[total, ...]` on the CPU."""
        if self.size == 1:
            return own.cpu()
        most = -(-total // self.size)
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)[:total].cpu()

    def average(self, tensors: list[Tensor]) -> None:
        """Replace floating tensors by their means over the processes, one exchange for all of one type."""
        if self.size == 1:
            return
        for dtype in sorted({t.dtype for t in tensors if t.is_floating_point()}, key=str):
            alike = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in alike])
            dist.all_reduce(flat)
            for tensor, mean in zip(alike, (flat / self.size).split([t.numel() for t in alike]), strict=True):
                tensor.copy_(mean.view_as(tensor))


def mean_of_each_parameter(state, bucket):  # DDP compares annotations, as text too
    """Average gradients over the processes one parameter at a time, as a hook of `DistributedDataParallel`.

    Parameters that travel together change places after the first step, of a resumed run too, and with their places the
    order in which three and more processes are summed. One at a time, each keeps its own.

    Args:
        state: what the hook was registered with.
        bucket: `torch.distributed.GradBucket`.

    Returns:
        Future of the means, `torch.futures.Future[Tensor]`.
    """
    gradients = bucket.buffer().div_(dist.get_world_size())
    arriving = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(arriving).then(lambda _: gradients)


@contextmanager
def training_processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun has started, if it has; inside a block of this kind, return the same ones.

    NCCL connects GPUs, one for each process; gloo connects CPUs.

    Args:
        device: `auto`, or anything `torch.device` takes; of several processes each takes the GPU of its number.

    Raises:
        UserError: there is no such device here, or another process has gone while this one waited for it.
    """
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        yield Processes(choose_device(device, size), rank, size)
        return
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield Processes(choose_device(device))
        return
    missing = [name for name in _LAUNCHER if name not in os.environ]
    if missing or not dist.is_available():
        what = f"{', '.join(missing)} not set" if missing else "this torch has no torch.distributed"
        raise UserError(f"WORLD_SIZE is {size}, but {what}: start several processes with torchrun")
    own = choose_device(device, size)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=TIMEOUT)
    rank = dist.get_rank()
    try:
        yield Processes(own, rank, size)
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise UserError(
            f"process {rank} of {size} waited for another one that has ended or no longer answers "
            f"({printable(str(error).partition(chr(10))[0])}); the message of that one says why. The same command goes "
            "on from the last checkpoint"
        ) from error
    # A wrapped model that outlived the group would end gloo's threads under Python's lock, for which they may wait; it
    # holds references in a circle.
    gc.collect()
    dist.destroy_process_group()  # after an error the others may not answer


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def _describe(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text.partition(chr(10))[0]}"
