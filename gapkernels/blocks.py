"""What the plan and its variant for many processes share: blocks of matrices, and room for their products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gapkernels.backends.contract import (
    NO_DIAGONAL,
    Backend,
    Centroids,
    Matrix,
    Operand,
    compute_dtype,
    part,
    statistics_dtype,
)
from gapkernels.distributed import World, triangle_blocks
from gapkernels.spec import LossSpec, Pairs

GATHERED_BYTES = 2**30
"""Rows of all processes up to this size are gathered, beyond it they circulate, where the mode is "auto"."""


def circulate(gathered_bytes: int, world: World) -> bool:
    """Whether rows go around the circle of processes instead of being gathered.

    Args:
        gathered_bytes: how much a process would hold of the rows of all; the same on every one.
        world: the processes, and what was asked for.
    """
    if world.size == 1 or world.mode == "gather":
        return False
    return world.mode == "ring" or gathered_bytes > GATHERED_BYTES


def readable(embeddings: list[Tensor]) -> list[Tensor]:
    """Embeddings as backends read them: any stride between rows, unit stride along them."""
    return [e if e.stride(1) == 1 or e.shape[1] == 1 else e.contiguous() for e in embeddings]


def blocks_of(length: int, side: int | None) -> list[slice]:
    side = side or length
    return [slice(start, min(start + side, length)) for start in range(0, length, side)]


def block_side(backend: Backend, like: Tensor, rows: int, cols: int) -> int | None:
    """Rows of the gradient that are finished at a time; None where the backend takes all at once."""
    return None if backend.gradient_block is None else backend.gradient_block(like, rows, cols)


def own_rows(x: Tensor, world: World) -> Tensor:
    """This process's ``[n, ...]`` of the ``[N, ...]`` of all."""
    if world.size == 1:
        return x
    rows = x.shape[0] // world.size
    return x[world.rank * rows : (world.rank + 1) * rows]


def triangle(world: World, rows: int) -> Iterator[tuple[slice, slice]]:
    """This process's blocks of the triangle of the centroid matrix that hold anything, with ``rows`` each."""
    for row, col in triangle_blocks(world.rank, world.size, rows):
        if row.start < row.stop and col.start < col.stop:
            yield row, col


def largest_products(embeddings: list[Tensor], pairs: Pairs, spec: LossSpec, world: World) -> list[Tensor] | list[None]:
    """Per pair, the largest norm of a row times the largest of a column: no inner product exceeds it."""
    if spec.normalize or not pairs:
        return [None] * len(pairs)
    statistics = statistics_dtype(embeddings[0].device)
    norms = [torch.linalg.vector_norm(e, dim=1, dtype=statistics).max() for e in embeddings]
    largest = world.max(torch.stack(norms))
    return [largest[m] * largest[k] for m, k in pairs]


def accumulator(operand: Operand | Centroids) -> Tensor:
    """Room for the products of an operand's rows, float32 or wider: the first ones overwrite it."""
    return torch.empty_like(operand.rows, dtype=compute_dtype(operand.rows.dtype))


def centroid_matrix(c: Centroids, row: slice, others: Centroids, col: slice) -> Matrix:
    """Some centroids against others; the same ones are a symmetric matrix."""
    symmetric = others is c and row == col
    rows, bias = part(c.rows, row), part(c.bias, row)
    return Matrix(
        rows=rows,
        row_factor=bias,
        cols=rows if symmetric else part(others.rows, col),
        col_factor=bias if symmetric else part(others.bias, col),
        scale=c.scale,
        diagonal=0 if symmetric else NO_DIAGONAL,
        biased=True,
        symmetric=symmetric,
    )


def log_sum_over_processes(log_sum: Tensor, world: World) -> Tensor:
    """log2 Σ 2^log_sum over the processes, elementwise."""
    if world.size == 1:
        return log_sum
    largest = world.max(log_sum)
    reference = torch.where(largest == -torch.inf, 0.0, largest)
    return reference + world.sum(torch.exp2(log_sum - reference)).log2()
