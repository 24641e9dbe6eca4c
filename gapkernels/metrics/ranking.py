"""Retrieval in both directions by counting ranks over tiles of the similarity matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from gapkernels.metrics._inputs import (
    Labels,
    check_alike,
    check_device,
    check_rows,
    joint_codes,
    label_array,
    positive_int,
    tiles,
    unit_rows,
)

# Cosines this close are ties: a float64 dot product of unit rows is off by D·1e-16 at worst, and where a tile ends
# decides the order of its summation, so identical targets need not get identical bits.
_TIE = 1e-12
# Unit rows of one id whose entries are this close are one item that occurs several times; an encoder in float32 gives
# the same input the same embedding up to about a hundredth of it.
_SAME_ROW = 1e-5


class DirectionResult(NamedTuple):
    """Retrieval in one direction.

    Attributes:
        recall: R@k by k, as a fraction.
        median_rank: ranks count from 1, the best.
        mean_rank: likewise.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float


class RetrievalResult(NamedTuple):
    """Retrieval in both directions."""

    query_to_target: DirectionResult
    target_to_query: DirectionResult


@torch.no_grad()
def retrieval(
    query: torch.Tensor,
    target: torch.Tensor,
    *,
    ids: Labels | None = None,
    query_ids: Labels | None = None,
    target_ids: Labels | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalResult:
    """R@k, median and mean rank of cosine retrieval in both directions, exact, in O(N·D) memory.

    The rank of a query is 1 + the number of wrong targets that score at least as high as its best correct target. So a
    tie counts against the query (cosines within 1e-12 are ties): a model that cannot tell two targets apart has not
    found the right one, and no way of breaking ties could give less. Collapsed embeddings score R@1 = 0.

    Without ids, query i matches target i only. With ids, every target that carries the query's id is correct, and the
    best of them competes against targets with other ids only. Identical targets with different ids make R@1 impossible
    for their queries: where one text stands for a whole class, pass the classes as ids.

    Args:
        query: [N, D], any float dtype.
        target: [N', D], any float dtype, on the device of `query`; N' = N unless both `*_ids` are given.
        ids: N integers or strings that hold for both sides (tensor, array or sequence).
        query_ids: N integers or strings, given together with `target_ids` instead of `ids`.
        target_ids: N' integers or strings. Every id must occur on both sides.
        ks: depths k >= 1; R@k is 1 where k reaches the number of targets.

    Returns:
        `RetrievalResult` of two `DirectionResult`; recalls are fractions in [0, 1].

    Raises:
        TypeError: an embedding is not a floating point tensor, ids are neither integers nor strings, a k is no integer.
        ValueError: shapes, devices or numbers of ids that do not fit, an id on one side only, `ks` empty or below 1,
            NaN or infinity.

    Examples:
        >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> text = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.0, 1.0]])
        >>> retrieval(image, text, ks=(1, 2)).query_to_target
        DirectionResult(recall={1: 0.3333333333333333, 2: 1.0}, median_rank=2.0, mean_rank=1.6666666666666667)
        >>> retrieval(image, text, ids=["dog", "cat", "cat"], ks=(1,)).query_to_target.recall
        {1: 1.0}
    """
    depths = [positive_int("ks", k) for k in ks]
    if not depths:
        raise ValueError("`ks` must hold at least one depth, got none")
    query_codes, target_codes = _codes(query, target, ids, query_ids, target_ids)

    # Sorted by id, the matching entries lie in a few tiles; all other tiles need no mask.
    query_order, target_order = query_codes.argsort(kind="stable"), target_codes.argsort(kind="stable")
    query_ranks, target_ranks = _ranks(
        unit_rows("query", query)[torch.from_numpy(query_order)],
        unit_rows("target", target)[torch.from_numpy(target_order)],
        query_codes[query_order],
        target_codes[target_order],
    )
    return RetrievalResult(_direction(query_ranks, depths), _direction(target_ranks, depths))


def distinct_rows(embedding: torch.Tensor, codes: np.ndarray) -> np.ndarray:
    """Mark the rows that remain when what occurs several times is kept once, bool [N].

    A row occurs several times where rows of one code have the same embedding, to the rounding of an encoder that met
    them in different batches: an image that is repeated for each of its captions, or a class name.

    Args:
        embedding: [N, D], any float dtype.
        codes: a number for each row, int64 [N].
    """
    unit = unit_rows("embedding", embedding)
    tolerance = max(_SAME_ROW, 2 * _resolution(embedding))
    # Rows that are alike have like projections, so they are neighbours in this order: N·log N instead of N².
    direction = torch.randn(unit.shape[1], generator=torch.Generator().manual_seed(0), dtype=unit.dtype)
    order = np.lexsort(((unit @ direction.to(unit.device)).cpu().numpy(), codes))
    ordered = unit[torch.from_numpy(order).to(unit.device)]
    alike = ((ordered[1:] - ordered[:-1]).abs().amax(dim=1) <= tolerance).cpu().numpy()
    distinct = np.ones(len(codes), dtype=bool)
    distinct[order[1:]] = ~(alike & (codes[order[1:]] == codes[order[:-1]]))
    return distinct


def _resolution(embedding: torch.Tensor) -> float:
    """Return the relative step between the values of an embedding: an encoder's bfloat16 often comes as float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(embedding, embedding.to(dtype).to(embedding.dtype)):
            return torch.finfo(dtype).eps
    return torch.finfo(embedding.dtype).eps


def _codes(
    query: torch.Tensor,
    target: torch.Tensor,
    ids: Labels | None,
    query_ids: Labels | None,
    target_ids: Labels | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Check the arguments and return one integer per query and per target, equal where they match."""
    if (query_ids is None) != (target_ids is None):
        given, missing = ("query_ids", "target_ids") if target_ids is None else ("target_ids", "query_ids")
        raise ValueError(f"`query_ids` and `target_ids` must be given together, got `{given}` without `{missing}`")
    if query_ids is None or target_ids is None:
        check_rows(query=query, target=target)
        if query.shape[0] != target.shape[0]:
            raise ValueError(
                f"`target` must have as many rows as `query`, {query.shape[0]}, unless `query_ids` and `target_ids` "
                f"are given, got shape {list(target.shape)}"
            )
        check_alike(("query", "target"), (query, target))
        rows = query.shape[0]
        codes = np.arange(rows) if ids is None else joint_codes(ids=label_array("ids", ids, rows))[0]
        return codes, codes

    if ids is not None:
        raise ValueError("`ids` holds for both sides, got it together with `query_ids` and `target_ids`")
    check_rows(query=query, target=target)
    if query.shape[1] != target.shape[1]:
        raise ValueError(
            f"`target` must have as many columns as `query`, {query.shape[1]}, got shape {list(target.shape)}"
        )
    check_device("target", target, "query", query)
    query_array = label_array("query_ids", query_ids, query.shape[0])
    target_array = label_array("target_ids", target_ids, target.shape[0])
    query_codes, target_codes = joint_codes(query_ids=query_array, target_ids=target_array)
    for name, array, codes, other_name, other in (
        ("query_ids", query_array, query_codes, "target_ids", target_codes),
        ("target_ids", target_array, target_codes, "query_ids", query_codes),
    ):
        check_matched(name, array, codes, other_name, other)
    return query_codes, target_codes


def check_matched(name: str, array: np.ndarray, codes: np.ndarray, other_name: str, other: np.ndarray) -> None:
    """Raise unless every one of `codes`, which stand for the ids `array`, occurs in `other` too."""
    lonely = np.flatnonzero(~np.isin(codes, other))
    if lonely.size:
        raise ValueError(
            f"`{name}` must hold ids that `{other_name}` holds too, got {lonely.size} without a match, "
            f"first {array[lonely[0]].item()!r} in row {lonely[0]}"
        )


def _ranks(
    query: torch.Tensor,
    target: torch.Tensor,
    query_codes: np.ndarray,
    target_codes: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks (from 1) of all queries and of all targets, from unit rows in the order of their codes.

    One matmul per tile serves both directions. The first pass visits only the tiles that hold matches.
    """
    query_code = torch.from_numpy(query_codes).to(query.device)
    target_code = torch.from_numpy(target_codes).to(target.device)
    query_tiles, target_tiles = list(tiles(query.shape[0])), list(tiles(target.shape[0]))

    def holds_matches(i: slice, j: slice) -> bool:
        return query_codes[i.start] <= target_codes[j.stop - 1] and target_codes[j.start] <= query_codes[i.stop - 1]

    best_of_query = query.new_full((query.shape[0],), -torch.inf)
    best_of_target = target.new_full((target.shape[0],), -torch.inf)
    for i in query_tiles:
        for j in target_tiles:
            if holds_matches(i, j):
                wrong = query_code[i, None] != target_code[None, j]
                right_score = (query[i] @ target[j].T).masked_fill_(wrong, -torch.inf)
                best_of_query[i] = torch.maximum(best_of_query[i], right_score.amax(dim=1))
                best_of_target[j] = torch.maximum(best_of_target[j], right_score.amax(dim=0))

    query_bar, target_bar = best_of_query - _TIE, best_of_target - _TIE
    query_rank = torch.ones_like(query_code)
    target_rank = torch.ones_like(target_code)
    for i in query_tiles:
        for j in target_tiles:
            score = query[i] @ target[j].T
            if holds_matches(i, j):
                score.masked_fill_(query_code[i, None] == target_code[None, j], -torch.inf)
            query_rank[i] += torch.count_nonzero(score >= query_bar[i, None], dim=1)
            target_rank[j] += torch.count_nonzero(score >= target_bar[None, j], dim=0)
    return query_rank, target_rank


def _direction(rank: torch.Tensor, depths: Sequence[int]) -> DirectionResult:
    ranks = rank.cpu().numpy()
    recall = {k: float((ranks <= k).mean()) for k in depths}
    return DirectionResult(recall, float(np.median(ranks)), float(ranks.mean()))
