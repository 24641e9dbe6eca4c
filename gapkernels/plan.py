"""The plan of an evaluation: which functions of a backend run, in which order, on which blocks and processes.

    forward     row_statistics ─► centroids ─► log_sums (all pairs and the triangle of the centroids) ─► terms
    backward    softmax_sums ─┬─► per part of the centroids' triangle: add_products
                operand ──────┴─► per block of rows of each pair: add_products ─► row_gradients; scale_gradient

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

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gapkernels import ring
from gapkernels.backends.contract import (
    SUM_SCALARS,
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
from gapkernels.blocks import (
    accumulator,
    block_side,
    blocks_of,
    centroid_matrix,
    circulate,
    largest_products,
    log_sum_over_processes,
    own_rows,
    readable,
    triangle,
)
from gapkernels.distributed import DTYPES, MODES, NEEDS_GRAD, World, spec_numbers
from gapkernels.spec import LossSpec

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
        world.agree(_description(embeddings, spec, needs_grad or [], world, keep), scalars)
    if embeddings[0].shape[0] == 0:
        raise ValueError(f"embedding 0 must have shape [N, D] with N, D ≥ 1, got {list(embeddings[0].shape)}")
    embeddings = readable(embeddings)
    rows = embeddings[0].shape[0]
    circulates = _circulates(embeddings, spec, world)
    arriving = {} if circulates else _start_gathers(embeddings, spec, backend, world)
    operands, statistics = backend.row_statistics(embeddings, spec)
    statistics = statistics._replace(sums=world.sum(statistics.sums))
    own = centroid_log_sums = pair_sums = None
    entries: Sequence[Tensor | None] = ()
    if spec.cu and len(arriving) < len(embeddings):
        own = backend.centroids(embeddings, statistics.sums, scalars.uniformity_t, rows * world.size, spec)
    gathered = Gathered({m: wait() for m, wait in arriving.items()}, None)
    if circulates:
        largest = largest_products(embeddings, spec.nce_pairs(len(embeddings)), spec, world)
        if operands:
            pair_sums = ring.pair_log_sums(operands, scalars, largest, spec, backend, world)
        if own is not None:
            centroid_log_sums = ring.centroid_log_sums(own, backend, world)
    else:
        matrices = _pair_matrices(embeddings, operands, gathered, scalars, spec, backend, world)
        num_pairs = len(matrices)
        if spec.cu and world.size == 1:
            assert own is not None
            matrices.append(centroid_matrix(own, slice(0, rows), own, slice(0, rows)))
        elif spec.cu:
            c = _centroids_of_all(own, gathered, statistics.sums, scalars, spec, backend, world)
            if own is not None:
                gathered = gathered._replace(centroids=c)
            centroid_log_sums = _centroid_log_sums(c, backend, world)
        if matrices:
            kept_bytes = spec.kept_bytes if keep else 0
            sums = backend.log_sums(matrices, statistics.zeros if world.size == 1 else None, kept_bytes)
            entries = sums.entries
            if len(matrices) > num_pairs:
                centroid_log_sums = sums.rows[num_pairs]
            if num_pairs:
                pair_sums = LogSums(sums.rows[:num_pairs], sums.cols[:num_pairs])
    if world.size > 1:
        pair_sums, centroid_log_sums = _over_processes(pair_sums, centroid_log_sums, world)
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
    columns = [gathered.embeddings[m] for m in sorted(gathered.embeddings)] if world.size > 1 else []
    return result._replace(
        kept=Kept(
            operands if few else [],
            own if few else None,
            prepared,
            columns,
            gathered.centroids,
            entries,
        )
    )


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
    operands, own_centroids, prepared, columns, all_centroids, entries = kept or Kept([], None, None)
    if prepared is None:
        prepared = backend.softmax_sums(saved, scalars, total_rows)
    evaluation = Evaluation(embeddings, scalars, spec, saved, upstream, prepared, total_rows, world.size)
    side = block_side(backend, embeddings[0], rows, total_rows)
    gradients = [
        e.new_empty(e.shape) if needed else None for e, needed in zip(embeddings, embedding_needs_grad, strict=True)
    ]
    circulates = _circulates(embeddings, spec, world)
    gathered = Gathered({}, None)
    if world.size > 1 and not circulates and any(needs_grad):
        which = _gathered_modalities(embeddings, spec, backend)
        if kept is None:  # as a compiled function, which keeps O(N) only
            columns = [world.gather_rows(embeddings[m]) for m in which]
        gathered = Gathered(dict(zip(which, columns, strict=True)), all_centroids)
    centroid_products = None
    if spec.cu and any(embedding_needs_grad):
        if own_centroids is None and not (gathered.centroids is not None or _all_gathered(gathered, embeddings)):
            own_centroids = backend.centroids(embeddings, saved.sums, scalars.uniformity_t, total_rows, spec)
        if circulates:
            assert own_centroids is not None
            centroid_products = ring.centroid_products(own_centroids, prepared, backend, world)
        else:
            c = gathered.centroids or _centroids_of_all(
                own_centroids, gathered, saved.sums, scalars, spec, backend, world
            )
            own_entries = entries[-1] if entries and world.size == 1 else None
            centroid_products = _centroid_products(c, own_entries, evaluation, backend, world)
        if embeddings[0].dtype == torch.bfloat16 and len(blocks_of(rows, side)) > 1:
            # Memory is saved by working in blocks: their gradients will be rounded so, and it saves a copy.
            centroid_products = centroid_products.to(torch.bfloat16)

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
    if pairs and circulates:
        own_operands = operands or [backend.operand(e, spec) for e in embeddings]
        largest = largest_products(embeddings, pairs, spec, world)
        products_of, moment = ring.pair_products(own_operands, largest, evaluation, needs_grad, backend, world)
        targets = [m for m, needed in enumerate(embedding_needs_grad) if needed]
        scale_gradient = finish(everything, [(m, own_operands[m].factor, products_of.get(m)) for m in targets], moment)
    elif not pairs:
        finish(everything, [(m, None, None) for m, needed in enumerate(embedding_needs_grad) if needed])
    else:
        own = {
            k: operands[k] if operands else backend.operand(embeddings[k], spec) for k in sorted({k for _, k in pairs})
        }
        cols = {k: _column_operand(k, o, gathered, spec, backend) for k, o in own.items()}
        col_products = {k: accumulator(cols[k]) for k in cols if embedding_needs_grad[k]}
        whole = [(k, own[k].factor) for k in col_products]  # modalities that are finished last, all rows at once
        row_products: dict[int, Tensor | None] = {}
        received: set[int] = set()  # modalities all of whose column products have been written
        largest = largest_products(embeddings, pairs, spec, world)
        row_blocks = blocks_of(rows, side)
        for m, group in groupby(enumerate(pairs), key=lambda item: item[1][0]):
            members = [(p, k) for p, (_, k) in group]
            for row in row_blocks:
                if m in own:
                    operand = _rows_of(own[m], row)
                    products = part(own_rows(col_products[m], world), row) if m in col_products else None
                else:
                    operand = (
                        _rows_of(operands[m], row) if operands else backend.operand(part(embeddings[m], row), spec)
                    )
                    products = accumulator(operand) if embedding_needs_grad[m] else None
                first_rows = m not in own  # pairs in which m has the columns come before those in which it has the rows
                for p, k in members:
                    if products is None and k not in col_products and not scale_needs_grad:
                        continue
                    matrix = Matrix(
                        *operand,
                        *cols[k],
                        scale=scalars.logit_scale,
                        largest=largest[p],
                        diagonal=world.rank * rows + row.start,
                        entries=_entries_of(entries, p, row, whole=len(row_blocks) == 1),
                    )
                    if scale_needs_grad and moment is None:
                        moment = backend.moment_buffer(matrix)
                    row_sums, negative_mass = part(prepared.rows[p], row), part(saved.negative_mass[p], row)
                    backend.add_products(
                        matrix,
                        SoftmaxSums(row_sums, prepared.cols[p], negative_mass),
                        prepared,
                        products,
                        col_products.get(k),
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
                (m, factor, _own_sum(col_products.pop(m), embeddings, world) if m in own else row_products.pop(m))
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


class Gathered(NamedTuple):
    """Rows of all processes.

    Attributes:
        embeddings: by modality, ``[N, D]`` in their own type.
        centroids: as an operand; None where they are made of the embeddings, or not yet.
    """

    embeddings: dict[int, Tensor]
    centroids: Centroids | None


def _circulates(embeddings: list[Tensor], spec: LossSpec, world: World) -> bool:
    """Whether rows go around the circle of processes instead of being gathered: depends on shapes and options only."""
    raw = spec.cu and not (spec.normalize or spec.normalize_centroids)
    if raw and world.size > 1 and world.mode == "ring":
        raise ValueError(
            "`group_mode`='ring' cannot send raw centroids (normalize=False, normalize_centroids=False), whose type "
            "depends on the largest of all; choose group_mode='gather'"
        )
    modalities = len({k for _, k in spec.nce_pairs(len(embeddings))}) + spec.cu
    return not raw and circulate(modalities * world.size * embeddings[0].nbytes, world)


def _gathered_modalities(embeddings: list[Tensor], spec: LossSpec, backend: Backend) -> list[int]:
    """The modalities whose rows all processes need: those with columns, and all where centroids cost more to send.

    Raw centroids are always made of all embeddings: only then do the processes see the same largest one, which decides
    in which type they are multiplied.
    """
    columns = sorted({k for _, k in spec.nce_pairs(len(embeddings))})
    if spec.cu:
        size_of_centroids = (
            embeddings[0].dtype.itemsize if backend.gradient_block else compute_dtype(embeddings[0].dtype).itemsize
        )
        missing = (len(embeddings) - len(columns)) * embeddings[0].dtype.itemsize
        if missing <= size_of_centroids or not (spec.normalize or spec.normalize_centroids):
            return list(range(len(embeddings)))
    return columns


def _start_gathers(
    embeddings: list[Tensor], spec: LossSpec, backend: Backend, world: World
) -> dict[int, Callable[[], Tensor]]:
    """Send for the rows of other processes; what waits for them, by modality. The own rows are worked on meanwhile."""
    if world.size == 1:
        return {}
    return {m: world.start_gather(embeddings[m]) for m in _gathered_modalities(embeddings, spec, backend)}


def _column_operand(m: int, own: Operand, gathered: Gathered, spec: LossSpec, backend: Backend) -> Operand:
    """The operand of a modality's rows of all processes."""
    return backend.operand(gathered.embeddings[m], spec) if m in gathered.embeddings else own


def _all_gathered(gathered: Gathered, embeddings: list[Tensor]) -> bool:
    return len(gathered.embeddings) == len(embeddings)


def _centroids_of_all(
    own: Centroids | None,
    gathered: Gathered,
    sums: Tensor,
    scalars: Scalars,
    spec: LossSpec,
    backend: Backend,
    world: World,
) -> Centroids:
    """The centroids of all rows: made of all embeddings if these are here, else gathered."""
    here = gathered.embeddings
    modalities = (sums.numel() - SUM_SCALARS) // next(iter(here.values())).shape[1] - 1 if here else None
    if len(here) == modalities:
        everything = [here[m] for m in sorted(here)]
        return backend.centroids(everything, sums, scalars.uniformity_t, everything[0].shape[0], spec)
    assert own is not None
    if world.size == 1:
        return own
    return own._replace(rows=world.gather_rows(own.rows), bias=world.gather_rows(own.bias))


def _pair_matrices(
    embeddings: list[Tensor],
    operands: list[Operand],
    gathered: Gathered,
    scalars: Scalars,
    spec: LossSpec,
    backend: Backend,
    world: World,
) -> list[Matrix]:
    """The matrix of each pair, its columns from all processes."""
    pairs = spec.nce_pairs(len(embeddings))
    cols = {k: _column_operand(k, operands[k], gathered, spec, backend) for k in sorted({k for _, k in pairs})}
    largest = largest_products(embeddings, pairs, spec, world)
    diagonal = world.rank * embeddings[0].shape[0]
    return [
        Matrix(*operands[m], *cols[k], scalars.logit_scale, bound, diagonal)
        for (m, k), bound in zip(pairs, largest, strict=True)
    ]


def _entries_of(entries: Sequence[Tensor | None], pair: int, row: slice, whole: bool) -> Tensor | None:
    """What was kept of some rows of a pair's matrix; of all in whatever form it has."""
    of_pair = entries[pair] if entries else None
    return of_pair if of_pair is None or whole else part(of_pair, row)


def _rows_of(operand: Operand, row: slice) -> Operand:
    return Operand(part(operand.rows, row), None if operand.factor is None else part(operand.factor, row))


# ---- centroids ----------------------------------------------------------------------------------------------------


def _centroid_log_sums(c: Centroids, backend: Backend, world: World) -> Tensor:
    """log2 Σ_{j≠i} e_ij over this process's part of the triangle, for the rows of all processes, ``[N]``."""
    log_sum = torch.full(c.bias.shape, -torch.inf, dtype=statistics_dtype(c.bias.device), device=c.bias.device)
    for row, col in triangle(world, c.rows.shape[0] // world.size):
        matrix = centroid_matrix(c, row, c, col)
        sums = backend.log_sums([matrix])
        log_sum[row] = torch.logaddexp2(log_sum[row], sums.rows[0])
        if not matrix.symmetric:
            log_sum[col] = torch.logaddexp2(log_sum[col], sums.cols[0])
    return log_sum


def _centroid_products(
    c: Centroids, entries: Tensor | None, evaluation: Evaluation, backend: Backend, world: World
) -> Tensor:
    """``Σ_{j≠i} 2^(x_ij − centroid_reference) c_j`` of the own centroids, ``[n, D']``; ``entries`` of one process."""
    total = accumulator(c)
    if world.size > 1:
        total.zero_()  # this process's part of the triangle does not touch all rows
    for shard_row, shard_col in triangle(world, c.rows.shape[0] // world.size):
        matrix = centroid_matrix(c, shard_row, c, shard_col)._replace(entries=entries)
        cols = None if matrix.symmetric else part(total, shard_col)
        is_first = world.size == 1
        backend.add_products(matrix, None, evaluation.prepared, part(total, shard_row), cols, None, is_first, is_first)
    return _own_sum(total, evaluation.embeddings, world)


# ---- blocks and processes -----------------------------------------------------------------------------------------


def _own_sum(products: Tensor, embeddings: list[Tensor], world: World) -> Tensor:
    """Products of the own rows, summed over the processes. Those of bfloat16 embeddings travel in their type."""
    if world.size > 1 and embeddings[0].dtype == torch.bfloat16:
        return world.sum_own_rows(products.to(torch.bfloat16))
    return world.sum_own_rows(products)


def _over_processes(
    pair_sums: LogSums | None, centroid_log_sums: Tensor | None, world: World
) -> tuple[LogSums | None, Tensor | None]:
    """Add column sums and sums of centroids up over the processes, all at once."""
    parts = [] if pair_sums is None else [pair_sums.cols]
    parts += [] if centroid_log_sums is None else [centroid_log_sums[None]]
    if not parts:
        return None, None
    total = log_sum_over_processes(torch.cat(parts), world)
    return (
        None if pair_sums is None else LogSums(pair_sums.rows, total[: len(pair_sums.cols)]),
        None if centroid_log_sums is None else total[-1],
    )


def _description(
    embeddings: list[Tensor], spec: LossSpec, needs_grad: list[bool], world: World, keep: bool
) -> dict[str, float]:
    """What processes must agree on before they talk about anything else."""
    rows, dim = embeddings[0].shape
    return {
        "number of rows": rows,
        "dimension D": dim,
        "number of embeddings": len(embeddings),
        "dtype": DTYPES.index(embeddings[0].dtype),
        **spec_numbers(spec),
        NEEDS_GRAD: sum(2**place for place, needed in enumerate(needs_grad) if needed),
        "group_mode": MODES.index(world.mode),
        "choice between torch.compile and eager": keep,
    }


def _added_up(own: Forward, scalars: Scalars, world: World) -> Forward:
    """The result over all rows, from one whose InfoNCE is a sum over the own rows; the same bits on every process."""
    terms = own.terms.clone()
    terms[0] = world.sum(terms[0])
    loss = torch.dot(terms[:3].to(scalars.weights.dtype), scalars.weights)
    return own._replace(loss=loss.to(own.loss.dtype), terms=terms)
