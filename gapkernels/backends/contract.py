"""What the plan and the backends share: the contract of functions, and the values that pass through it.

The plan (``gapkernels.plan``) decides order, pairs, blocks, the triangle and the processes. A backend computes. What
costs N² is a matrix of exponentials, or its gradient's products with the embeddings:

    e_ij = 2^x_ij      pairs of modalities   x_ij = s·log2 e · ⟨rows_i, cols_j⟩ · row_factor_i · col_factor_j
                       centroids             x_ij = s·log2 e · ⟨rows_i, cols_j⟩ + row_factor_i + col_factor_j

The matrix is never stored, and its diagonal, the positives, is left out of every sum and product. Positives enter in
O(N·D) steps, from the inner products of matching rows: ``1 − p_ii`` is then exact where a model is nearly right.

All logarithms are to base 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gapkernels.spec import LossSpec

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

NORM_EPS = 1e-12
"""Smallest norm a row is divided by, as in ``torch.nn.functional.normalize``."""

NO_DIAGONAL = -(1 << 30)
"""The diagonal of a block that has none."""

SUMS_OF = frozenset({"weights", "ids", "limits", "softplus"})
"""What the sums of one matrix need of a backend beyond those of a loss: weights in ``SoftmaxSums``, ids and limits of a
``Matrix``, ``softplus_sums`` with ``SigmoidWeights``."""

SUM_SCALARS = 4
"""How many scalars follow the vectors in ``RowStatistics.sums``."""


def statistics_dtype(device: torch.device) -> torch.dtype:
    """The type of O(N) statistics: float64, except on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the loss, for embeddings of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upstream_of(grad_loss: Tensor | None, grad_terms: Tensor | None, weights: Tensor) -> Tensor:
    """Gradient with respect to the first three terms, ``[3]`` in the statistics type.

    Args:
        grad_loss, grad_terms: with respect to the loss ``[]`` and to its terms ``[5]``; None where there is none.
        weights: of the terms, ``[3]``.
    """
    upstream = None
    if grad_loss is not None:
        upstream = weights * grad_loss  # of the weights' type: the gradient has no dimension
    if grad_terms is not None:
        of_terms = grad_terms[:3].to(weights.dtype)
        upstream = of_terms if upstream is None else upstream + of_terms
    assert upstream is not None, "nothing to differentiate"
    return upstream


def part(x: Tensor, rows: slice) -> Tensor:
    """Some rows; the tensor itself where these are all: small problems are bound by what the host does."""
    return x if rows.stop - rows.start == x.shape[0] else x[rows]


class Scalars(NamedTuple):
    """The numbers that may change from step to step, as 0-dim tensors on the device of the embeddings.

    Attributes:
        logit_scale: any floating type, positive.
        weights: ``[3]`` in the statistics type, of InfoNCE, ATP and CU.
        uniformity_t: in the statistics type, positive.
    """

    logit_scale: Tensor
    weights: Tensor
    uniformity_t: Tensor


class Operand(NamedTuple):
    """The rows of one modality as an operand of matrix products: row times factor is the vector that the loss uses.

    Attributes:
        rows: ``[n, D']``, D' ≥ D where a backend pads rows with zeros; unit stride along a row.
        factor: ``[n]``; None stands for ones.
    """

    rows: Tensor
    factor: Tensor | None


class RowStatistics(NamedTuple):
    """What matching rows alone contribute.

    Attributes:
        cosines: ``[P, n]`` in the statistics type, inner product of the matching rows of each InfoNCE pair, of the
            vectors as the loss uses them.
        sums: ``[(M + 1)·D + SUM_SCALARS]`` in the statistics type, over rows: of the unit vectors of each modality; of
            the centroids; then of ‖ẑ^m − ẑ^a‖² over ATP's pairs, of the cosines of all unordered pairs of modalities,
            of ‖c‖², and of ``cosines``.
        zeros: float32 zeros, made in passing, for ``Backend.log_sums`` of as many matrices as the evaluation has, of
            the own rows; None where the backend needs none.
    """

    cosines: Tensor
    sums: Tensor
    zeros: Tensor | None = None


class Centroids(NamedTuple):
    """Centroids less their mean, as an operand.

    Squared distances do not change if the mean is taken away, but in the form ‖c_i‖² + ‖c_j‖² − 2⟨c_i, c_j⟩ they then
    lose nothing when all centroids lie close together.

    Attributes:
        rows: ``[n, D']``, stretched by a factor 2^k of the backend's choice.
        bias: ``[n]``, −t·log2 e·‖c_i‖².
        scale: 0-dim, 2t·2^(−2k).
    """

    rows: Tensor
    bias: Tensor
    scale: Tensor


class Matrix(NamedTuple):
    """A matrix of exponentials, or a block of one.

    An entry counts neither for its row nor for its column where their ids are equal, and not for the one whose limit
    its exponent exceeds.

    Attributes:
        rows: ``[n, D']``.
        row_factor: ``[n]``, factors of a pair's rows (None stands for ones), or the biases of centroids.
        cols: ``[N, D']``, same type. The same tensor as ``rows`` if ``symmetric``.
        col_factor: ``[N]``, likewise.
        scale: 0-dim, any floating type: the factor s of the natural exponent.
        largest: 0-dim, no inner product of the vectors exceeds it; None for unit vectors and for centroids, whose
            exponents are not positive.
        diagonal: column of the diagonal entry of row 0; row i's is at ``diagonal + i``.
        biased: whether the factors are biases: the matrix of centroids.
        symmetric: rows and columns are the same, and each entry above the diagonal stands for two.
        row_ids: ``[n]`` int64; None together with ``col_ids`` where all entries off the diagonal count.
        col_ids: ``[N]`` int64.
        row_limit: ``[n]`` in the statistics type, the largest exponent that counts for a row; None for no limit.
        col_limit: ``[N]``, likewise for a column.
        entries: what ``Backend.log_sums`` kept of this matrix, to spare ``add_products`` work; None for nothing.
    """

    rows: Tensor
    row_factor: Tensor | None
    cols: Tensor
    col_factor: Tensor | None
    scale: Tensor
    largest: Tensor | None = None
    diagonal: int = 0
    biased: bool = False
    symmetric: bool = False
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None
    entries: Tensor | None = None

    @property
    def masked(self) -> bool:
        """Whether entries off the diagonal may be left out."""
        return self.row_ids is not None or self.row_limit is not None or self.col_limit is not None

    def block(self, row: slice, col: slice) -> Matrix:
        """The part that covers these rows and columns; of a symmetric matrix one on the diagonal stays symmetric."""
        if row.stop - row.start == self.rows.shape[0] and col.stop - col.start == self.cols.shape[0]:
            return self
        return self._replace(
            rows=part(self.rows, row),
            row_factor=None if self.row_factor is None else part(self.row_factor, row),
            cols=part(self.cols, col),
            col_factor=None if self.col_factor is None else part(self.col_factor, col),
            diagonal=NO_DIAGONAL if self.diagonal == NO_DIAGONAL else self.diagonal + row.start - col.start,
            symmetric=self.symmetric and row == col,
            row_ids=None if self.row_ids is None else part(self.row_ids, row),
            col_ids=None if self.col_ids is None else part(self.col_ids, col),
            row_limit=None if self.row_limit is None else part(self.row_limit, row),
            col_limit=None if self.col_limit is None else part(self.col_limit, col),
            entries=None if self.entries is None else part(self.entries, row)[:, col],
        )


class LogSums(NamedTuple):
    """Logarithms of the sums of m matrices of one shape, in the statistics type, diagonals left out.

    Attributes:
        rows: ``[m, n]``, log2 Σ_j e_ij; −∞ where there is no entry. All sums of a symmetric matrix.
        cols: ``[m, N]``, log2 Σ_i e_ij; the line of a symmetric matrix is undefined.
        entries: per matrix what was kept of it, or None; empty where nothing was to be kept. In a form of the backend's
            own: ``[n, N]`` where it has a ``gradient_block``.
    """

    rows: Tensor
    cols: Tensor
    entries: Sequence[Tensor | None] = ()


class Saved(NamedTuple):
    """What the backward pass needs besides the inputs: O(N) numbers in the statistics type.

    Attributes:
        row_log_sum: ``[P, n]``, log2 Σ_j e_ij of each InfoNCE pair, positive included.
        col_log_sum: ``[P, N]``, log2 Σ_i e_ij over the rows of all processes, positive included.
        negative_mass: ``[P, n]``, 1 − p_ii of the row soft-max plus that of the column soft-max.
        cosines: ``[P, n]``, see ``RowStatistics``.
        sums: see ``RowStatistics``, over the rows of all processes.
        centroid_log_sum: ``[n]``, log2 Σ_{j≠i} e_ij of the own centroids; ``[0]`` without CU.
        centroid_summary: ``[2]``, log2 Σ_{i<j} e_ij, and the largest log2 Σ_{j≠i} e_ij of all; ``[0]`` without CU.
    """

    row_log_sum: Tensor
    col_log_sum: Tensor
    negative_mass: Tensor
    cosines: Tensor
    sums: Tensor
    centroid_log_sum: Tensor
    centroid_summary: Tensor


class Terms(NamedTuple):
    """The parts of a loss, in the order in which one tensor ``[5]`` holds them.

    Attributes:
        info_nce: 0-dim, unweighted; zero where skipped.
        align_true_pairs: likewise.
        centroid_uniformity: likewise.
        modality_gap: 0-dim, for diagnosis; no gradient.
        true_pair_cosine: likewise.
    """

    info_nce: Tensor
    align_true_pairs: Tensor
    centroid_uniformity: Tensor
    modality_gap: Tensor
    true_pair_cosine: Tensor


class PreparedSums(NamedTuple):
    """The log sums of all pairs as a backend's gradient reads them.

    Attributes:
        rows: ``[P, n]``, relative to ``reference``.
        cols: ``[P, N]``, likewise.
        reference: 0-dim exponent, near that of the positives, so that float32 logarithms are small numbers.
        centroid_reference: 0-dim, log2 of what the entries of the centroid matrix are divided by.
        positive_moment: in the statistics type, per pair or in all, what the positives of the own rows add to the
            gradient of the scale, Σ negative_mass·(cosine − reference/(s·log2 e)); None where products include them.
    """

    rows: Tensor
    cols: Tensor
    reference: Tensor
    centroid_reference: Tensor
    positive_moment: Tensor | None


class Kept(NamedTuple):
    """What a forward pass has made that the backward pass would make again, where it is little enough to be kept.

    Attributes:
        operands: of every modality; none where they are to be made again.
        centroids: as an operand; None where they are to be made again, or without CU.
        prepared: what ``Backend.softmax_sums`` would return; None where the backend's terms do not make it in passing.
        columns: embeddings of all processes that were gathered, ``[N, D]`` each; none of one process alone.
        all_centroids: of all processes; None where they are made of the embeddings again.
        entries: ``LogSums.entries`` of the pairs and then of the centroids; empty where nothing was kept.
    """

    operands: list[Operand]
    centroids: Centroids | None
    prepared: PreparedSums | None
    columns: Sequence[Tensor] = ()
    all_centroids: Centroids | None = None
    entries: Sequence[Tensor | None] = ()

    def flattened(self) -> tuple[list[Tensor | None], tuple[int, ...]]:
        """As tensors, and how many of them are which."""
        optional = (self.centroids or (), self.prepared or (), self.all_centroids or ())
        shape = len(self.operands), len(self.columns), *(len(part) for part in optional), len(self.entries)
        parts: list[Sequence[Tensor | None]] = [*self.operands, self.columns, *optional, self.entries]
        return [tensor for part in parts for tensor in part], shape

    @classmethod
    def from_flattened(cls, tensors: Sequence[Any], shape: tuple[int, ...]) -> Kept:
        """What ``flattened`` returned, put together again."""
        rest = iter(tensors)
        operands, columns, centroids, prepared, all_centroids, entries = shape
        return cls(
            operands=[Operand(next(rest), next(rest)) for _ in range(operands)],
            columns=list(islice(rest, columns)),
            centroids=Centroids(*islice(rest, centroids)) if centroids else None,
            prepared=PreparedSums(*islice(rest, prepared)) if prepared else None,
            all_centroids=Centroids(*islice(rest, all_centroids)) if all_centroids else None,
            entries=list(islice(rest, entries)),
        )


class Forward(NamedTuple):
    """What a forward pass returns.

    Attributes:
        loss: 0-dim, the weighted sum of the terms.
        terms: ``[5]``, see ``Terms``.
        saved: for the backward pass.
        kept: to spare the backward pass work; a backend fills in ``prepared`` alone, if anything.
    """

    loss: Tensor
    terms: Tensor
    saved: Saved
    kept: Kept | None = None


class SoftmaxSums(NamedTuple):
    """What turns the exponentials of a block of a pair into the gradient of its symmetric cross-entropy.

        H_ij = 2^h·row_factor_i·col_factor_j·(row_weight_i·e_ij / 2^row_i + col_weight_j·e_ij / 2^col_j)

    off the diagonal, where each of the two counts only if the entry does for its row or its column.

    H multiplies rows and columns of the block as they are stored. The backend chooses h such that no entry underflows
    in its type; its ``row_gradients`` takes 2^h out again and puts in the weight of the pair. A backend whose entries
    are rounded to 16 bits leaves the positives, ``H_ii = −2^h·negative_mass_i``, to ``row_gradients`` too.

    Attributes:
        row: ``[R]`` log sums, positive included, as ``Backend.softmax_sums`` prepared them.
        col: ``[C]``, likewise.
        negative_mass: ``[R]`` in the statistics type, see ``Saved``.
        row_weight: ``[R]`` in the statistics type, of any sign; None stands for ones, together with ``col_weight``.
        col_weight: ``[C]``, likewise.
    """

    row: Tensor
    col: Tensor
    negative_mass: Tensor
    row_weight: Tensor | None = None
    col_weight: Tensor | None = None

    def block(self, row: slice, col: slice) -> SoftmaxSums:
        """The part that covers these rows and columns."""
        return SoftmaxSums(
            part(self.row, row),
            part(self.col, col),
            part(self.negative_mass, row),
            None if self.row_weight is None else part(self.row_weight, row),
            None if self.col_weight is None else part(self.col_weight, col),
        )


class SigmoidWeights(NamedTuple):
    """What turns a block of a pair into the gradient of its sums of softplus.

        H_ij = 2^h·row_factor_i·col_factor_j·row_weight_i·e_ij·2^bias / (1 + e_ij·2^bias)      off the diagonal

    Attributes:
        bias: 0-dim in the statistics type, the bias of the logits, to base 2.
        row_weight: ``[R]`` in the statistics type, of any sign.
        negative_mass: ``[R]``, minus what stands on the diagonal; see ``SoftmaxSums``.
    """

    bias: Tensor
    row_weight: Tensor
    negative_mass: Tensor

    def block(self, row: slice, col: slice) -> SigmoidWeights:
        """The part that covers these rows."""
        return SigmoidWeights(self.bias, part(self.row_weight, row), part(self.negative_mass, row))


class SoftplusSums(NamedTuple):
    """Sums along the rows of a pair's matrix, in the statistics type, its diagonal left out.

    Attributes:
        softplus: ``[n]``, Σ_j ln(1 + e_ij·2^bias).
        sigmoid: ``[n]``, Σ_j e_ij·2^bias / (1 + e_ij·2^bias), the derivative with respect to the natural bias.
    """

    softplus: Tensor
    sigmoid: Tensor


class Evaluation(NamedTuple):
    """What all of one backward pass has in common.

    Attributes:
        embeddings: M tensors ``[n, D]``, the own rows.
        scalars: as in the forward pass.
        spec: what was computed.
        saved: by the forward pass.
        upstream: ``[3]`` in the statistics type, gradient with respect to InfoNCE, ATP and CU, weights included.
        prepared: log sums.
        total_rows: N.
        world_size: number of processes; gradients of embeddings are multiplied by it.
    """

    embeddings: list[Tensor]
    scalars: Scalars
    spec: LossSpec
    saved: Saved
    upstream: Tensor
    prepared: PreparedSums
    total_rows: int
    world_size: int


class Backend(Protocol):
    """The functions that an evaluation consists of. Everything is on one device; rows have unit stride."""

    @property
    def sums_of(self) -> frozenset[str]:
        """What sums along one matrix may have here besides a matrix: of ``SUMS_OF``."""

    @property
    def gradient_block(self) -> Callable[[Tensor, int, int], int] | None:
        """How many rows of the gradient are best computed and finished at a time; None for all at once.

        By an operand (its width, type and device count), the matrix's number of rows and that of its columns.
        """

    @property
    def steps(self) -> Any:
        """Eager evaluations on one process that need no plan, ``gapkernels.backends.triton.steps.Steps``, or None."""

    def row_statistics(self, embeddings: list[Tensor], spec: LossSpec) -> tuple[list[Operand], RowStatistics]:
        """Operands (of no modality if there is no InfoNCE) and statistics of the own rows."""

    def operand(self, embedding: Tensor, spec: LossSpec) -> Operand:
        """The operand of rows of one modality, as ``row_statistics`` makes it."""

    def centroids(
        self, embeddings: list[Tensor], sums: Tensor, uniformity_t: Tensor, total_rows: int, spec: LossSpec
    ) -> Centroids:
        """Centroids of the own rows; ``sums`` are over the rows of all processes."""

    def log_sums(self, matrices: list[Matrix], zeros: Tensor | None = None, keep: int = 0) -> LogSums:
        """Sum matrices of one shape and diagonal; a sum that leaves the range of float32 is computed another way.

        If there is a symmetric one, the centroids', it comes last and may have operands of another type. ``zeros`` are
        those of ``RowStatistics``, to be used once. Of the entries as many as fit into ``keep`` bytes may be kept.
        """

    def softplus_sums(self, matrix: Matrix, bias: Tensor) -> SoftplusSums:
        """Row sums of one matrix of a pair, without limits; ``bias`` as in ``SigmoidWeights``."""

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
        """Loss, terms and what is saved, from log sums.

        Args:
            embeddings: for their number, shape and type.
            statistics: cosines of the own rows, sums over all rows.
            all_cosines: ``[P, N]``, of the rows of all processes.
            pair_sums: ``[P, n]`` and ``[P, N]``, columns summed over the processes; None without InfoNCE.
            centroid_log_sums: ``[N]``; None without CU.
            scalars: weights and scale.
            first_row: place of the own rows among all.
            spec: what is computed.

        Returns:
            InfoNCE, and the loss by as much, sum over the own rows only: the plan adds the processes up.
        """

    def softmax_sums(self, saved: Saved, scalars: Scalars, total_rows: int) -> PreparedSums:
        """Prepare log sums for ``add_products``; all processes take the same references."""

    def add_products(
        self,
        matrix: Matrix,
        sums: SoftmaxSums | SigmoidWeights | None,
        prepared: PreparedSums,
        row_products: Tensor | None,
        col_products: Tensor | None,
        moment: Any,
        first_rows: bool = False,
        first_cols: bool = False,
    ) -> None:
        """Add ``H·cols`` to ``row_products`` and ``Hᵀ·rows`` to ``col_products``, in place.

        Args:
            matrix: the entries; without its diagonal.
            sums: of a pair, see ``SoftmaxSums`` and ``SigmoidWeights``. Without them, for centroids, ``H_ij = 2^(x_ij −
                centroid_reference)``, and of a symmetric matrix the rows receive all.
            prepared: the references.
            row_products, col_products: ``[R, D']``, ``[C, D']`` float32 or wider; None if not needed.
            moment: from ``moment_buffer``, to which the matrix's part of Σ_ij H_ij·x_ij is added, for
                ``scale_gradient``; None if not needed.
            first_rows, first_cols: these products are the first that ``row_products``, or ``col_products``, receives:
                it may hold anything, and is overwritten as a whole.
        """

    def moment_buffer(self, like: Matrix) -> Any:
        """Zero, in the form in which ``add_products`` adds to it, for all matrices of an evaluation like this first."""

    def row_gradients(
        self,
        targets: list[int],
        rows: slice,
        factors: list[Tensor | None],
        products: list[Tensor | None],
        centroid_products: Tensor | None,
        evaluation: Evaluation,
        out: list[Tensor],
        moment: Any = None,
    ) -> Tensor | None:
        """Gradients of rows of some modalities, from their products: everything O(N·D).

        Args:
            targets: the modalities.
            rows: which of the own rows.
            factors, products: per target ``[R]`` and ``[R, D']``, of its operand; None where there is no InfoNCE.
            centroid_products: ``[n, D']``, of all own rows; None without CU.
            evaluation: everything else.
            out: per target ``[R, D]``, written.
            moment: of all blocks, with the last rows.

        Returns:
            What ``scale_gradient`` would, where there is a moment and the backend can do both at once; else None.
        """

    def scale_gradient(self, moment: Any, evaluation: Evaluation) -> Tensor:
        """This process's part of the gradient with respect to the logit scale, 0-dim.

        In the statistics type, or in the scale's where one process has all of it.
        """
