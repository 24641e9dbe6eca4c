"""Collectives that autograd and torch.compile know; over one process alone most of them cost nothing.

Their gradients are those of the sum over the processes of whatever each makes of its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gapkernels.blocks import circulate, own_rows
from gapkernels.distributed import complete, world_of
from gapkernels.ops import library

library.define("gather_rows(Tensor x, str group, int world_size) -> Tensor")
library.define("sum_own_rows(Tensor x, str group, int world_size) -> Tensor")
library.define("sum_over_processes(Tensor x, str group) -> Tensor")
library.define("mean_over_processes(Tensor x, str group, int world_size) -> Tensor")
library.define("mean_of_gradients(Tensor x, str group, int world_size) -> Tensor")
library.define("agreed(Tensor x, Tensor[] scalars, float[] numbers, str group, int world_size) -> Tensor")
library.define("own_part(Tensor x, str group, int world_size) -> Tensor")
library.define("mean_of_equal_ids(Tensor x, Tensor place, Tensor size, str group) -> Tensor")


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


def agreed(
    x: Tensor, scalars: Sequence[Tensor], description: Mapping[str, float], group: str, world_size: int
) -> Tensor:
    """``mean_of_gradients``, and before that the processes compare what they are about to evaluate.

    Args:
        x: a number that all processes share.
        scalars, description: as for ``gapkernels.distributed.World.agree``.
        group, world_size: the processes.
    """
    if world_size == 1:
        return x
    numbers = list(map(float, complete(description).values()))
    return torch.ops.gapkernels.agreed(x, list(scalars), numbers, group, world_size)


def own_part(x: Tensor, group: str, world_size: int) -> Tensor:
    """This process's ``[n, ...]`` of the ``[N, ...]`` of all, without gradient."""
    return x if world_size == 1 else torch.ops.gapkernels.own_part(x, group, world_size)


def mean_of_equal_ids(x: Tensor, place: Tensor, size: Tensor, group: str) -> Tensor:
    """For each own row the mean of the rows of its class over all processes, ``[n, D]``, in O(n·D) memory if they
    circulate.

    Args:
        x: ``[n, D]``, the own rows.
        place: ``[N]`` int64, a number below N for each row of all processes, equal within a class.
        size: ``[n]``, how many rows the class of each own one has, in the type of ``x``.
        group: the processes.
    """
    return torch.ops.gapkernels.mean_of_equal_ids(x, place, size, group)


def _mean_of_equal_ids(x: Tensor, place: Tensor, size: Tensor, group: str) -> Tensor:
    world = world_of(group)
    count, total = x.shape[0], place.shape[0]
    own = own_rows(place, world)
    # Where the sum of a class goes: to the place of one of its own rows; of those that have none, behind them all.
    slot = place.new_full((total,), -1).scatter_reduce(0, own, torch.arange(count, device=x.device), "amax")
    slot = torch.where(slot < 0, count, slot)
    sums = x.new_zeros(count + 1, x.shape[1])
    if circulate(x.nbytes * world.size, world):
        for owner, (rows,) in world.circulate([x], world.size):
            sums.index_add_(0, slot[place[owner * count : (owner + 1) * count]], rows)
    else:
        sums.index_add_(0, slot[place], world.gather_rows(x))
    return sums[slot[own]] / size[:, None]


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


library.impl("own_part", lambda x, group, _: own_rows(x, world_of(group)).clone(), "CompositeExplicitAutograd")
torch.library.register_fake("gapkernels::own_part", _sum_own_rows_shape, lib=library)


def _agree(x: Tensor, scalars: list[Tensor], numbers: list[float], group: str, _: int) -> Tensor:
    world_of(group).agree(dict(zip(complete({}), numbers, strict=True)), scalars)
    return x.clone()


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.how, ctx.scalars = inputs[3:], len(inputs[1])


def _differentiate_agreed(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _ops.mean_over_processes(grad, *ctx.how), [None] * ctx.scalars, None, None, None


def _keep_classes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.group = inputs[3]


def _differentiate_mean(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # All rows of a class give each other the same share: the matrix of the means is symmetric.
    return _ops.mean_of_equal_ids(grad, *ctx.saved_tensors, ctx.group), None, None, None


for _name, _function, _setup, _differentiated in (
    ("agreed", _agree, _keep_group, _differentiate_agreed),
    ("mean_of_equal_ids", _mean_of_equal_ids, _keep_classes, _differentiate_mean),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gapkernels::{_name}", lambda x, *_: torch.empty_like(x), lib=library)
    torch.library.register_autograd(f"gapkernels::{_name}", _differentiated, setup_context=_setup, lib=library)
