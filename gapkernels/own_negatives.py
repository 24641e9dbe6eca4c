"""Inner products of each row with candidates of its own, as an operator: O(n·K) memory beside inputs and gradients.

``gapkernels::own_products``: ⟨x_i, y_ik⟩, or the cosine, for rows ``[n, D]`` and ``[n, K, D]``. Rows of 16 bits are
widened some at a time, in the backward pass again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gapkernels.backends.contract import NORM_EPS, compute_dtype, statistics_dtype
from gapkernels.ops import fill_absent, library, no_second_derivative

_NUMBERS_AT_ONCE = 2**20

library.define("own_products(Tensor rows, Tensor own, bool normalize) -> Tensor")
library.define(
    "own_products_backward(Tensor grad, Tensor rows, Tensor own, Tensor products, bool normalize, bool[] needs) "
    "-> (Tensor, Tensor)"
)


def own_products(rows: Tensor, own: Tensor, normalize: bool) -> Tensor:
    """Products of row i with each of ``own[i]``, ``[n, K]`` in the statistics type; cosines if ``normalize``."""
    return torch.ops.gapkernels.own_products(rows, own, normalize)


def _forward(rows: Tensor, own: Tensor, normalize: bool) -> Tensor:
    products = rows.new_empty(own.shape[:2], dtype=statistics_dtype(rows.device))
    for block, x, y in _blocks(rows, own):
        found = torch.bmm(y, x[:, :, None])[:, :, 0].to(products.dtype)
        if normalize:
            found /= _norms(y).to(found.dtype) * _norms(x).to(found.dtype)[:, None]
        products[block] = found
    return products


def _backward(
    grad: Tensor, rows: Tensor, own: Tensor, products: Tensor, normalize: bool, needs: list[bool]
) -> tuple[Tensor, ...]:
    gradients = [x.new_empty(x.shape) if needed else None for x, needed in zip((rows, own), needs, strict=True)]
    for block, x, y in _blocks(rows, own):
        g = grad[block].to(x.dtype)
        if normalize:
            # ∂cos/∂x = (ŷ − cos·x̂)/‖x‖, without the second term where a norm is raised to the smallest there is.
            of_x, of_y = _norms(x)[:, None], _norms(y)[:, :, None]
            x, y = x / of_x, y / of_y
            weighted = g * products[block].to(x.dtype)
            along_x = weighted.sum(dim=1, keepdim=True) * (of_x > NORM_EPS)
            along_y = weighted[:, :, None] * (of_y > NORM_EPS)
        if gradients[0] is not None:
            found = torch.bmm(g[:, None], y)[:, 0]
            gradients[0][block] = (found - along_x * x) / of_x if normalize else found
        if gradients[1] is not None:
            found = g[:, :, None] * x[:, None]
            gradients[1][block] = (found - along_y * y) / of_y if normalize else found
    return tuple(fill_absent([rows, own], gradients))


def _blocks(rows: Tensor, own: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows with their own, widened."""
    dtype = compute_dtype(rows.dtype)
    count = max(1, _NUMBERS_AT_ONCE // (own.shape[1] * own.shape[2]))
    for start in range(0, rows.shape[0], count):
        block = slice(start, start + count)
        yield block, rows[block].to(dtype), own[block].to(dtype)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).clamp_min(NORM_EPS)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], output)
    ctx.normalize = inputs[2]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    needs = [x.requires_grad for x in tensors[:2]]
    found = torch.ops.gapkernels.own_products_backward(grad, *tensors, ctx.normalize, needs)
    return *(g if needed else None for g, needed in zip(found, needs, strict=True)), None


def _fake(rows: Tensor, own: Tensor, normalize: bool) -> Tensor:
    return rows.new_empty(own.shape[:2], dtype=statistics_dtype(rows.device))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    rows, own, needs = arguments[1], arguments[2], arguments[5]
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in zip((rows, own), needs, strict=True))


library.impl("own_products", _forward, "CompositeExplicitAutograd")
library.impl("own_products_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gapkernels::own_products", _fake, lib=library)
torch.library.register_fake("gapkernels::own_products_backward", _backward_fake, lib=library)
torch.library.register_autograd("gapkernels::own_products", _differentiate, setup_context=_setup, lib=library)
torch.library.register_autograd("gapkernels::own_products_backward", no_second_derivative, lib=library)
