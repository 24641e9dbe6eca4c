"""Several processes: the loss and its gradients equal those of one process on the concatenated batch."""

import copy
import functools
import io
import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
import torch.multiprocessing as mp
from oracle import random_embeddings

from gapkernels import GapLoss, backends, gap_loss
from gapkernels.distributed import triangle_blocks


@pytest.mark.parametrize(("size", "rows"), list(itertools.product(range(1, 9), (1, 2, 3, 5))))
def test_the_triangle_is_dealt_out_completely_once_and_evenly(size, rows):
    covered = torch.zeros(size * rows, size * rows, dtype=torch.int)
    work = []
    for rank in range(size):
        area = 0
        for index, (row, col) in enumerate(triangle_blocks(rank, size, rows)):
            block = torch.ones(row.stop - row.start, col.stop - col.start, dtype=torch.int)
            assert (index == 0) == (row == col)
            if row == col:
                block = block.triu(diagonal=1)
            covered[row, col] += block
            area += int(block.sum())
        work.append(area)
    both = covered + covered.T
    assert torch.equal(both, 1 - torch.eye(size * rows, dtype=torch.int))
    assert max(work) - min(work) <= rows


def _cases() -> list[dict]:
    return [
        {},
        {"pairs": "all", "anchor": 1, "normalize_centroids": False},
        {"normalize": False, "logit_scale": 3.0},
        {"logit_scale": 300.0, "cu_weight": 0.0},
        {"nce_weight": 0.0},
    ]


def _backends() -> list[str]:
    return ["torch", *(["cpu"] if backends.cpu_backend.unusable_because() is None else [])]


def _in_each_process(rank: int, size: int, port: int, rows: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what no process writes shows
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        own = slice(rank * rows, (rank + 1) * rows)
        grid = itertools.product(_backends(), (torch.float64, torch.float32), _cases())
        for backend, dtype, options in grid:
            # errors of float32 exponents grow with the scale
            rounding = torch.finfo(dtype).eps * max(16, options.get("logit_scale", 10.0))
            if backend == "cpu":  # whose float32 rows are not unit vectors: sums are rounded at their size
                rounding *= 4
            close = functools.partial(torch.testing.assert_close, rtol=10 * rounding, atol=rounding)
            _compare_with_one_process(size, rows, own, dtype, {"backend": backend, **options}, close)
        _train_with_ddp(rank, size, rows, own)
        with pytest.raises(ValueError, match="every process of `group` must hold the same number of rows"):
            gap_loss(*random_embeddings(rows + rank, 4), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _compare_with_one_process(size, rows, own, dtype, options, close):
    whole = random_embeddings(size * rows, 6, 3, dtype)
    if options.get("logit_scale") == 300.0:  # leaves the range of the constant exponent
        whole = [whole[0][:1] + whole[0] / 50, -whole[0][:1] + whole[1] / 50, -whole[0][:1] + whole[2] / 50]
    options = {"logit_scale": 10.0, **options}
    scale_value = options.pop("logit_scale")

    def evaluate(embeddings, group):
        leaves = [e.clone().requires_grad_() for e in embeddings]
        scale = torch.tensor(scale_value, dtype=torch.float64, requires_grad=True)
        terms = gap_loss(*leaves, logit_scale=scale, group=group, return_terms=True, **options)
        (terms.loss + terms.loss * terms.loss).backward()
        return terms, [e.grad for e in leaves], scale.grad

    expected, gradients, scale_gradient = evaluate(whole, None)
    actual, own_gradients, own_scale_gradient = evaluate([e[own] for e in whole], dist.group.WORLD)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)
    for a, b in zip(own_gradients, gradients, strict=True):
        close(a / size, b[own])
    if own_scale_gradient is not None:
        close(own_scale_gradient, scale_gradient)


def _train_with_ddp(rank, size, rows, own):
    """A step of DistributedDataParallel gives the parameters that one process would get."""
    x, y = random_embeddings(size * rows, 6, dtype=torch.float64)

    class Model(torch.nn.Module):
        def __init__(self, group):
            super().__init__()
            torch.manual_seed(0)
            self.tower = torch.nn.Linear(6, 5, dtype=torch.float64)
            self.loss = GapLoss(learn_temperature=True, group=group).double()

        def forward(self, a, b):
            return self.loss(self.tower(a), self.tower(b))

    single = Model(None)
    single(x, y).backward()
    model = torch.nn.parallel.DistributedDataParallel(Model(dist.group.WORLD))
    model(x[own], y[own]).backward()
    for ours, expected in zip(model.module.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("size", "rows"), [(2, 5), (3, 4), (4, 3)])
def test_processes_agree_with_one(size, rows):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_in_each_process, args=(size, port, rows), nprocs=size)


def test_reference_refuses_a_group():
    """A wrong single-process value must not pass for the loss of the whole batch."""
    x, y = random_embeddings(4, 3)

    class TwoProcesses:
        group_name = "pretended"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda group: 2)
        with pytest.raises(ValueError, match='not supported by backend="reference"'):
            gap_loss(x, y, group=TwoProcesses(), backend="reference")


def _refusals_in_each_process(rank: int, size: int, port: int) -> None:
    """What differs between processes is named on every one of them; what hung or was silently wrong before."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    before = GapLoss()  # group=None, as dist.group.WORLD is at this time
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        x, y = random_embeddings(6, 4)
        differs = "every process of `group` must call the loss with the same"
        for name, embeddings, options, message in [
            ("dimension", random_embeddings(6, 4 + rank), {}, r"dimension D: rank 0 has 4, rank 1 has 5"),
            ("modalities", random_embeddings(6, 4, 2 + rank), {}, r"number of embeddings: rank 0 has 2, rank 1 has 3"),
            (
                "dtype",
                random_embeddings(6, 4, dtype=(torch.float32, torch.float64)[rank]),
                {},
                r"dtype: rank 0 has float32",
            ),
            (
                "pairs",
                random_embeddings(6, 4, 3),
                {"pairs": ("anchor", "all")[rank]},
                r"all_pairs: rank 0 has 0, rank 1",
            ),
            ("anchor", [x, y], {"anchor": rank}, r"anchor: rank 0 has 0, rank 1 has 1"),
            ("normalize", [x, y], {"normalize": bool(rank)}, r"normalize: rank 0 has 0, rank 1 has 1"),
            ("t", [x, y], {"uniformity_t": 2.0 + rank}, r"uniformity_t: rank 0 has 2, rank 1 has 3"),
            ("temperature", [x, y], {"temperature": 0.5 / (1 + rank)}, r"logit scale: rank 0 has 2, rank 1 has 4"),
            ("weight", [x, y], {"cu_weight": 1.0 - rank / 2}, r"cu_weight: rank 0 has 1, rank 1 has 0.5"),
            ("term", [x, y], {"cu_weight": 1.0 - rank}, r"CU: rank 0 has 1, rank 1 has 0"),
            (
                "grad",
                [x.clone().requires_grad_(rank == 0), y.clone().requires_grad_()],
                {},
                r"require grad.*rank 0 has \[0",
            ),
        ]:
            with pytest.raises(ValueError, match=f"{differs} .*{message}"):
                gap_loss(*embeddings, group="world", **options)
            assert name
        for rows in (1 + rank, 3 * rank):  # an empty process too
            with pytest.raises(
                ValueError, match=r"every process of `group` must hold the same number of rows, got \d to"
            ):
                gap_loss(x[:rows], y[:rows], group="world", cu_weight=0.0)
        with pytest.raises(ValueError, match=r"must have shape \[N, D\] with N, D ≥ 1, got \[0, 4\]"):
            gap_loss(x[:0], y[:0], group="world", cu_weight=0.0)
        mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
        sharded = dist.tensor.distribute_tensor(x, mesh, [dist.tensor.Shard(0)])
        with pytest.raises(
            TypeError, match=r"embedding 0 must be an ordinary tensor, got a DTensor; pass its local rows"
        ):
            gap_loss(sharded, sharded)

        outside = dist.new_group([0])
        if rank == 1:
            with pytest.raises(ValueError, match="must have this process as a member: rank 1 is not in it"):
                gap_loss(x, y, group=outside)
        with pytest.raises(ValueError, match="must be a process group, 'world' or None, got 'all'"):
            gap_loss(x, y, group="all")

        expected = gap_loss(x, y, group=dist.group.WORLD).item()
        assert gap_loss(x, y, group="world").item() == expected
        module = GapLoss(group=dist.group.WORLD, learn_temperature=True)
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        for copied in (
            copy.deepcopy(module),
            torch.optim.swa_utils.AveragedModel(module),
            torch.load(stream, weights_only=False),
        ):
            assert copied(x, y).item() == pytest.approx(expected, rel=1e-6)
        with pytest.warns(UserWarning, match=r'built with group=None before.*pass group="world"'):
            before(x, y)
        alone = gap_loss(x, y)
        assert torch.isfinite(alone)
    finally:
        dist.destroy_process_group()


def test_processes_that_disagree_are_told():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_refusals_in_each_process, args=(2, port), nprocs=2)
