"""Sums along the rows and columns of one similarity matrix, as operators that autograd and torch.compile know.

``gapkernels::similarity_logsumexp`` returns log sums of exponentials, ``gapkernels::similarity_softplus`` sums of
softplus; a backend computes both in tiles and recomputes the tiles in the backward pass: O(N·D) memory. Everything that
is one of these and O(N·D) arithmetic around it can be written with them in plain torch (``gapkernels.contrast``).

Rows and columns are matched, sample by sample, or not. The entries of matching rows and columns, the positives, are
left out of all sums and returned by themselves: what is made of both is then exact where a positive dominates its sum.

With several processes each holds ``n`` rows and ``k`` columns; sums run over the columns, or rows, of all. The columns
are gathered, or go around the circle of processes with their products, as in ``gapkernels.ring``. Gradients of
rows and columns are those of the sum over the processes of whatever each makes of its own sums; that of the scale is
the process's own part. Their mean over processes, which DistributedDataParallel takes, is the gradient of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gapkernels import backends
from gapkernels.backends.contract import (
    LN_2,
    LOG2_E,
    NO_DIAGONAL,
    SUM_SCALARS,
    Backend,
    Evaluation,
    Matrix,
    Operand,
    Saved,
    Scalars,
    SigmoidWeights,
    SoftmaxSums,
    part,
    statistics_dtype,
)
from gapkernels.blocks import (
    accumulator,
    circulate,
    largest_products,
    log_sum_over_processes,
    own_rows,
    readable,
)
from gapkernels.distributed import DTYPES, FUNCTIONS, MODES, NEEDS_GRAD, World, world_of
from gapkernels.ops import fill_absent, library, no_autocast, no_second_derivative, on_device
from gapkernels.spec import LossSpec


class Mask(NamedTuple):
    """Which entries are left out, besides the positives.

    Attributes:
        row_ids, col_ids: ``[n]`` and ``[k]`` int64: entries of equal ids are. None together.
        row_limit, col_limit: ``[n]`` and ``[k]`` in the statistics type: entries whose logit exceeds it are, from the
            sum of that row or that column. None for no limit.
    """

    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None


class _Problem(NamedTuple):
    """One matrix and how it is computed."""

    rows: Tensor
    cols: Tensor
    logit_scale: Tensor
    mask: Mask
    matched: bool
    spec: LossSpec
    backend: Backend
    world: World

    @property
    def total_rows(self) -> int:
        return self.rows.shape[0] * self.world.size

    @property
    def total_cols(self) -> int:
        return self.cols.shape[0] * self.world.size

    @property
    def circulates(self) -> bool:
        return circulate(self.cols.nbytes * self.world.size, self.world)

    def matrices(self, operands: tuple[Operand, Operand]) -> Iterator[tuple[Matrix, slice]]:
        """The own rows against columns, and which of all columns these are: all at once, or as they come by."""
        world, mask, count = self.world, self.mask, self.cols.shape[0]
        (largest,) = largest_products([self.rows, self.cols], ((0, 1),), self.spec, world)
        everything = Matrix(
            *operands[0],
            *operands[1],
            self.logit_scale,
            largest,
            world.rank * self.rows.shape[0] if self.matched else NO_DIAGONAL,
            row_ids=mask.row_ids,
            col_ids=None if mask.col_ids is None else world.gather_rows(mask.col_ids),
            row_limit=None if mask.row_limit is None else mask.row_limit * LOG2_E,
            col_limit=None if mask.col_limit is None else world.gather_rows(mask.col_limit) * LOG2_E,
        )
        if not self.circulates:
            yield everything, slice(0, self.total_cols)
            return
        for owner, (rows, *factor) in world.circulate([x for x in operands[1] if x is not None], world.size):
            cols = slice(owner * count, (owner + 1) * count)
            yield (
                everything._replace(
                    cols=rows,
                    col_factor=factor[0] if factor else None,
                    diagonal=everything.diagonal - cols.start if self.matched else NO_DIAGONAL,
                    col_ids=None if everything.col_ids is None else part(everything.col_ids, cols),
                    col_limit=None if everything.col_limit is None else part(everything.col_limit, cols),
                ),
                cols,
            )

    def operands(self) -> tuple[tuple[Operand, Operand], Tensor]:
        """Own rows, and columns of all processes, or the own ones if they are to circulate.

        Beside them cosines (inner products) of matching rows, ``[0]`` if none match.
        """
        rows = own_cols = None
        cosines = self.rows.new_empty(0, dtype=statistics_dtype(self.rows.device))
        if self.matched:
            (rows, own_cols), statistics = self.backend.row_statistics([self.rows, self.cols], self.spec)
            cosines = statistics.cosines[0]
        if self.world.size > 1 and not self.circulates:
            own_cols = self.backend.operand(self.world.gather_rows(self.cols), self.spec)
        return (
            rows or self.backend.operand(self.rows, self.spec),
            own_cols or self.backend.operand(self.cols, self.spec),
        ), cosines


def _problem(
    rows: Tensor,
    cols: Tensor,
    logit_scale: Tensor,
    mask: Mask,
    matched: bool,
    normalize: bool,
    backend: str,
    group: str,
    *,
    bias: Tensor | None = None,
    again: bool = False,
) -> _Problem:
    """Check what an operator was given; ``bias`` of a softplus, ``again`` if the processes have agreed before."""
    spec = LossSpec(anchor=1, atp=False, cu=False, normalize=normalize)
    world = world_of(group)
    needs = frozenset(
        name
        for name, needed in (
            ("softplus", bias is not None),
            ("weights", bias is None),
            ("ids", mask.row_ids is not None),
            ("limits", mask.row_limit is not None or mask.col_limit is not None),
        )
        if needed
    )
    if world.size > 1 and not again:
        inputs = rows, cols, logit_scale, *([] if bias is None else [bias])
        world.agree(
            {
                "number of rows": rows.shape[0],
                "function": FUNCTIONS.index("similarity_logsumexp" if bias is None else "similarity_softplus"),
                "dimension D": rows.shape[1],
                "dtype": DTYPES.index(rows.dtype),
                "number of columns": cols.shape[0],
                "matched": matched,
                "normalize": normalize,
                **{f"presence of {name}": float(value is not None) for name, value in mask._asdict().items()},
                NEEDS_GRAD: sum(2**place for place, x in enumerate(inputs) if x.requires_grad),
                "group_mode": MODES.index(world.mode),
            },
            [logit_scale, logit_scale.new_zeros(4), *([] if bias is None else [bias])],  # no weights and no t here
        )
    rows, cols = readable([rows, cols])
    mask = Mask(*(None if x is None else x.contiguous() for x in mask))
    implementation = backends.select_for_sums(backend, rows, needs)
    return _Problem(rows, cols, logit_scale, mask, matched, spec, implementation, world)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def _log_sums(p: _Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log sums of own rows and columns, logits of the positives, log sums of all columns (``[0]`` if these are all)."""
    operands, cosines = p.operands()
    row_sums: Tensor | None = None
    parts: dict[int, Tensor] = {}
    for matrix, cols in p.matrices(operands):
        sums = p.backend.log_sums([matrix])
        row_sums = sums.rows[0] if row_sums is None else torch.logaddexp2(row_sums, sums.rows[0])
        parts[cols.start] = sums.cols[0]
    assert row_sums is not None
    col_sums = torch.cat([parts[start] for start in sorted(parts)]) if len(parts) > 1 else parts[0]
    all_cols = log_sum_over_processes(col_sums, p.world)
    own_cols = own_rows(all_cols, p.world)
    positives = cosines * p.logit_scale.to(cosines.dtype)
    return row_sums * LN_2, own_cols * LN_2, positives, all_cols if p.world.size > 1 else all_cols.new_empty(0)


def _log_sum_gradients(
    p: _Problem, grads: Sequence[Tensor | None], rows: Tensor, cols: Tensor, all_cols: Tensor, needs: list[bool]
) -> tuple[list[Tensor | None], Tensor | None]:
    row_weight, col_weight, positive_weight = (
        like.new_zeros(like.shape) if grad is None else grad.to(like.dtype).contiguous()
        for grad, like in zip(grads, (rows, cols, rows), strict=True)
    )
    # Nothing counts where a log sum is −∞, and nothing flows back.
    entries = (
        row_weight.masked_fill(rows == -math.inf, 0.0).sum() + col_weight.masked_fill(cols == -math.inf, 0.0).sum()
    )
    row_log = (rows * LOG2_E).masked_fill(rows == -math.inf, 0.0)
    col_log = all_cols if p.world.size > 1 else cols * LOG2_E
    sums = SoftmaxSums(
        row=row_log,
        col=col_log.masked_fill(col_log == -math.inf, 0.0),
        negative_mass=-positive_weight,
        row_weight=row_weight,
        col_weight=p.world.gather_rows(col_weight),
    )
    return _gradients(p, sums, entries, needs)


def _softplus_gradients(
    p: _Problem,
    grads: Sequence[Tensor | None],
    bias: Tensor,
    sigmoid: Tensor,
    needs: list[bool],
) -> tuple[list[Tensor | None], Tensor | None]:
    row_weight, positive_weight = (
        sigmoid.new_zeros(sigmoid.shape) if grad is None else grad.to(sigmoid.dtype).contiguous() for grad in grads
    )
    sums = SigmoidWeights(bias.to(sigmoid.dtype) * LOG2_E, row_weight, -positive_weight)
    return _gradients(p, sums, row_weight.dot(sigmoid), needs)


def _gradients(
    p: _Problem, sums: SoftmaxSums | SigmoidWeights, entries: Tensor, needs: list[bool]
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients of rows, columns and scale.

    The backend's last steps are those of a loss: of InfoNCE of one pair, weighted such that its gradient with respect
    to the cosines is the logit scale times H less the diagonal.

    Args:
        p: what was evaluated.
        sums: log sums in them are absolute.
        entries: 0-dim, this process's part of Σ_ij H_ij.
        needs: whether to differentiate with respect to rows, columns and scale.
    """
    assert sums.row_weight is not None
    needs_rows, needs_cols, needs_scale = needs
    positive_entries = -sums.negative_mass.sum()
    sums, weight_unit = _with_weights_near_one(p, sums)
    num_rows, world = p.rows.shape[0], p.world
    operands, cosines = p.operands()
    zeros = sums.negative_mass.new_zeros
    if isinstance(sums, SoftmaxSums):
        row_log, col_log = sums.row, sums.col
    else:
        row_log, col_log = zeros(num_rows), zeros(p.total_cols)
    per_cosine = p.logit_scale.to(row_log.dtype) * LOG2_E
    if not p.matched:  # the backend puts its reference near the positives: where there are none, near a usual entry
        cosines = (row_log - math.log2(p.total_cols)) / per_cosine
    empty = zeros(0)
    saved = Saved(
        row_log_sum=row_log[None],
        col_log_sum=col_log[None],
        negative_mass=sums.negative_mass[None],
        cosines=cosines[None],
        sums=torch.cat([zeros(SUM_SCALARS - 1), world.sum(cosines.sum(dim=0, keepdim=True))]),
        centroid_log_sum=empty,
        centroid_summary=empty,
    )
    ones = zeros(3) + 1
    scalars = Scalars(p.logit_scale, ones, ones[0])
    prepared = p.backend.softmax_sums(saved, scalars, p.total_rows)

    row_products = accumulator(operands[0]) if needs_rows else None
    col_products = accumulator(operands[1]) if needs_cols else None
    moment = None
    first = True
    for matrix, cols in p.matrices(operands):
        if needs_scale and moment is None:
            moment = p.backend.moment_buffer(matrix)
        of_cols = sums
        if isinstance(of_cols, SoftmaxSums):
            assert of_cols.col_weight is not None
            of_cols = of_cols._replace(
                row=prepared.rows[0], col=part(prepared.cols[0], cols), col_weight=part(of_cols.col_weight, cols)
            )
        p.backend.add_products(matrix, of_cols, prepared, row_products, col_products, moment, first, first)
        first = False
        if p.circulates and col_products is not None:
            col_products = world.shift(col_products, -1)
    if not p.circulates and col_products is not None:
        col_products = world.sum_own_rows(col_products)
    upstream = ones * (2 * p.total_rows) * weight_unit
    evaluation = Evaluation([p.rows, p.cols], scalars, p.spec, saved, upstream, prepared, p.total_rows, 1)
    gradients: list[Tensor | None] = [None, None]
    col_factor = operands[1].factor
    if col_factor is not None and not p.circulates:
        col_factor = own_rows(col_factor, world)
    for side, (embedding, factor, products) in enumerate(
        ((p.rows, operands[0].factor, row_products), (p.cols, col_factor, col_products))
    ):
        if products is None:
            continue
        gradient = embedding.new_empty(embedding.shape)
        target, given = side, evaluation
        if not p.matched:  # no partners, no positives
            target, given = 0, evaluation._replace(embeddings=[embedding], spec=p.spec._replace(anchor=0))
        everything = slice(0, embedding.shape[0])
        p.backend.row_gradients([target], everything, [factor], [products], None, given, [gradient])
        gradients[side] = gradient
    if moment is None:
        return gradients, None
    scale_gradient = p.backend.scale_gradient(moment, evaluation).to(row_log.dtype)
    if prepared.positive_moment is not None:
        # It came from Σ H_ij·(x_ij − reference), with the negative mass for Σ H_ij off the diagonal, as in a loss.
        scale_gradient = scale_gradient + (entries + positive_entries) * prepared.reference / per_cosine
    return gradients, scale_gradient.to(p.logit_scale.dtype)


def _with_weights_near_one(
    p: _Problem, sums: SoftmaxSums | SigmoidWeights
) -> tuple[SoftmaxSums | SigmoidWeights, Tensor | float]:
    """Weights divided by a power of two, and this: what a backend keeps in float16 is scaled for weights up to one.

    Those of a mean over many rows, or under the scaled loss that float16 is trained with, are of any size.
    """
    assert sums.row_weight is not None
    if p.rows.dtype != torch.float16:
        return sums, 1.0
    weights = {"row_weight": sums.row_weight, "negative_mass": sums.negative_mass}
    largest = sums.row_weight.abs().max()
    if isinstance(sums, SoftmaxSums):
        assert sums.col_weight is not None
        weights["col_weight"] = sums.col_weight
        largest = torch.maximum(largest, sums.col_weight.abs().max())
    unit = torch.exp2(torch.frexp(p.world.max(largest)).exponent.to(largest.dtype))
    return sums._replace(**{name: weight / unit for name, weight in weights.items()}), unit


# ---- operators ------------------------------------------------------------------------------------------------------

_INPUTS = "Tensor rows, Tensor cols, Tensor logit_scale"
_MASK = "Tensor? row_ids, Tensor? col_ids, Tensor? row_limit, Tensor? col_limit"
_HOW = "bool matched, bool normalize, str backend, str group"
library.define(f"similarity_logsumexp({_INPUTS}, {_MASK}, {_HOW}, int world_size) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(
    f"similarity_logsumexp_backward(Tensor? grad_row, Tensor? grad_col, Tensor? grad_positive, {_INPUTS}, {_MASK}, "
    f"Tensor row_sums, Tensor col_sums, Tensor all_col_sums, {_HOW}, bool[] needs) -> (Tensor, Tensor, Tensor)"
)
library.define(
    f"similarity_softplus({_INPUTS}, Tensor logit_bias, Tensor? row_ids, Tensor? col_ids, {_HOW}) "
    "-> (Tensor, Tensor, Tensor)"
)
library.define(
    f"similarity_softplus_backward(Tensor? grad_row, Tensor? grad_positive, {_INPUTS}, Tensor logit_bias, "
    f"Tensor? row_ids, Tensor? col_ids, Tensor sigmoid, {_HOW}, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


def _logsumexp(rows: Tensor, cols: Tensor, logit_scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    mask, (*how, _) = Mask(*arguments[:4]), arguments[4:]
    with no_autocast([rows]), on_device([rows]):
        return _log_sums(_problem(rows, cols, logit_scale, mask, *how))


def _logsumexp_fake(rows: Tensor, cols: Tensor, logit_scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    matched, world_size = arguments[4], arguments[8]
    n, k = rows.shape[0], cols.shape[0]
    sizes = n, k, n if matched else 0, k * world_size if world_size > 1 else 0
    return tuple(rows.new_empty(size, dtype=statistics_dtype(rows.device)) for size in sizes)


def _logsumexp_backward(
    grad_row: Tensor | None,
    grad_col: Tensor | None,
    grad_positive: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    logit_scale: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    mask, (row_sums, col_sums, all_cols, *how, needs) = Mask(*arguments[:4]), arguments[4:]
    with no_autocast([rows]), on_device([rows]):
        p = _problem(rows, cols, logit_scale, mask, *how, again=True)
        grads = grad_row, grad_col, grad_positive
        gradients, of_scale = _log_sum_gradients(p, grads, row_sums, col_sums, all_cols, needs)
    return tuple(fill_absent([rows, cols, logit_scale], [*gradients, of_scale]))


def _softplus(
    rows: Tensor, cols: Tensor, logit_scale: Tensor, logit_bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    mask, how = Mask(*arguments[:2]), arguments[2:]
    with no_autocast([rows]), on_device([rows]):
        p = _problem(rows, cols, logit_scale, mask, *how, bias=logit_bias)
        operands, cosines = p.operands()
        bias = logit_bias.to(cosines.dtype) * LOG2_E
        parts = [p.backend.softplus_sums(matrix, bias) for matrix, _ in p.matrices(operands)]
        softplus, sigmoid = (x[0] if len(parts) == 1 else torch.stack(x).sum(dim=0) for x in zip(*parts, strict=True))
        return softplus, cosines * logit_scale.to(cosines.dtype), sigmoid


def _softplus_fake(
    rows: Tensor, cols: Tensor, logit_scale: Tensor, logit_bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    n, matched = rows.shape[0], arguments[2]
    return tuple(rows.new_empty(size, dtype=statistics_dtype(rows.device)) for size in (n, n if matched else 0, n))


def _softplus_backward(
    grad_row: Tensor | None,
    grad_positive: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    mask, (sigmoid, *how, needs) = Mask(*arguments[:2]), arguments[2:]
    with no_autocast([rows]), on_device([rows]):
        p = _problem(rows, cols, logit_scale, mask, *how, bias=logit_bias, again=True)
        gradients, of_scale = _softplus_gradients(p, (grad_row, grad_positive), logit_bias, sigmoid, needs)
    return tuple(fill_absent([rows, cols, logit_scale], [*gradients, of_scale]))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *_, needs = arguments
    first = next(i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.dim() == 2)
    inputs = arguments[first : first + 3]
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in zip(inputs, needs, strict=True))


def _setup_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    row_sums, col_sums, _, all_cols = output
    ctx.mark_non_differentiable(all_cols)
    ctx.save_for_backward(*inputs[:7], row_sums, col_sums, all_cols)
    ctx.how = inputs[7:11]


def _differentiate_logsumexp(
    ctx: Any, grad_row: Tensor | None, grad_col: Tensor | None, grad_positive: Tensor | None, _: Any
) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    needs = [t.requires_grad for t in tensors[:3]]
    grads = grad_row, grad_col, grad_positive
    if not any(needs) or all(grad is None for grad in grads):
        return (None,) * 12
    gradients = torch.ops.gapkernels.similarity_logsumexp_backward(*grads, *tensors, *ctx.how, needs)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *(None,) * 9


def _setup_softplus(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.how = inputs[6:10]


def _differentiate_softplus(ctx: Any, grad_row: Tensor | None, grad_positive: Tensor | None, _: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    needs = [t.requires_grad for t in tensors[:3]]
    bias, sigmoid = tensors[3], tensors[6]
    if grad_row is None and grad_positive is None:
        return (None,) * 10
    gradients: list[Any] = [None] * 3
    if any(needs):
        found = torch.ops.gapkernels.similarity_softplus_backward(grad_row, grad_positive, *tensors, *ctx.how, needs)
        gradients = [g if needed else None for g, needed in zip(found, needs, strict=True)]
    bias_gradient = grad_row.dot(sigmoid).to(bias.dtype) if bias.requires_grad and grad_row is not None else None
    return *gradients, bias_gradient, *(None,) * 6


for _name, _forward, _fake, _setup, _differentiate, _backward in (
    (
        "similarity_logsumexp",
        _logsumexp,
        _logsumexp_fake,
        _setup_logsumexp,
        _differentiate_logsumexp,
        _logsumexp_backward,
    ),
    ("similarity_softplus", _softplus, _softplus_fake, _setup_softplus, _differentiate_softplus, _softplus_backward),
):
    library.impl(_name, _forward, "CompositeExplicitAutograd")
    library.impl(f"{_name}_backward", _backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gapkernels::{_name}", _fake, lib=library)
    torch.library.register_fake(f"gapkernels::{_name}_backward", _backward_fake, lib=library)
    torch.library.register_autograd(f"gapkernels::{_name}", _differentiate, setup_context=_setup, lib=library)
    torch.library.register_autograd(f"gapkernels::{_name}_backward", no_second_derivative, lib=library)
