"""The batch as several processes hold it: what the loss needs from ``torch.distributed``, and nothing more.

Every process holds ``n`` of the ``N = n·W`` rows, in rank order. A process gathers the modality that other processes'
rows are compared with, computes its own ``n×N`` blocks and sums what belongs to columns over the processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class World:
    """A single process: gathering and summing over it changes nothing."""

    rank = 0
    size = 1

    def check_equal_shards(self, rows: int, device: torch.device) -> None:
        """Raise on every process if the processes hold different numbers of rows."""

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

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def check_equal_shards(self, rows: int, device: torch.device) -> None:
        bounds = torch.tensor([rows, -rows], device=device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self._group)
        largest, smallest = bounds[0].item(), -bounds[1].item()
        if largest != smallest:
            raise ValueError(
                f"every process of `group` must hold the same number of rows, got {smallest} to {largest} "
                f"(rank {self.rank} holds {rows}); drop the last incomplete batch (DataLoader(drop_last=True))"
            )

    def gather_rows(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=self._group)
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
        dist.reduce_scatter_tensor(out, x.contiguous(), dist.ReduceOp.SUM, group=self._group)
        return out


def world_of(group_name: str) -> World:
    """The processes of the group registered under ``group_name``; the empty name means this process alone."""
    if not group_name:
        return World()
    return ProcessGroupWorld(dist.distributed_c10d._resolve_process_group(group_name))  # type: ignore[arg-type]


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
