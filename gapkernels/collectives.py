"""Collectives that autograd and torch.compile know; over one process alone they cost nothing.

Their gradients are those of the sum over the processes of whatever each makes of its result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gapkernels.distributed import world_of
from gapkernels.ops import library

library.define("gather_rows(Tensor x, str group, int world_size) -> Tensor")
library.define("sum_own_rows(Tensor x, str group, int world_size) -> Tensor")
library.define("sum_over_processes(Tensor x, str group) -> Tensor")
library.define("mean_over_processes(Tensor x, str group, int world_size) -> Tensor")
library.define("mean_of_gradients(Tensor x, str group, int world_size) -> Tensor")


def gather_rows(x: Tensor, group: str, world_size: int) -> Tensor:
    """Concatenate the ``[n, ...]`` of every process to ``[N, ...]``."""
    return x if world_size == 1 else torch.ops.gapkernels.gather_rows(x, group, world_size)


def sum_over_processes(x: Tensor, group: str, world_size: int) -> Tensor:
    return x if world_size == 1 else torch.ops.gapkernels.sum_over_processes(x, group)


def mean_over_processes(x: Tensor, group: str, world_size: int) -> Tensor:
    """The mean, whose gradient every process gives to its own part whole.

    The mean over processes of the gradients behind it, which DistributedDataParallel takes, is then that of the mean.
    """
    return x if world_size == 1 else torch.ops.gapkernels.mean_over_processes(x, group, world_size)


def mean_of_gradients(x: Tensor, group: str, world_size: int) -> Tensor:
    """A number that all processes share: unchanged, and its gradient is the mean over the processes on each of them."""
    return x if world_size == 1 else torch.ops.gapkernels.mean_of_gradients(x, group, world_size)


def _sum_own_rows_shape(x: Tensor, _: str, world_size: int) -> Tensor:
    return x.new_empty(x.shape[0] // world_size, *x.shape[1:])


def _keep_how(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.how = inputs[1:]


_ops = torch.ops.gapkernels
for _name, _forward, _fake, _gradient in (
    (
        "gather_rows",
        lambda x, group, _: world_of(group).gather_rows(x),
        lambda x, _, world_size: x.new_empty(x.shape[0] * world_size, *x.shape[1:]),
        lambda grad, how: _ops.sum_own_rows(grad, *how),
    ),
    (
        "sum_own_rows",
        lambda x, group, _: world_of(group).sum_own_rows(x),
        _sum_own_rows_shape,
        lambda grad, how: _ops.gather_rows(grad, *how),
    ),
    (
        "sum_over_processes",
        lambda x, group: world_of(group).sum(x),
        lambda x, _: torch.empty_like(x),
        lambda grad, how: _ops.sum_over_processes(grad, *how),
    ),
    (
        "mean_over_processes",
        lambda x, group, world_size: world_of(group).sum(x) / world_size,
        lambda x, *_: torch.empty_like(x),
        lambda grad, _: grad,
    ),
    (
        "mean_of_gradients",
        lambda x, *_: x.clone(),
        lambda x, *_: torch.empty_like(x),
        lambda grad, how: _ops.mean_over_processes(grad, *how),
    ),
):

    def _differentiate(ctx: Any, grad: Tensor, gradient: Any = _gradient) -> tuple[Any, ...]:
        return gradient(grad, ctx.how), *(None,) * len(ctx.how)

    library.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gapkernels::{_name}", _fake, lib=library)
    torch.library.register_autograd(f"gapkernels::{_name}", _differentiate, setup_context=_keep_how, lib=library)
