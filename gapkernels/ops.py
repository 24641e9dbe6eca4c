"""The loss as autograd knows it: a function for eager calls, and operators for everything that traces.

Eager calls take a plain ``autograd.Function``, which costs the host least. Under torch.compile, export and other
tracing the same evaluation is two operators registered with ``torch.library``, opaque to the tracer:
``gapkernels::loss`` returns ``(loss, terms, saved)``; ``gapkernels::loss_backward`` turns gradients of the first two
into gradients of the embeddings and of the logit scale. What may change from step to step travels as tensors, so that
nothing is compiled anew and no old value is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gapkernels import backends, plan
from gapkernels.backends.contract import (
    SUM_SCALARS,
    Backend,
    Forward,
    Kept,
    Saved,
    Scalars,
    compute_dtype,
    statistics_dtype,
    upstream_of,
)
from gapkernels.checks import is_tracing
from gapkernels.distributed import world_of
from gapkernels.spec import LossSpec

_SPEC_SCHEMA = (
    "int anchor, bool all_pairs, bool nce, bool atp, bool cu, bool normalize, bool normalize_centroids, int kept_bytes"
)
_INPUT_SCHEMA = "Tensor[] embeddings, Tensor logit_scale, Tensor weights, Tensor uniformity_t"
library = torch.library.Library("gapkernels", "DEF")
library.define(
    f"loss({_INPUT_SCHEMA}, {_SPEC_SCHEMA}, str backend, str group, int world_size) -> (Tensor, Tensor, Tensor[])"
)
library.define(
    f"loss_backward(Tensor? grad_loss, Tensor? grad_terms, {_INPUT_SCHEMA}, Tensor[] saved, {_SPEC_SCHEMA}, "
    "str backend, str group, bool[] needs_grad) -> (Tensor[], Tensor)"
)


def loss(
    embeddings: list[Tensor], scalars: Scalars, spec: LossSpec, backend: str, group: str, world_size: int
) -> tuple[Tensor, Tensor]:
    """``(loss [], terms [5])``, both differentiable; see ``gapkernels.backends.contract.Forward``.

    Raises:
        RuntimeError: a transform of ``torch.func`` is active, or an input carries a forward-mode derivative.
    """
    if _is_traced(embeddings):
        value, terms, _ = torch.ops.gapkernels.loss(embeddings, *scalars, *spec, backend, group, world_size)
        return value, terms
    return _eagerly(_Loss, embeddings, scalars, spec, backend, group)


def loss_alone(
    embeddings: list[Tensor], scalars: Scalars, spec: LossSpec, backend: str, group: str, world_size: int
) -> Tensor:
    """``loss`` without the terms: each result of a function costs autograd some microseconds.

    Raises:
        RuntimeError: as ``loss``.
    """
    if _is_traced(embeddings):
        return loss(embeddings, scalars, spec, backend, group, world_size)[0]
    return _eagerly(_LossAlone, embeddings, scalars, spec, backend, group)


def _eagerly(
    function: type[torch.autograd.Function],
    embeddings: list[Tensor],
    scalars: Scalars,
    spec: LossSpec,
    backend: str,
    group: str,
) -> Any:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the fused loss cannot be transformed by torch.func (jvp, vmap, grad, jacrev, jacfwd, hessian); "
            'compute it with backend="reference", which is plain autograd and needs O(N²) memory'
        )
    if not torch.is_grad_enabled():
        # Else the function would take its inputs to need gradients, and keep what these need.
        embeddings, scalars = [e.detach() for e in embeddings], Scalars(*(number.detach() for number in scalars))
    tensors = map(torch._C._functorch.unwrap_if_dead, (*scalars, *embeddings))
    # Past Function.apply, which asks again what has been asked here, argument by argument: some microseconds.
    return super(torch.autograd.Function, function).apply(spec, backend, group, *tensors)  # type: ignore[misc]


def _is_traced(embeddings: list[Tensor]) -> bool:
    """Whether somebody looks at the operators of this call: a tracer, fake tensors, a subclass of Tensor."""
    return is_tracing() or any(type(e) is not Tensor and type(e) is not torch.nn.Parameter for e in embeddings)


def no_autocast(embeddings: list[Tensor]) -> AbstractContextManager[Any]:
    """The evaluation chooses its own types; autocast would round the operands of the products inside it."""
    device = embeddings[0].device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def on_device(embeddings: list[Tensor]) -> AbstractContextManager[Any]:
    """Make the device of the embeddings the one that kernels are launched on."""
    device = embeddings[0].device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- evaluation ---------------------------------------------------------------------------------------------------


def _evaluate(
    implementation: Backend,
    embeddings: list[Tensor],
    scalars: Scalars,
    spec: LossSpec,
    group: str,
    needs_grad: Sequence[bool],
    keep: bool = False,
) -> Forward:
    with no_autocast(embeddings), on_device(embeddings):
        return plan.forward(embeddings, scalars, spec, implementation, world_of(group), list(needs_grad), keep)


def _gradients(
    implementation: Backend,
    upstream: Tensor,
    embeddings: list[Tensor],
    scalars: Scalars,
    saved: Saved,
    spec: LossSpec,
    group: str,
    needs_grad: Sequence[bool],
    kept: Kept | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    with no_autocast(embeddings), on_device(embeddings):
        return plan.backward(
            upstream, embeddings, scalars, saved, spec, implementation, world_of(group), list(needs_grad), kept
        )


def _weight_gradient(grad_loss: Tensor | None, terms: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the loss with respect to its weights: the terms."""
    if grad_loss is None:
        return torch.zeros_like(weights)
    return terms[:3].to(weights.dtype) * grad_loss.to(weights.dtype)


def no_second_derivative(*_: Any) -> None:
    raise RuntimeError(
        "the fused loss has first derivatives only, and a second derivative was asked for (create_graph=True); "
        'compute it with backend="reference", which is plain autograd and needs O(N²) memory'
    )


# ---- eager calls --------------------------------------------------------------------------------------------------


class _Loss(torch.autograd.Function):
    """``(spec, backend, group, logit_scale, weights, uniformity_t, *embeddings)`` to ``(loss, terms)``."""

    @staticmethod
    def forward(ctx: Any, spec: LossSpec, backend: str, group: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad
        needs_grad = (*needs[6:], needs[3])
        implementation = backends.select(backend, tensors[3], spec)
        steps = None if group else implementation.steps
        step = None if steps is None else steps.find(spec, needs_grad, tensors)
        ctx.set_materialize_grads(False)
        ctx.arguments = spec, implementation, group, needs_grad, step
        if step is not None and step.repeats_forward:
            loss, terms, workspace = step.forward(tensors)
            ctx.kept_shape = None
            ctx.save_for_backward(*tensors, terms, workspace)
            return loss, terms

        def run() -> Forward:
            scalars, embeddings = Scalars(*tensors[:3]), list(tensors[3:])
            return _evaluate(implementation, embeddings, scalars, spec, group, needs_grad, True in needs_grad)

        result = run() if step is None else step.record_forward(tensors, run)
        kept, ctx.kept_shape = (Kept([], None, None) if result.kept is None else result.kept).flattened()
        ctx.save_for_backward(*tensors, result.terms, *result.saved, *kept)
        return result.loss, result.terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_terms: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes them on access
        if grad_loss is None and grad_terms is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():  # create_graph=True
            return _LossBackward.apply(ctx, grad_loss, grad_terms, *tensors)
        return _first_derivatives(ctx, tensors, grad_loss, grad_terms)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(
            "the fused loss has no forward-mode derivative (torch.autograd.forward_ad); "
            'compute it with backend="reference", which is plain autograd and needs O(N²) memory'
        )


class _LossAlone(torch.autograd.Function):
    """``_Loss`` without its second result."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        return _Loss.forward(ctx, *arguments)[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Any, ...]:
        return _Loss.backward(ctx, grad_loss, None)

    jvp = _Loss.jvp


def _first_derivatives(
    ctx: Any, tensors: tuple[Tensor, ...], grad_loss: Tensor | None, grad_terms: Tensor | None
) -> tuple[Any, ...]:
    spec, implementation, group, needs_grad, step = ctx.arguments
    _, _, _, scale_needs, weights_need, _, *embeddings_need = ctx.needs_input_grad
    count = 3 + len(embeddings_need)
    inputs, terms = tensors[:count], tensors[count]
    weight_gradient = _weight_gradient(grad_loss, terms, tensors[1]) if weights_need else None
    if ctx.kept_shape is None and step.repeats_backward:
        found = iter(step.backward(inputs, grad_loss, grad_terms, tensors[-1]))
        gradients = [next(found) if needed else None for needed in embeddings_need]
        return None, None, None, next(found) if scale_needs else None, weight_gradient, None, *gradients
    upstream = upstream_of(grad_loss, grad_terms, tensors[1])
    if ctx.kept_shape is None:
        saved, kept = step.saved(tensors[-1])
    else:
        last = count + 1 + len(Saved._fields)
        saved, kept = Saved(*tensors[count + 1 : last]), Kept.from_flattened(tensors[last:], ctx.kept_shape)

    def run() -> tuple[list[Tensor | None], Tensor | None]:
        embeddings, scalars = list(inputs[3:]), Scalars(*inputs[:3])
        return _gradients(implementation, upstream, embeddings, scalars, saved, spec, group, needs_grad, kept)

    if step is None:
        gradients, scale_gradient = run()
    else:
        gradients, scale_gradient = step.record_backward(inputs, upstream, saved, kept, run)
    return None, None, None, scale_gradient, weight_gradient, None, *gradients


class _LossBackward(torch.autograd.Function):
    """The first derivatives where a graph of them is wanted: differentiating them again is refused."""

    @staticmethod
    def forward(
        ctx: Any, outer: Any, grad_loss: Tensor | None, grad_terms: Tensor | None, *tensors: Tensor
    ) -> tuple[Any, ...]:
        return _first_derivatives(outer, tensors, grad_loss, grad_terms)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        no_second_derivative()


# ---- operators ----------------------------------------------------------------------------------------------------


def _split(arguments: tuple[Any, ...]) -> tuple[LossSpec, tuple[Any, ...]]:
    count = len(LossSpec._fields)
    return LossSpec(*arguments[:count]), arguments[count:]


def _forward_operator(
    embeddings: list[Tensor], logit_scale: Tensor, weights: Tensor, uniformity_t: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    spec, (backend, group, _) = _split(arguments)
    if logit_scale.device.type == "cpu":  # eager calls have been checked
        value = logit_scale.item()
        if value <= 0 or value == float("inf"):
            raise ValueError(f"the logit scale (1/temperature) must be positive and finite, got {value}")
    needs_grad = [tensor.requires_grad for tensor in (*embeddings, logit_scale)]
    scalars = Scalars(logit_scale, weights, uniformity_t)
    result = _evaluate(backends.select(backend, embeddings[0], spec), embeddings, scalars, spec, group, needs_grad)
    return result.loss, result.terms, list(result.saved)


def _forward_fake(
    embeddings: list[Tensor], logit_scale: Tensor, weights: Tensor, uniformity_t: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    spec, (_, _, world_size) = _split(arguments)
    (rows, dim), modalities = embeddings[0].shape, len(embeddings)
    pairs = len(spec.nce_pairs(modalities))
    dtype = compute_dtype(embeddings[0].dtype)
    statistics = statistics_dtype(embeddings[0].device)

    def new(*shape: int) -> Tensor:
        return embeddings[0].new_empty(shape, dtype=statistics)

    saved = Saved(
        row_log_sum=new(pairs, rows),
        col_log_sum=new(pairs, rows * world_size),
        negative_mass=new(pairs, rows),
        cosines=new(pairs, rows),
        sums=new((modalities + 1) * dim + SUM_SCALARS),
        centroid_log_sum=new(rows if spec.cu else 0),
        centroid_summary=new(2 if spec.cu else 0),
    )
    return embeddings[0].new_empty((), dtype=dtype), embeddings[0].new_empty((5,), dtype=dtype), list(saved)


def _backward_operator(
    grad_loss: Tensor | None,
    grad_terms: Tensor | None,
    embeddings: list[Tensor],
    logit_scale: Tensor,
    weights: Tensor,
    uniformity_t: Tensor,
    saved: list[Tensor],
    *arguments: Any,
) -> tuple[list[Tensor], Tensor]:
    spec, (backend, group, needs_grad) = _split(arguments)
    scalars = Scalars(logit_scale, weights, uniformity_t)
    implementation = backends.select(backend, embeddings[0], spec)
    upstream = upstream_of(grad_loss, grad_terms, weights)
    gradients, scale_gradient = _gradients(
        implementation, upstream, embeddings, scalars, Saved(*saved), spec, group, needs_grad
    )
    return fill_absent(embeddings, gradients), logit_scale.new_empty(0) if scale_gradient is None else scale_gradient


def _backward_fake(
    grad_loss: Tensor | None,
    grad_terms: Tensor | None,
    embeddings: list[Tensor],
    logit_scale: Tensor,
    weights: Tensor,
    uniformity_t: Tensor,
    saved: list[Tensor],
    *arguments: Any,
) -> tuple[list[Tensor], Tensor]:
    _, (_, _, needs_grad) = _split(arguments)
    *embedding_needs_grad, scale_needs_grad = needs_grad
    gradients = [
        e.new_empty(e.shape) if needed else None for e, needed in zip(embeddings, embedding_needs_grad, strict=True)
    ]
    return fill_absent(embeddings, gradients), logit_scale.new_empty(() if scale_needs_grad else (0,))


def fill_absent(inputs: list[Tensor], gradients: list[Tensor | None]) -> list[Tensor]:
    """Operators return tensors only: an empty one stands for a gradient nobody asked for."""
    return [x.new_empty(0) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    embeddings, logit_scale, weights, uniformity_t, *arguments = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*embeddings, logit_scale, weights, uniformity_t, output[1], *output[2])
    ctx.modalities = len(embeddings)
    ctx.arguments = arguments


def _differentiate(ctx: Any, grad_loss: Tensor | None, grad_terms: Tensor | None, _: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes them on access
    embeddings = list(tensors[: ctx.modalities])
    logit_scale, weights, uniformity_t, terms, *saved = tensors[ctx.modalities :]
    spec, (backend, group, _) = _split(tuple(ctx.arguments))
    needs_grad = [e.requires_grad for e in embeddings] + [logit_scale.requires_grad]
    no_gradients = (None,) * len(ctx.arguments)
    if grad_loss is None and grad_terms is None:
        return [None] * len(embeddings), None, None, None, *no_gradients
    gradients, scale_gradient = torch.ops.gapkernels.loss_backward(
        grad_loss, grad_terms, embeddings, logit_scale, weights, uniformity_t, saved, *spec, backend, group, needs_grad
    )
    *embedding_needs_grad, scale_needs_grad = needs_grad
    gradients = [g if needed else None for g, needed in zip(gradients, embedding_needs_grad, strict=True)]
    weight_gradient = _weight_gradient(grad_loss, terms, weights) if weights.requires_grad else None
    return gradients, scale_gradient if scale_needs_grad else None, weight_gradient, None, *no_gradients


library.impl("loss", _forward_operator, "CompositeExplicitAutograd")
library.impl("loss_backward", _backward_operator, "CompositeExplicitAutograd")
torch.library.register_fake("gapkernels::loss", _forward_fake, lib=library)
torch.library.register_fake("gapkernels::loss_backward", _backward_fake, lib=library)
torch.library.register_autograd("gapkernels::loss", _differentiate, setup_context=_setup_context, lib=library)
torch.library.register_autograd("gapkernels::loss_backward", no_second_derivative, lib=library)
