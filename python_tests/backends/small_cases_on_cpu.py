"""Calls every function of the CPU backend on small inputs whose storages end where they do: a sanitizer's work.

A program, not a test: ``test_cpu_build.py`` runs it with kernels that were compiled with a sanitizer.
"""

from __future__ import annotations

import itertools
import os

import torch

from gapkernels import gap_loss
from gapkernels.backends import cpu
from gapkernels.backends.contract import NO_DIAGONAL, Matrix, PreparedSums, SoftmaxSums
from gapkernels.spec import LossSpec

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = ((2, 1), (3, 7), (16, 32), (65, 33), (129, 64), (70, 100))
OPTIONS: tuple[dict, ...] = (
    {},
    {"pairs": "all", "anchor": 1, "normalize_centroids": False},
    {"normalize": False},
    {"normalize": False, "normalize_centroids": False},
    {"nce_weight": 0.0},
    {"cu_weight": 0.0},
)


def evaluate(embeddings: list[torch.Tensor], **options: object) -> None:
    leaves = [e.detach().clone().requires_grad_() for e in embeddings]
    scale = torch.tensor(options.pop("scale", 10.0), requires_grad=True)
    loss = gap_loss(*leaves, logit_scale=scale, backend="cpu", **options)
    loss.backward()
    # Gradients may leave the range of float16.
    finite = [loss, *(e.grad for e in leaves if e.dtype != torch.float16)]
    assert all(torch.isfinite(x).all() for x in finite), (loss, leaves[0].shape, leaves[0].dtype, options)


def read_past_the_end() -> None:
    """Where the sanitizer is at work this ends the process."""
    x = torch.randn(40, 8)
    kernels = cpu.create()
    operand = kernels.operand(x, LossSpec())
    matrix = Matrix(*operand, *operand, torch.tensor(1.0), None, NO_DIAGONAL)
    zero = torch.zeros((), dtype=torch.float64)
    too_short = torch.zeros(30, dtype=torch.float64)
    sums = SoftmaxSums(too_short, too_short, too_short)
    kernels.add_products(matrix, sums, PreparedSums(zero, zero, zero, zero, None), torch.zeros(40, 8), None, None)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, (rows, width) in itertools.product(TYPES, SIZES):
        embeddings = [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(3)]
        for options in OPTIONS if rows == 65 else ({},):
            evaluate(embeddings, **options)
        x = embeddings[0]
        evaluate([x[:1] + x / 50, -x[:1] + embeddings[1] / 50], scale=1000.0, cu_weight=0.0)  # the robust path
        evaluate([x * 1e-3, torch.zeros_like(x)])
    for dtype in TYPES:
        # More rows than a block of the gradient has, odd strides, threads.
        storage = torch.randn(2, 1100, 47, generator=generator).to(dtype)
        evaluate([part[1:, 1:41] for part in storage])
    # Enough of them for centroids in float16.
    evaluate(list(torch.randn(2, 1100, 64, generator=generator).to(torch.bfloat16)))


if __name__ == "__main__":
    if os.fork() == 0:
        read_past_the_end()
        os._exit(0)
    _, status = os.wait()
    print("found on purpose" if status else "the sanitizer is not at work", flush=True)
    main()
    print("all cases done")
