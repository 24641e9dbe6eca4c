"""The loss as operators registered with ``torch.library``: opaque to torch.compile, differentiable once.

``gapkernels::loss`` returns ``(loss, terms, saved)``; ``gapkernels::loss_backward`` turns gradients of the first two
into gradients of the embeddings and of the logit scale. The specification travels as plain scalars.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gapkernels import backends, plan
from gapkernels.backends.exponential import statistics_dtype
from gapkernels.distributed import world_of
from gapkernels.rows import compute_dtype
from gapkernels.spec import LossSpec

_SPEC_SCHEMA = (
    "int anchor, bool all_pairs, float nce_weight, float atp_weight, float cu_weight, float uniformity_t, "
    "bool normalize, bool normalize_centroids"
)
_library = torch.library.Library("gapkernels", "DEF")
_library.define(
    f"loss(Tensor[] embeddings, Tensor logit_scale, {_SPEC_SCHEMA}, str backend, str group, int world_size) "
    "-> (Tensor, Tensor, Tensor[])"
)
_library.define(
    "loss_backward(Tensor? grad_loss, Tensor? grad_terms, Tensor[] embeddings, Tensor logit_scale, Tensor[] saved, "
    f"{_SPEC_SCHEMA}, str backend, str group, bool[] needs_grad) -> (Tensor[], Tensor)"
)


def loss(
    embeddings: list[Tensor], logit_scale: Tensor, spec: LossSpec, backend: str, group: str, world_size: int
) -> tuple[Tensor, Tensor]:
    """``(loss [], terms [5])``, both differentiable; see :class:`gapkernels.plan.Forward`."""
    value, terms, _ = torch.ops.gapkernels.loss(embeddings, logit_scale, *spec, backend, group, world_size)
    return value, terms


def _split(arguments: tuple[Any, ...]) -> tuple[LossSpec, tuple[Any, ...]]:
    count = len(LossSpec._fields)
    return LossSpec(*arguments[:count]), arguments[count:]


def _no_autocast(embeddings: list[Tensor]) -> torch.autocast:
    """The operators choose their own types; autocast would round the operands of the products inside them."""
    return torch.autocast(embeddings[0].device.type, enabled=False)


def _forward(embeddings: list[Tensor], logit_scale: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    spec, (backend, group, _) = _split(arguments)
    if logit_scale.device.type == "cpu" and not logit_scale > 0:
        raise ValueError(f"the logit scale (1/temperature) must be positive, got {logit_scale.item()}")
    implementation = backends.select(backend, embeddings[0])
    with _no_autocast(embeddings):
        result = plan.forward(embeddings, logit_scale, spec, implementation, world_of(group))
    return result.loss, result.terms, list(result.saved)


def _forward_fake(
    embeddings: list[Tensor], logit_scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    spec, (_, _, world_size) = _split(arguments)
    rows = embeddings[0].shape[0]
    pairs = len(spec.nce_pairs(len(embeddings))) if spec.nce_weight else 0
    dtype = compute_dtype(embeddings[0].dtype)
    statistics = statistics_dtype(embeddings[0].device)
    new = embeddings[0].new_empty
    saved = plan.Saved(
        row_log_sum=new((pairs, rows), dtype=statistics),
        col_log_sum=new((pairs, rows * world_size), dtype=statistics),
        wrong_share=new((pairs, rows), dtype=statistics),
        centroid=new((rows + 1 if spec.cu_weight else 0,), dtype=statistics),
    )
    return new((), dtype=dtype), new((5,), dtype=dtype), list(saved)


def _backward(
    grad_loss: Tensor | None,
    grad_terms: Tensor | None,
    embeddings: list[Tensor],
    logit_scale: Tensor,
    saved: list[Tensor],
    *arguments: Any,
) -> tuple[list[Tensor], Tensor]:
    spec, (backend, group, needs_grad) = _split(arguments)
    device = embeddings[0].device
    upstream = torch.zeros(3, dtype=statistics_dtype(device), device=device)
    if grad_loss is not None:
        for term, weight in enumerate((spec.nce_weight, spec.atp_weight, spec.cu_weight)):
            upstream[term] += weight * grad_loss
    if grad_terms is not None:
        upstream += grad_terms[:3]
    with _no_autocast(embeddings):
        gradients, scale_gradient = plan.backward(
            upstream,
            embeddings,
            logit_scale,
            plan.Saved(*saved),
            spec,
            backends.select(backend, embeddings[0]),
            world_of(group),
            needs_grad,
        )
    return _fill_absent(embeddings, gradients), logit_scale.new_empty(0) if scale_gradient is None else scale_gradient


def _backward_fake(
    grad_loss: Tensor | None,
    grad_terms: Tensor | None,
    embeddings: list[Tensor],
    logit_scale: Tensor,
    saved: list[Tensor],
    *arguments: Any,
) -> tuple[list[Tensor], Tensor]:
    _, (_, _, needs_grad) = _split(arguments)
    *embedding_needs_grad, scale_needs_grad = needs_grad
    gradients = [
        e.new_empty(e.shape) if needed else None for e, needed in zip(embeddings, embedding_needs_grad, strict=True)
    ]
    return _fill_absent(embeddings, gradients), logit_scale.new_empty(() if scale_needs_grad else (0,))


def _fill_absent(embeddings: list[Tensor], gradients: list[Tensor | None]) -> list[Tensor]:
    """Operators return tensors only: an empty one stands for a gradient nobody asked for."""
    return [e.new_empty(0) if g is None else g for e, g in zip(embeddings, gradients, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    embeddings, logit_scale, *arguments = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*embeddings, logit_scale, *output[2])
    ctx.modalities = len(embeddings)
    ctx.arguments = arguments


def _differentiate(ctx: Any, grad_loss: Tensor | None, grad_terms: Tensor | None, _: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes them on access
    embeddings, logit_scale, saved = (
        list(tensors[: ctx.modalities]),
        tensors[ctx.modalities],
        list(tensors[ctx.modalities + 1 :]),
    )
    spec, (backend, group, _) = _split(tuple(ctx.arguments))
    needs_grad = [e.requires_grad for e in embeddings] + [logit_scale.requires_grad]
    no_gradients = (None,) * len(ctx.arguments)
    if grad_loss is None and grad_terms is None:
        return [None] * len(embeddings), None, *no_gradients
    gradients, scale_gradient = torch.ops.gapkernels.loss_backward(
        grad_loss, grad_terms, embeddings, logit_scale, saved, *spec, backend, group, needs_grad
    )
    *embedding_needs_grad, scale_needs_grad = needs_grad
    gradients = [g if needed else None for g, needed in zip(gradients, embedding_needs_grad, strict=True)]
    return gradients, scale_gradient if scale_needs_grad else None, *no_gradients


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "the fused loss has first derivatives only, and a second derivative was asked for (create_graph=True); "
        'compute it with backend="reference", which is plain autograd and needs O(N²) memory'
    )


_library.impl("loss", _forward, "CompositeExplicitAutograd")
_library.impl("loss_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gapkernels::loss", _forward_fake, lib=_library)
torch.library.register_fake("gapkernels::loss_backward", _backward_fake, lib=_library)
torch.library.register_autograd("gapkernels::loss", _differentiate, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("gapkernels::loss_backward", _no_second_derivative, lib=_library)
