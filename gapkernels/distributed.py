"""The batch as several processes hold it: what the loss needs from ``torch.distributed``, and nothing more.

Every process holds ``n`` of the ``N = n·W`` rows, in rank order. A process gathers the modality that other processes'
rows are compared with, computes its own ``n×N`` blocks and sums what belongs to columns over the processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NEEDS_GRAD = "inputs that require grad (embeddings in order, then the logit scale)"
STEP_SCALARS = ("logit scale", "nce_weight", "atp_weight", "cu_weight", "uniformity_t")

# Their old names warn from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class World:
    """A single process: gathering and summing over it changes nothing."""

    rank = 0
    size = 1

    def agree(self, description: Mapping[str, float], scalars: Sequence[Tensor] = ()) -> None:
        """Raise on every process if the processes evaluate different things."""

    def gather_rows(self, x: Tensor) -> Tensor:
        """Concatenate the ``[n, ...]`` of every process to ``[N, ...]``."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def sum_own_rows(self, x: Tensor) -> Tensor:
        """Sum ``[N, ...]`` over the processes and return this process's ``[n, ...]``."""
        return x


class ProcessGroupWorld(World):
    """The processes of one ``torch.distributed`` group."""

    _agreed: ClassVar[set[tuple[Any, ...]]] = set()

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def agree(self, description: Mapping[str, float], scalars: Sequence[Tensor] = ()) -> None:
        """Raise on every process if the processes evaluate different things, which would hang or be silently wrong.

        Every call exchanges a few numbers. On a GPU reading them would wait for the device, so there they are looked at
        only when this process describes something that it has not described before.

        Args:
            description: name and number, the same names on every process.
            scalars: what may change from step to step, on the device of the embeddings.

        Raises:
            ValueError: names what differs, with every process's value.
        """
        names = [*description, *STEP_SCALARS]
        device = scalars[0].device
        numbers = torch.tensor(list(description.values()), dtype=torch.float64, device=device)
        own = torch.cat([numbers, *(s.detach().double().reshape(-1) for s in scalars)])
        everyone = self.gather_rows(own[None])
        key = (self._group.group_name, *description.items())
        if device.type != "cpu" and key in self._agreed:
            return
        self._agreed.add(key)
        values = everyone.cpu()
        rows = values[:, 0].long().tolist()
        if min(rows) != max(rows):
            raise ValueError(
                f"every process of `group` must hold the same number of rows, got {min(rows)} to {max(rows)} "
                f"(rank {self.rank} holds {rows[self.rank]}); drop the last incomplete batch "
                "(DataLoader(drop_last=True))"
            )
        for name, column in zip(names, values.T.tolist(), strict=True):
            if any(value != column[0] and not (value != value and column[0] != column[0]) for value in column):
                each = ", ".join(f"rank {rank} has {_spelled(name, value)}" for rank, value in enumerate(column))
                raise ValueError(f"every process of `group` must call the loss with the same {name}: {each}")

    def gather_rows(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _all_gather(out, x.contiguous(), group=self._group)
        return out

    def sum(self, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out, dist.ReduceOp.SUM, group=self._group)
        return out

    def max(self, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out, dist.ReduceOp.MAX, group=self._group)
        return out

    def sum_own_rows(self, x: Tensor) -> Tensor:
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        _reduce_scatter(out, x.contiguous(), dist.ReduceOp.SUM, group=self._group)
        return out


def _spelled(name: str, value: float) -> str:
    if name == "dtype":
        return str(DTYPES[int(value)]).removeprefix("torch.")
    if name == NEEDS_GRAD:
        return str([place for place in range(int(value).bit_length()) if int(value) >> place & 1])
    return f"{value:g}" if value != int(value) else str(int(value))


def world_of(group_name: str) -> World:
    """The processes of the group registered under ``group_name``; the empty name means this process alone."""
    if not group_name:
        return World()
    return ProcessGroupWorld(dist.distributed_c10d._resolve_process_group(group_name))  # type: ignore[arg-type]


def group_name_and_size(group: dist.ProcessGroup | str | None) -> tuple[str, int]:
    """How operators name a group (the empty name is this process alone), and its number of processes.

    Args:
        group: a process group, None, or ``"world"``: all processes there are when this is called.

    Raises:
        ValueError: the text is another, or this process is not a member of the group.
        TypeError: it is nothing of that.
    """
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f"`group` must be a process group, 'world' or None, got {group!r}")
        if not (dist.is_available() and dist.is_initialized()):
            return "", 1
        group = dist.group.WORLD
    if group is None:
        return "", 1
    if isinstance(group, int):  # what torch.distributed.new_group returns to processes outside
        raise ValueError(
            f"`group` must have this process as a member: rank {dist.get_rank()} is not in it; call the loss on the "
            "processes that torch.distributed.new_group was given"
        )
    if not hasattr(group, "group_name"):
        raise TypeError(
            f"`group` must be a torch.distributed process group, 'world' or None, got {type(group).__name__}"
        )
    return group.group_name, dist.get_world_size(group)


def triangle_blocks(rank: int, size: int, rows: int) -> list[tuple[slice, slice]]:
    """The blocks of the upper triangle of a symmetric ``[N, N]`` matrix that one of ``size`` processes computes.

    The triangle is dealt out evenly and each unordered pair of rows is in exactly one block of one process: process r
    takes its own diagonal block (rows equal columns: only the part above the diagonal counts) and the blocks
    (r, r+1), (r, r+2), … half way around the circle of processes. With an even number of processes the opposite
    block belongs to two of them; each takes half of it.

    Args:
        rank: this process, 0 ≤ rank < size.
        size: number of processes W.
        rows: rows per process n = N/W.

    Returns:
        ``(row slice, column slice)`` pairs into ``[0, N)``; the first is the diagonal block.
    """

    def shard(r: int, start: int = 0, stop: int = rows) -> slice:
        return slice(r % size * rows + start, r % size * rows + stop)

    blocks = [(shard(rank), shard(rank))]
    blocks += [(shard(rank), shard(rank + k)) for k in range(1, (size + 1) // 2)]
    if size % 2 == 0:
        opposite = rank + size // 2
        if rank < size // 2:
            blocks.append((shard(rank, 0, rows // 2), shard(opposite)))
        else:
            blocks.append((shard(rank), shard(opposite, rows // 2, rows)))
    return blocks
