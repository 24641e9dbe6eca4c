"""The N² steps where no process holds all rows: parts of them go around the circle of processes.

    step 0     own rows × own rows             the part of process r + 1 is on its way
    step 1     own rows × rows of r + 1        the part of process r + 2 is on its way
    ...        products of the columns travel with the columns and return to their owner behind the last step

Memory is O(n·D) for n = N/W rows of each process, two parts at a time; beside it stand O(N) sums. The sums and products
are those of the plan, block by block, in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gapkernels.backends.contract import (
    Backend,
    Centroids,
    Evaluation,
    LogSums,
    Matrix,
    Operand,
    PreparedSums,
    Scalars,
    SoftmaxSums,
    part,
    statistics_dtype,
)
from gapkernels.blocks import accumulator, centroid_matrix, triangle
from gapkernels.distributed import World
from gapkernels.spec import LossSpec


def pair_log_sums(
    operands: list[Operand],
    scalars: Scalars,
    largest: list[Tensor] | list[None],
    spec: LossSpec,
    backend: Backend,
    world: World,
) -> LogSums:
    """Sums of the pair matrices: of the own rows over all columns, of all columns over the own rows."""
    pairs = spec.nce_pairs(len(operands))
    rows = operands[0].rows.shape[0]
    columns = sorted({k for _, k in pairs})
    row_sums: Tensor | None = None
    cols: dict[int, Tensor] = {}
    for owner, held in world.circulate(_flat(operands, columns), world.size):
        travelling = _unflat(held, columns)
        diagonal = (world.rank - owner) * rows
        sums = backend.log_sums(
            [
                Matrix(*operands[m], *travelling[k], scalars.logit_scale, bound, diagonal)
                for (m, k), bound in zip(pairs, largest, strict=True)
            ]
        )
        row_sums = sums.rows if row_sums is None else torch.logaddexp2(row_sums, sums.rows)
        cols[owner] = sums.cols
    assert row_sums is not None
    return LogSums(row_sums, torch.cat([cols[owner] for owner in range(world.size)], dim=1))


def pair_products(
    operands: list[Operand],
    largest: list[Tensor] | list[None],
    evaluation: Evaluation,
    needs_grad: list[bool],
    backend: Backend,
    world: World,
) -> tuple[dict[int, Tensor], object]:
    """Products of the own rows of each modality that needs them, and the moment of the scale if that does."""
    *embedding_needs_grad, scale_needs_grad = needs_grad
    scalars, saved, prepared = evaluation.scalars, evaluation.saved, evaluation.prepared
    pairs = evaluation.spec.nce_pairs(len(operands))
    rows = operands[0].rows.shape[0]
    columns = sorted({k for _, k in pairs})
    of_rows = {m: accumulator(operands[m]) for m in sorted({m for m, _ in pairs}) if embedding_needs_grad[m]}
    of_cols = {k: accumulator(operands[k]) for k in columns if embedding_needs_grad[k]}
    seen_rows: set[int] = set()
    moment = None
    for step, (owner, held) in enumerate(world.circulate(_flat(operands, columns), world.size)):
        travelling = _unflat(held, columns)
        seen_cols: set[int] = set()
        for p, (m, k) in enumerate(pairs):
            if m not in of_rows and k not in of_cols and not scale_needs_grad:
                continue
            matrix = Matrix(*operands[m], *travelling[k], scalars.logit_scale, largest[p], (world.rank - owner) * rows)
            if scale_needs_grad and moment is None:
                moment = backend.moment_buffer(matrix)
            col_sums = part(prepared.cols[p], slice(owner * rows, (owner + 1) * rows))
            backend.add_products(
                matrix,
                SoftmaxSums(prepared.rows[p], col_sums, saved.negative_mass[p]),
                prepared,
                of_rows.get(m),
                of_cols.get(k),
                moment,
                m not in seen_rows,
                step == 0 and k not in seen_cols,
            )
            seen_rows.add(m)
            seen_cols.add(k)
        of_cols = {k: world.shift(total, -1) for k, total in of_cols.items()}
    products = dict(of_rows)
    for k, total in of_cols.items():
        products[k] = total.add_(products[k]) if k in products else total
    return products, moment


def centroid_log_sums(own: Centroids, backend: Backend, world: World) -> Tensor:
    """log2 Σ_{j≠i} e_ij over this process's part of the triangle, for the rows of all processes, ``[N]``."""
    rows = own.rows.shape[0]
    log_sum = torch.full(
        (rows * world.size,), -torch.inf, dtype=statistics_dtype(own.bias.device), device=own.bias.device
    )
    for owner, held in world.circulate([own.rows, own.bias], _centroid_steps(world)):
        for matrix, row, col in _triangle_matrices(own, held, owner, world):
            sums = backend.log_sums([matrix])
            mine = slice(row.start + world.rank * rows, row.stop + world.rank * rows)
            log_sum[mine] = torch.logaddexp2(log_sum[mine], sums.rows[0])
            if not matrix.symmetric:
                theirs = slice(col.start + owner * rows, col.stop + owner * rows)
                log_sum[theirs] = torch.logaddexp2(log_sum[theirs], sums.cols[0])
    return log_sum


def centroid_products(own: Centroids, prepared: PreparedSums, backend: Backend, world: World) -> Tensor:
    """``Σ_{j≠i} 2^(x_ij − centroid_reference) c_j`` of the own centroids, ``[n, D']``."""
    of_rows, of_cols = accumulator(own).zero_(), accumulator(own).zero_()
    for owner, held in world.circulate([own.rows, own.bias], _centroid_steps(world)):
        for matrix, row, col in _triangle_matrices(own, held, owner, world):
            row_total, col_total = part(of_rows, row), part(of_cols, col)
            # Of the own diagonal block, columns are own rows too.
            backend.add_products(matrix, None, prepared, row_total, None if matrix.symmetric else col_total, None)
        if (owner - world.rank) % world.size < _centroid_steps(world) - 1:
            of_cols = world.shift(of_cols, -1)
    return of_rows.add_(world.shift(of_cols, _centroid_steps(world) - 1))


def _centroid_steps(world: World) -> int:
    """Half way around the circle: each pair of processes meets once."""
    return world.size // 2 + 1


def _triangle_matrices(
    own: Centroids, held: list[Tensor], owner: int, world: World
) -> list[tuple[Matrix, slice, slice]]:
    """This process's blocks of the triangle with the columns of another, and what rows and columns they cover there."""
    rows = own.rows.shape[0]
    matrices = []
    others = own if owner == world.rank else own._replace(rows=held[0], bias=held[1])
    for global_row, global_col in triangle(world, rows):
        if global_col.start // rows != owner:
            continue
        row, col = (
            slice(s.start - r * rows, s.stop - r * rows) for s, r in ((global_row, world.rank), (global_col, owner))
        )
        matrices.append((centroid_matrix(own, row, others, col), row, col))
    return matrices


def _flat(operands: list[Operand], columns: list[int]) -> list[Tensor]:
    """The tensors of some operands, which all have factors or all have none."""
    return [x for k in columns for x in operands[k] if x is not None]


def _unflat(tensors: list[Tensor], columns: list[int]) -> dict[int, Operand]:
    each = len(tensors) // len(columns)
    return {k: Operand(tensors[i * each], tensors[i * each + 1] if each == 2 else None) for i, k in enumerate(columns)}
