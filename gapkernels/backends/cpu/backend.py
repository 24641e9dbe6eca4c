"""The functions of the contract, each one call into C++ (``csrc/cpu/binding.cpp``)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from gapkernels.backends.contract import (
    SUMS_OF,
    Centroids,
    Evaluation,
    Forward,
    LogSums,
    Matrix,
    Operand,
    PreparedSums,
    RowStatistics,
    Saved,
    Scalars,
    SigmoidWeights,
    SoftmaxSums,
    SoftplusSums,
)
from gapkernels.backends.cpu import build
from gapkernels.spec import LossSpec

RESULTS = (Operand, RowStatistics, Centroids, LogSums, Saved, Forward, PreparedSums, SoftplusSums)
"""The named tuples that the module makes, in the order in which it expects them."""


class CpuBackend:
    """``backend="cpu"``; see ``gapkernels.backends.contract.Backend``.

    Raises:
        BuildError: the kernels cannot be compiled or loaded.
    """

    sums_of = SUMS_OF
    gradient_block = None  # tiles are formed inside

    def __init__(self) -> None:
        self._kernels = build.load()
        self._kernels.bind(torch.Tensor.__dlpack_c_exchange_api__, RESULTS)
        self.steps = Steps(self._kernels)

    def row_statistics(self, embeddings: list[Tensor], spec: LossSpec) -> tuple[list[Operand], RowStatistics]:
        return self._kernels.row_statistics(embeddings, spec)

    def operand(self, embedding: Tensor, spec: LossSpec) -> Operand:
        return self._kernels.operand(embedding, spec)

    def centroids(
        self, embeddings: list[Tensor], sums: Tensor, uniformity_t: Tensor, total_rows: int, spec: LossSpec
    ) -> Centroids:
        return self._kernels.centroids(embeddings, sums, uniformity_t, total_rows, spec)

    def log_sums(self, matrices: list[Matrix], zeros: Tensor | None = None, keep: int = 0) -> LogSums:
        return self._kernels.log_sums(matrices, keep)

    def softplus_sums(self, matrix: Matrix, bias: Tensor) -> SoftplusSums:
        return self._kernels.softplus_sums(matrix, bias)

    def terms(
        self,
        embeddings: list[Tensor],
        statistics: RowStatistics,
        all_cosines: Tensor,
        pair_sums: LogSums | None,
        centroid_log_sums: Tensor | None,
        scalars: Scalars,
        first_row: int,
        spec: LossSpec,
    ) -> Forward:
        return self._kernels.terms(
            embeddings, statistics, all_cosines, pair_sums, centroid_log_sums, scalars, first_row, spec
        )

    def softmax_sums(self, saved: Saved, scalars: Scalars, total_rows: int) -> PreparedSums:
        return self._kernels.softmax_sums(saved, scalars, total_rows)

    def add_products(
        self,
        block: Matrix,
        sums: SoftmaxSums | SigmoidWeights | None,
        prepared: PreparedSums,
        row_products: Tensor | None,
        col_products: Tensor | None,
        moment: Tensor | None,
        first_rows: bool = False,
        first_cols: bool = False,
    ) -> None:
        self._kernels.add_products(block, sums, prepared, row_products, col_products, moment, first_rows, first_cols)

    def moment_buffer(self, like: Matrix) -> Tensor:
        return self._kernels.moment_buffer(like)

    def row_gradients(
        self,
        targets: list[int],
        rows: slice,
        factors: list[Tensor | None],
        products: list[Tensor | None],
        centroid_products: Tensor | None,
        evaluation: Evaluation,
        out: list[Tensor],
        moment: Tensor | None = None,
    ) -> None:
        self._kernels.row_gradients(targets, rows, factors, products, centroid_products, evaluation, out)

    def scale_gradient(self, moment: Tensor, evaluation: Evaluation) -> Tensor:
        return self._kernels.scale_gradient(moment, evaluation)


class Steps:
    """Evaluations in two calls, without the plan; see ``csrc/cpu/step.cpp``."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def find(self, spec: LossSpec, needs_grad: tuple[bool, ...], tensors: tuple[Tensor, ...]) -> Step | None:
        """None where rows are not contiguous or not normalised: the plan sees to those."""
        embeddings = tensors[3:]
        if not spec.normalize or tensors[3].shape[0] == 0 or any(e.stride(1) != 1 for e in embeddings):
            return None
        return Step(self._kernels, spec, needs_grad)


class Step:
    """One evaluation, in the form of ``gapkernels.backends.triton.steps.Step``."""

    repeats_forward = repeats_backward = True

    def __init__(self, kernels: ModuleType, spec: LossSpec, needs_grad: tuple[bool, ...]) -> None:
        self.kernels = kernels
        self.spec = spec
        self.needs_grad = needs_grad

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        return self.kernels.step_forward(self.spec, tensors, True in self.needs_grad)

    def backward(
        self, tensors: tuple[Tensor, ...], grad_loss: Tensor | None, grad_terms: Tensor | None, workspace: Tensor
    ) -> list[Tensor]:
        return self.kernels.step_backward(self.spec, tensors, grad_loss, grad_terms, workspace, self.needs_grad)
