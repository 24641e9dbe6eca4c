"""The door to the primitive: sums along rows and columns of one similarity matrix, with gradients, in O(N·D) memory.

Losses that no option spells can be written with these in plain torch, for instance with weights of one's own per sample
(FastCLIP, SogCLR), a distillation term, or candidates from several sources: the log sums of parts join by
``torch.logaddexp``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gapkernels import backends, contrast
from gapkernels.backends.contract import statistics_dtype
from gapkernels.checks import as_tensor, check_backend, check_rows, check_scalar, check_vector, logit_scale_of, name_of
from gapkernels.contrast import How
from gapkernels.distributed import group_name_and_size, heard_by_all
from gapkernels.spec import SimilaritySums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@heard_by_all
def similarity_logsumexp(
    rows: Tensor,
    cols: Tensor,
    *,
    logit_scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    matched: bool = True,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    row_limit: Tensor | None = None,
    col_limit: Tensor | None = None,
    normalize: bool = True,
    backend: str = "auto",
    group: ProcessGroup | str | None = None,
    group_mode: str = "auto",
) -> SimilaritySums:
    """Logarithms of the sums of exp(s·cos_ij) along rows and along columns, positives apart.

    What ``torch.logsumexp(s * rows @ cols.T, dim)`` gives without the diagonal, its N×K matrix never stored. Gradients
    flow to rows, columns and scale through all three results.

    Args:
        rows: ``[N, D]``, any floating type.
        cols: ``[K, D]`` of the same type.
        logit_scale, temperature: as for ``gap_loss``.
        matched: row i and column i are a positive pair (K = N), whose entry is left out of the sums and returned by
            itself. The same tensor twice: a row is not compared with itself.
        row_ids, col_ids: ``[N]`` and ``[K]`` int64, together: entries of equal ids are left out.
        row_limit, col_limit: ``[N]`` and ``[K]``, logits: entries that exceed it are left out of the sum of that row,
            or of that column. No gradient flows to them.
        normalize: divide rows and columns by their norms first.
        backend: as for ``gap_loss``.
        group: processes that hold the batch, each as many rows and as many columns: sums run over all. Gradients are
            those of the sum over the processes of what each makes of its own sums.
        group_mode: as for ``gap_loss``.

    Returns:
        ``SimilaritySums``, float64 (float32 on devices without): −∞ where nothing is left to sum.

    Raises:
        TypeError, ValueError: types, shapes or devices do not fit, or an option is out of its range.

    Examples:
        >>> rows, cols = torch.randn(8, 4), torch.randn(8, 4)
        >>> sums = similarity_logsumexp(rows, cols, temperature=0.1)
        >>> loss = (torch.logaddexp(sums.rows, sums.positives) - sums.positives).mean()
        >>> bool(torch.isclose(loss.float(), info_nce(rows, cols, temperature=0.1, directions="from_anchor")))
        True
    """
    _check(rows, cols, matched, row_ids=row_ids, col_ids=col_ids, row_limit=row_limit, col_limit=col_limit)
    rows, cols = backends.in_multiplied_type([rows, cols], check_backend(backend))
    name, size = group_name_and_size(group, group_mode)
    scale = logit_scale_of(logit_scale, temperature, rows.device)
    row_limit, col_limit = (
        None if x is None else x.detach().to(statistics_dtype(rows.device)) for x in (row_limit, col_limit)
    )
    ids = None if row_ids is None or col_ids is None else (row_ids, col_ids)
    how = How(normalize, backend, name, size)
    return contrast.logsumexp(rows, cols, scale, how, matched, ids, row_limit, col_limit)


@heard_by_all
def similarity_softplus(
    rows: Tensor,
    cols: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    matched: bool = True,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    normalize: bool = True,
    backend: str = "auto",
    group: ProcessGroup | str | None = None,
    group_mode: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sums of softplus(s·cos_ij + b) along rows, positives apart: what a sigmoid loss is made of.

    Args:
        rows, cols, logit_scale, matched, row_ids, col_ids, normalize, backend, group, group_mode: as for
            ``similarity_logsumexp``.
        logit_bias: b, a number or a tensor of one element, which may require gradient.

    Returns:
        the sums ``[N]`` and the positives' s·cos_ii ``[N]`` (``[0]`` if not matched), float64.

    Raises:
        TypeError, ValueError: as ``similarity_logsumexp``.

    Examples:
        >>> rows, cols = torch.eye(4), torch.eye(4)
        >>> sums, positives = similarity_softplus(rows, cols, logit_scale=10.0, logit_bias=0.0)
        >>> [round(x, 3) for x in (sums[0].item(), positives[0].item())]
        [2.079, 10.0]
    """
    _check(rows, cols, matched, row_ids=row_ids, col_ids=col_ids)
    rows, cols = backends.in_multiplied_type([rows, cols], check_backend(backend))
    name, size = group_name_and_size(group, group_mode)
    scale = logit_scale_of(logit_scale, None, rows.device)
    bias = as_tensor(check_scalar("logit_bias", logit_bias, positive=False), rows.device)
    ids = None if row_ids is None or col_ids is None else (row_ids, col_ids)
    how = How(normalize, backend, name, size)
    return contrast.softplus_sums(rows, cols, scale, bias, how, matched, ids)


def _check(rows: Tensor, cols: Tensor, matched: bool, **vectors: Tensor | None) -> None:
    check_rows("`rows`", rows)
    check_rows("`cols`", cols)
    if rows.shape[1] != cols.shape[1] or (matched and rows.shape != cols.shape):
        wanted = "one shape, as they match" if matched else "one D"
        raise ValueError(f"`rows` and `cols` must have {wanted}, got {list(rows.shape)} and {list(cols.shape)}")
    if rows.dtype != cols.dtype:
        raise TypeError(f"`rows` and `cols` must have one dtype, got {name_of(rows.dtype)} and {name_of(cols.dtype)}")
    if rows.device != cols.device:
        raise ValueError(f"`rows` and `cols` must be on one device, got {rows.device} and {cols.device}")
    for name, vector in vectors.items():
        if vector is not None:
            side = rows if name.startswith("row") else cols
            check_vector(name, vector, side.shape[0], rows, integer=name.endswith("ids"))
    if (vectors.get("row_ids") is None) != (vectors.get("col_ids") is None):
        raise ValueError("give `row_ids` and `col_ids` together, or neither")
