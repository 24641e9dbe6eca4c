"""The plan of an evaluation: which functions of a backend run, in which order, on which blocks and processes.

    forward     row_statistics ─► centroids ─► log_sums (all pairs and the triangle of the centroids) ─► terms
    backward    softmax_sums ─┬─► per block of the centroids' triangle: add_products
                operand ──────┴─► per block of each pair: add_products ─► row_gradients; scale_gradient

Notation: s logit scale, M modalities, N rows in all, n of them on this process, P InfoNCE pairs.

* InfoNCE of a pair needs, per row, the odds o_i = Σ_{j≠i} e_ij / e_ii: its cross-entropy is ln(1 + o_i) and its
  gradient at the positive is −o_i/(1 + o_i). Leaving the positive out of the sum keeps both exact where the model is
  nearly right and 1 − p_ii would cancel, and the loss cannot become negative through rounding.
* The gradient of a pair with respect to its inner products is w·(H − diag(negative mass)), with H the exponentials over
  their row and column sums and w = s·w_nce/(2·N·P). Backends multiply H; weight and positives follow row by row.
* CU depends on differences of centroids only, so they are centred first.

Memory: a modality that has columns in some pair is an operand as a whole and collects products over all blocks; one
that only has rows is taken and finished block by block, where the backend works in blocks at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from gapkernels.backends.contract import (
    NO_DIAGONAL,
    Backend,
    Centroids,
    Evaluation,
    Forward,
    Kept,
    LogSums,
    Matrix,
    Operand,
    Saved,
    Scalars,
    SoftmaxSums,
    compute_dtype,
    part,
    statistics_dtype,
)
from gapkernels.distributed import DTYPES, NEEDS_GRAD, World, triangle_blocks
from gapkernels.spec import LossSpec, Pairs

KEPT_BYTES = 16 * 2**20
"""Operands and centroids up to this size are kept for the backward pass."""


def forward(
    embeddings: list[Tensor],
    scalars: Scalars,
    spec: LossSpec,
    backend: Backend,
    world: World,
    needs_grad: list[bool] | None = None,
    keep: bool = False,
) -> Forward:
    """Evaluate the loss.

    Args:
        embeddings: M tensors ``[n, D]`` of one floating type, this process's rows.
        scalars: scale, weights and sharpness.
        spec: what to compute.
        backend: how to compute it.
        world: the processes that hold the batch.
        needs_grad: what the backward pass will be asked for; several processes must ask for the same.
        keep: return in ``kept`` what spares the backward pass work, where it is little (``KEPT_BYTES``).

    Raises:
        ValueError: the processes do not evaluate the same loss.
    """
    if world.size > 1:
        world.agree(_description(embeddings, spec, needs_grad or []), scalars)
    if embeddings[0].shape[0] == 0:
        raise ValueError(f"embedding 0 must have shape [N, D] with N, D ≥ 1, got {list(embeddings[0].shape)}")
    embeddings = readable(embeddings)
    rows = embeddings[0].shape[0]
    operands, statistics = backend.row_statistics(embeddings, spec)
    statistics = statistics._replace(sums=world.sum(statistics.sums))
    matrices = _pair_matrices(embeddings, operands, scalars, spec, backend, world)
    num_pairs = len(matrices)
    own = centroid_log_sums = None
    if spec.cu:
        own = backend.centroids(embeddings, statistics.sums, scalars.uniformity_t, rows * world.size, spec)
        if world.size == 1:
            matrices.append(_centroid_matrix(own, slice(0, rows), slice(0, rows)))
        else:
            centroid_log_sums = _centroid_log_sums(own, backend, world)
    pair_sums = None
    if matrices:
        sums = backend.log_sums(matrices, statistics.zeros if world.size == 1 else None)
        if len(matrices) > num_pairs:
            centroid_log_sums = sums.rows[num_pairs]
        if num_pairs:
            pair_sums = LogSums(sums.rows[:num_pairs], log_sum_over_processes(sums.cols[:num_pairs], world))
    cosines = statistics.cosines
    all_cosines = cosines if world.size == 1 else world.gather_rows(cosines.T.contiguous()).T.contiguous()
    first_row = world.rank * rows
    result = backend.terms(embeddings, statistics, all_cosines, pair_sums, centroid_log_sums, scalars, first_row, spec)
    if world.size > 1:
        result = _added_up(result, scalars, world)
    if not keep:
        return result._replace(kept=None)
    few = sum(x.rows.nbytes for x in (*operands, own) if x is not None) <= KEPT_BYTES
    prepared = None if result.kept is None else result.kept.prepared
    return result._replace(kept=Kept(operands if few else [], own if few else None, prepared))


def backward(
    upstream: Tensor,
    embeddings: list[Tensor],
    scalars: Scalars,
    saved: Saved,
    spec: LossSpec,
    backend: Backend,
    world: World,
    needs_grad: list[bool],
    kept: Kept | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Differentiate the terms that ``forward`` evaluated.

    With several processes the gradient of the embeddings is that of the loss times their number, and every process
    returns the whole gradient of the logit scale: the mean over processes, which DistributedDataParallel takes, is then
    the gradient of the loss for every parameter in front of the embeddings and for the scale.

    Args:
        upstream: ``[3]`` in the statistics type, gradient with respect to InfoNCE, ATP and CU, their weights included.
        embeddings, scalars, spec, backend, world: as for the forward pass.
        saved: from the forward pass.
        needs_grad: for every embedding and, last, the logit scale, whether to differentiate with respect to it.
        kept: from the forward pass, if it kept anything.

    Returns:
        ``(gradients of the embeddings, gradient of the scale)``, each shaped and typed like its input, None where not
        needed.
    """
    embeddings = readable(embeddings)
    *embedding_needs_grad, scale_needs_grad = needs_grad
    rows = embeddings[0].shape[0]
    total_rows = rows * world.size
    operands, own_centroids, prepared = kept or Kept([], None, None)
    if prepared is None:
        prepared = backend.softmax_sums(saved, scalars, total_rows)
    evaluation = Evaluation(embeddings, scalars, spec, saved, upstream, prepared, total_rows, world.size)
    gradients = [
        e.new_empty(e.shape) if needed else None for e, needed in zip(embeddings, embedding_needs_grad, strict=True)
    ]
    centroid_products = None
    if spec.cu and any(embedding_needs_grad):
        centroid_products = _centroid_products(evaluation, own_centroids, backend, world)

    def finish(
        row: slice, finished: list[tuple[int, Tensor | None, Tensor | None]], moment: Any = None
    ) -> Tensor | None:
        """Write gradients of some rows, from ``(modality, factor, products)``; with the last, perhaps the scale's."""
        out = [part(g, row) for m, _, _ in finished if (g := gradients[m]) is not None]
        if not out:
            return None
        targets = [m for m, _, _ in finished]
        factors, products = [f for _, f, _ in finished], [p for _, _, p in finished]
        return backend.row_gradients(targets, row, factors, products, centroid_products, evaluation, out, moment)

    everything = slice(0, rows)
    pairs = spec.nce_pairs(len(embeddings)) if any(needs_grad) else ()
    moment = scale_gradient = None
    if not pairs:
        finish(everything, [(m, None, None) for m, needed in enumerate(embedding_needs_grad) if needed])
    else:
        own = {
            k: operands[k] if operands else backend.operand(embeddings[k], spec) for k in sorted({k for _, k in pairs})
        }
        cols = {k: _gathered(embeddings[k], o, spec, backend, world) for k, o in own.items()}
        col_products = {k: accumulator(cols[k]) for k in cols if embedding_needs_grad[k]}
        whole = [(k, own[k].factor) for k in col_products]  # modalities that are finished last, all rows at once
        row_products: dict[int, Tensor | None] = {}
        received: set[int] = set()  # modalities all of whose column products have been written
        largest = largest_products(embeddings, pairs, spec, world)
        row_blocks = blocks_of(rows, backend.gradient_block)
        for m, group in groupby(enumerate(pairs), key=lambda item: item[1][0]):
            members = [(p, k) for p, (_, k) in group]
            for row in row_blocks:
                if m in own:
                    operand = _rows_of(own[m], row)
                    products = part(_own_rows(col_products[m], world), row) if m in col_products else None
                else:
                    operand = (
                        _rows_of(operands[m], row) if operands else backend.operand(part(embeddings[m], row), spec)
                    )
                    products = accumulator(operand) if embedding_needs_grad[m] else None
                first_rows = m not in own  # pairs in which m has the columns come before those in which it has the rows
                for p, k in members:
                    if products is None and k not in col_products and not scale_needs_grad:
                        continue
                    matrix = Matrix(*operand, *cols[k], scalars.logit_scale, largest[p], world.rank * rows + row.start)
                    if scale_needs_grad and moment is None:
                        moment = backend.moment_buffer(matrix)
                    row_sums, negative_mass = part(prepared.rows[p], row), part(saved.negative_mass[p], row)
                    for col in blocks_of(total_rows, backend.gradient_block):
                        backend.add_products(
                            matrix.block(slice(0, row.stop - row.start), col),
                            SoftmaxSums(row_sums, part(prepared.cols[p], col), negative_mass),
                            prepared,
                            products,
                            part(col_products[k], col) if k in col_products else None,
                            moment,
                            first_rows,
                            k not in received,
                        )
                        first_rows = False
                    received.add(k)
                if m in own or products is None:
                    continue
                if len(row_blocks) == 1:
                    whole.append((m, operand.factor))
                    row_products[m] = products
                else:
                    finish(row, [(m, operand.factor, products)])
        del cols
        scale_gradient = finish(
            everything,
            [
                (m, factor, world.sum_own_rows(col_products.pop(m)) if m in own else row_products.pop(m))
                for m, factor in whole
            ],
            moment,
        )
    if not scale_needs_grad:
        return gradients, None
    if moment is None:
        return gradients, torch.zeros_like(scalars.logit_scale)
    if scale_gradient is None:
        scale_gradient = backend.scale_gradient(moment, evaluation)
    scale_gradient = world.sum(scale_gradient)
    return gradients, scale_gradient.to(scalars.logit_scale.dtype)


# ---- pairs --------------------------------------------------------------------------------------------------------


def _pair_matrices(
    embeddings: list[Tensor],
    operands: list[Operand],
    scalars: Scalars,
    spec: LossSpec,
    backend: Backend,
    world: World,
) -> list[Matrix]:
    """The matrix of each pair, its columns from all processes."""
    pairs = spec.nce_pairs(len(embeddings))
    cols = {k: _gathered(embeddings[k], operands[k], spec, backend, world) for k in sorted({k for _, k in pairs})}
    largest = largest_products(embeddings, pairs, spec, world)
    diagonal = world.rank * embeddings[0].shape[0]
    return [
        Matrix(*operands[m], *cols[k], scalars.logit_scale, bound, diagonal)
        for (m, k), bound in zip(pairs, largest, strict=True)
    ]


def _gathered(embedding: Tensor, own: Operand, spec: LossSpec, backend: Backend, world: World) -> Operand:
    """The operand of a modality's rows of all processes. Embeddings travel in their own type."""
    return own if world.size == 1 else backend.operand(world.gather_rows(embedding), spec)


def largest_products(embeddings: list[Tensor], pairs: Pairs, spec: LossSpec, world: World) -> list[Tensor] | list[None]:
    """Per pair, the largest norm of a row times the largest of a column: no inner product exceeds it."""
    if spec.normalize or not pairs:
        return [None] * len(pairs)
    statistics = statistics_dtype(embeddings[0].device)
    norms = [torch.linalg.vector_norm(e, dim=1, dtype=statistics).max() for e in embeddings]
    largest = world.max(torch.stack(norms))
    return [largest[m] * largest[k] for m, k in pairs]


def _rows_of(operand: Operand, row: slice) -> Operand:
    return Operand(part(operand.rows, row), None if operand.factor is None else part(operand.factor, row))


def accumulator(operand: Operand | Centroids) -> Tensor:
    """Room for the products of an operand's rows, float32 or wider: the first ones overwrite it."""
    return torch.empty_like(operand.rows, dtype=compute_dtype(operand.rows.dtype))


# ---- centroids ----------------------------------------------------------------------------------------------------


def _centroid_matrix(c: Centroids, row: slice, col: slice) -> Matrix:
    symmetric = row == col
    return Matrix(
        rows=part(c.rows, row),
        row_factor=part(c.bias, row),
        cols=part(c.rows, col),
        col_factor=part(c.bias, col),
        scale=c.scale,
        diagonal=0 if symmetric else NO_DIAGONAL,
        biased=True,
        symmetric=symmetric,
    )


def _gathered_centroids(own: Centroids, world: World) -> Centroids:
    return own._replace(rows=world.gather_rows(own.rows), bias=world.gather_rows(own.bias))


def _triangle(world: World, rows: int) -> Iterator[tuple[slice, slice]]:
    """This process's blocks of the triangle of the centroid matrix that hold anything."""
    for row, col in triangle_blocks(world.rank, world.size, rows):
        if row.start < row.stop and col.start < col.stop:
            yield row, col


def _centroid_log_sums(own: Centroids, backend: Backend, world: World) -> Tensor:
    """log2 Σ_{j≠i} e_ij for the rows of all processes, each of which computes a part of the triangle, ``[N]``."""
    c = _gathered_centroids(own, world)
    log_sum = torch.full(c.bias.shape, -torch.inf, dtype=statistics_dtype(c.bias.device), device=c.bias.device)
    for row, col in _triangle(world, own.rows.shape[0]):
        matrix = _centroid_matrix(c, row, col)
        sums = backend.log_sums([matrix])
        log_sum[row] = torch.logaddexp2(log_sum[row], sums.rows[0])
        if not matrix.symmetric:
            log_sum[col] = torch.logaddexp2(log_sum[col], sums.cols[0])
    return log_sum_over_processes(log_sum, world)


def _centroid_products(evaluation: Evaluation, own: Centroids | None, backend: Backend, world: World) -> Tensor:
    """``Σ_{j≠i} 2^(x_ij − centroid_reference) c_j`` of the own centroids, ``[n, D']``.

    Where memory is saved by working in blocks, the sums of bf16 embeddings are rounded to bf16 in the end: their
    gradients will be, and it saves a copy.
    """
    embeddings, spec = evaluation.embeddings, evaluation.spec
    uniformity_t = evaluation.scalars.uniformity_t
    if own is None:
        own = backend.centroids(embeddings, evaluation.saved.sums, uniformity_t, evaluation.total_rows, spec)
    c = _gathered_centroids(own, world)
    total = accumulator(c)
    if world.size > 1:
        total.zero_()  # this process's part of the triangle does not touch all rows
    for shard_row, shard_col in _triangle(world, own.rows.shape[0]):
        matrix = _centroid_matrix(c, shard_row, shard_col)
        row_total, col_total = part(total, shard_row), part(total, shard_col)
        for row in blocks_of(row_total.shape[0], backend.gradient_block):
            for col in blocks_of(col_total.shape[0], backend.gradient_block):
                if matrix.symmetric and col.start < row.start:
                    continue
                block = matrix.block(row, col)
                cols = None if block.symmetric else part(col_total, col)
                first_cols = world.size == 1 and row.start == 0
                first_rows = first_cols and col.start == 0
                backend.add_products(
                    block, None, evaluation.prepared, part(row_total, row), cols, None, first_rows, first_cols
                )
    products = world.sum_own_rows(total)
    blocks = len(blocks_of(products.shape[0], backend.gradient_block))
    return products.to(torch.bfloat16) if blocks > 1 and embeddings[0].dtype == torch.bfloat16 else products


# ---- blocks and processes -----------------------------------------------------------------------------------------


def readable(embeddings: list[Tensor]) -> list[Tensor]:
    """Embeddings as backends read them: any stride between rows, unit stride along them."""
    return [e if e.stride(1) == 1 or e.shape[1] == 1 else e.contiguous() for e in embeddings]


def blocks_of(length: int, side: int | None) -> list[slice]:
    side = side or length
    return [slice(start, min(start + side, length)) for start in range(0, length, side)]


def _description(embeddings: list[Tensor], spec: LossSpec, needs_grad: list[bool]) -> dict[str, float]:
    """What processes must agree on before they talk about anything else: always as many numbers."""
    rows, dim = embeddings[0].shape
    return {
        "number of rows": rows,
        "dimension D": dim,
        "number of embeddings": len(embeddings),
        "dtype": DTYPES.index(embeddings[0].dtype),
        **{{"nce": "InfoNCE", "atp": "ATP", "cu": "CU"}.get(k, k): float(v) for k, v in spec._asdict().items()},
        NEEDS_GRAD: sum(2**place for place, needed in enumerate(needs_grad) if needed),
    }


def _own_rows(x: Tensor, world: World) -> Tensor:
    if world.size == 1:
        return x
    rows = x.shape[0] // world.size
    return x[world.rank * rows : (world.rank + 1) * rows]


def log_sum_over_processes(log_sum: Tensor, world: World) -> Tensor:
    """log2 Σ 2^log_sum over the processes, elementwise."""
    if world.size == 1:
        return log_sum
    largest = world.max(log_sum)
    reference = torch.where(largest == -torch.inf, 0.0, largest)
    return reference + world.sum(torch.exp2(log_sum - reference)).log2()


def _added_up(own: Forward, scalars: Scalars, world: World) -> Forward:
    """The result over all rows, from one whose InfoNCE is a sum over the own rows; the same bits on every process."""
    terms = own.terms.clone()
    terms[0] = world.sum(terms[0])
    loss = torch.dot(terms[:3].to(scalars.weights.dtype), scalars.weights)
    return own._replace(loss=loss.to(own.loss.dtype), terms=terms)
