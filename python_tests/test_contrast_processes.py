"""Contrasts with options over several processes: as the definition on the concatenated batch; differences are named."""

import os
import socket

import contrast_cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contrast_cases import CASES, NUM_NEGATIVES
from oracle import random_embeddings

from gapkernels import (
    CentroidUniformityLoss,
    InfoNCELoss,
    SigmoidLoss,
    blocks,
    gap_loss,
    info_nce,
    sigmoid_loss,
    similarity_logsumexp,
    similarity_softplus,
)

ROWS = 12
MODES = ("gather", "ring")


def _own(x: torch.Tensor) -> torch.Tensor:
    rows = x.shape[0] // dist.get_world_size()
    return x[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]


def _evaluate(case, embeddings, tensors, **options):
    leaves = [e.clone().requires_grad_() for e in embeddings]
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    tensors = {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in tensors.items()}
    loss = gap_loss(*leaves, logit_scale=scale, **{**case, **tensors, **options})
    inputs = [*leaves, scale, *(t for t in tensors.values() if t.requires_grad)]
    return loss, torch.autograd.grad(loss, inputs)


def _as_defined() -> None:
    size = dist.get_world_size()
    embeddings = random_embeddings(ROWS, 8, dtype=torch.float64)
    for case in CASES:
        whole = {k: t.detach() for k, t in contrast_cases.tensors_of(case, embeddings[0]).items()}
        own = {k: t if k == "logit_bias" else _own(t) for k, t in whole.items()}
        expected, expected_gradients = _evaluate(case, embeddings, whole, backend="reference")
        for mode in MODES:
            options = {"group": "world", "group_mode": mode, "backend": "torch" if mode == "ring" else "auto"}
            loss, gradients = _evaluate(case, [_own(e) for e in embeddings], own, **options)
            message = f"{case} {mode}: {{}}".format
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, msg=message)
            for gradient, value in zip(gradients, expected_gradients, strict=True):
                if value.dim():  # gradients of what a process holds are scaled for the mean that DDP takes
                    gradient, value = gradient / size, _own(value)
                torch.testing.assert_close(gradient, value, rtol=1e-10, atol=1e-12, msg=message)


def _every_function() -> None:
    """Each way to ask for a mode gives the value of the whole batch."""
    embeddings = random_embeddings(ROWS, 8, dtype=torch.float64)

    def check(function, mine=lambda x: x, **options):
        expected = mine(function(*embeddings, **options))
        for mode in MODES:
            value = function(*map(_own, embeddings), **options, group="world", group_mode=mode)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)

    check(info_nce)
    check(info_nce, same_side=True, reduction="none", mine=_own)
    check(sigmoid_loss)
    check(sigmoid_loss, reduction="none", mine=_own)
    check(lambda *e, **o: tuple(similarity_logsumexp(*e, **o)), mine=lambda sums: tuple(map(_own, sums)))
    check(similarity_softplus, logit_scale=5.0, logit_bias=-1.0, mine=lambda sums: tuple(map(_own, sums)))
    for module in (InfoNCELoss, SigmoidLoss, CentroidUniformityLoss):
        check(lambda *e, module=module, **options: module(**options)(*e))


def _ring_of_float32() -> None:
    """Every backend, more rows than a tile, weights of any sign, ids and limits that travel along."""
    embeddings = random_embeddings(300, 20)
    ids = torch.arange(300) % 70
    generator = torch.Generator().manual_seed(1)
    limits = 3 * torch.rand(300, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 300, generator=generator, dtype=torch.float64)

    def evaluate(x, y, mine, **options):
        x, y = (e.clone().requires_grad_() for e in (x, y))
        sums = similarity_logsumexp(
            x,
            y,
            logit_scale=10.0,
            row_ids=mine(ids),
            col_ids=mine(ids),
            row_limit=mine(limits),
            col_limit=mine(limits),
            **options,
        )
        total = mine(weights[0]).dot(sums.rows) + mine(weights[1]).dot(sums.cols) + sums.positives.sum()
        return *sums, *torch.autograd.grad(total, [x, y])

    expected = evaluate(*(e.double() for e in embeddings), lambda x: x)
    for backend in ("torch", "auto"):
        found = evaluate(*map(_own, embeddings), _own, backend=backend, group="world", group_mode="ring")
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), _own(exact), rtol=1e-4, atol=1e-5)


def _what_circulates() -> None:
    """The mode decides whether rows are gathered; "auto" by how much that would take."""
    x, y = map(_own, random_embeddings(ROWS, 8))
    gathered = []

    def gather(world, rows):
        gathered.append(tuple(rows.shape))
        return original(world, rows)

    from gapkernels.distributed import ProcessGroupWorld

    original = ProcessGroupWorld.gather_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessGroupWorld, "gather_rows", gather)
        for options in (
            {"directions": "from_anchor"},
            {"ids": _own(torch.arange(ROWS) // 3), "duplicates": "positive"},
        ):
            for mode, limit, expected in (
                ("gather", 0, True),
                ("ring", 2**30, False),
                ("auto", 2**30, True),
                ("auto", 2 * x.nbytes, dist.get_world_size() == 2),
            ):
                patch.setattr(blocks, "GATHERED_BYTES", limit)
                gathered.clear()
                info_nce(x, y, group="world", group_mode=mode, **options)
                assert (tuple(x.shape) in gathered) == expected, (options, mode, limit)


def _compiles() -> None:
    x, y = (_own(e).requires_grad_() for e in random_embeddings(ROWS, 8, dtype=torch.float64))
    ids = _own(torch.arange(ROWS) % 5)
    negatives = _own(torch.randn(ROWS, 2, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64))

    def step(x, y, ids, negatives):
        options = {"group": "world", "group_mode": "ring", "backend": "torch"}
        both = info_nce(x, y, ids=ids, duplicates="positive", label_smoothing=0.1, negatives=negatives, **options)
        return both + info_nce(x, y, false_negative_margin=0.1, **options)

    given = x, y, ids, negatives
    value, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(*given), step(*given)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)))


def _differences_are_named() -> None:
    x, y = map(_own, random_embeddings(ROWS, 8))
    first = dist.get_rank() == 0

    def of(one, other):
        return one if first else other

    ids = torch.arange(x.shape[0])
    for options, message in (
        (
            {"directions": of("both", "from_anchor")},
            r"directions \(weight from the anchor\): rank 0 has 0.5, rank 1 has 1",
        ),
        ({"same_side": of(False, True)}, r"same_side \(of the anchor\): rank 0 has 0, rank 1 has 1"),
        (
            {"same_side": True, "partition": of("joint", "per_direction")},
            r"partition: rank 0 has 'joint', rank 1 has 'per_direction'",
        ),
        ({"decoupled": of(True, False)}, "decoupled: rank 0 has 1, rank 1 has 0"),
        ({"label_smoothing": of(0.1, 0.2)}, "label_smoothing: rank 0 has 0.1, rank 1 has 0.2"),
        ({"ids": ids, "duplicates": of("mask", "positive")}, "duplicates: rank 0 has 'mask', rank 1 has 'positive'"),
        ({"ids": of(ids, None)}, "presence of ids: rank 0 has 1, rank 1 has 0"),
        ({"false_negative_margin": of(None, 0.0)}, "false_negative_margin: rank 0 has None, rank 1 has 0"),
        ({"negatives": x[: of(2, 1)]}, "number of negatives: rank 0 has 2, rank 1 has 1"),
        ({"negatives": of(x[:2], x[:, None].repeat(1, 2, 1))}, "dimensions of negatives: rank 0 has 2, rank 1 has 3"),
        (
            {"negatives": x[:2].clone().requires_grad_(first)},
            r"inputs that require grad .*: rank 0 has \[3\], rank 1 has \[\]",
        ),
        ({"contrast": of("softmax", "sigmoid")}, "contrast: rank 0 has 'softmax', rank 1 has 'sigmoid'"),
        ({"contrast": "sigmoid", "logit_bias": of(-1.0, -2.0)}, "logit_bias: rank 0 has -1, rank 1 has -2"),
        ({"same_side": True, "reduction": of("mean", "none")}, "reduction: rank 0 has 'mean', rank 1 has 'none'"),
        ({"decoupled": True, "temperature": of(0.5, 0.25)}, "logit scale: rank 0 has 2, rank 1 has 4"),
        ({"decoupled": True, "group_mode": of("gather", "ring")}, "group_mode: rank 0 has 'gather', rank 1 has 'ring'"),
    ):
        with pytest.raises(ValueError, match=f"every process of `group` must call the loss with the same {message}"):
            info_nce(x, y, group="world", **options)
    given = {"ids": ids, "uniformity_of_equal_ids": of(True, False)}
    with pytest.raises(ValueError, match="uniformity_of_equal_ids: rank 0 has 1, rank 1 has 0"):
        gap_loss(x, y, group="world", **given)
    with pytest.raises(ValueError, match="number of columns: rank 0 has 3, rank 1 has 2"):
        similarity_logsumexp(x, x[: of(3, 2)], matched=False, group="world")
    with pytest.raises(ValueError, match="function: rank 0 has a loss, rank 1 has similarity_logsumexp"):
        of(info_nce, similarity_logsumexp)(x, y, group="world")
    with pytest.raises(ValueError, match="logit_bias: rank 0 has 0, rank 1 has 1"):
        similarity_softplus(x, y, logit_scale=1.0, logit_bias=of(0.0, 1.0), group="world")
    for call in (
        lambda: info_nce(x, y, group="world", directions=of("both", "sideways")),
        lambda: info_nce(x, y, group="world", reduction=of("none", "median"), decoupled=True),
        lambda: sigmoid_loss(x, y, group="world", ids=of(ids, ids[:1])),
        lambda: similarity_logsumexp(x, y, group="world", logit_scale=of(1.0, -1.0)),
    ):
        with pytest.raises(ValueError, match="rank 1 of `group` could not call the loss: " if first else " must be "):
            call()
    for rows in (1 + dist.get_rank(), 3 * dist.get_rank()):
        with pytest.raises(ValueError, match=r"must hold the same number of rows, got \d to"):
            info_nce(x[:rows], y[:rows], group="world", directions="from_anchor")
    with pytest.raises(ValueError, match=r"must have shape \[N, D\] with N, D ≥ 1, got \[0, 8\]"):
        sigmoid_loss(x[:0], y[:0], group="world")


def _in_each_process(rank: int, size: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what no process writes shows
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        _as_defined()
        _every_function()
        _ring_of_float32()
        _what_circulates()
        if size == 2:
            _compiles()
            _differences_are_named()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_processes_agree_with_one_and_with_each_other(size):
    assert ROWS % size == NUM_NEGATIVES % size == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_in_each_process, (size, port), nprocs=size)
