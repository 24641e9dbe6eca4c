"""Several processes: the loss and its gradients equal those of one process on the concatenated batch."""

import copy
import functools
import gc
import io
import itertools
import os
import shutil
import socket
import tempfile
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
import torch.multiprocessing as mp
from oracle import random_embeddings
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from gapkernels import GapLoss, backends, distributed, gap_loss
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
        {"group_mode": "ring"},
        {"group_mode": "ring", "pairs": "all", "anchor": 1, "normalize_centroids": False},
        {"group_mode": "ring", "normalize": False, "logit_scale": 3.0},
        {"group_mode": "ring", "logit_scale": 300.0, "cu_weight": 0.0},
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
            if options.get("group_mode") == "ring":  # parts of sums are added up as logarithms
                rounding *= 4
            close = functools.partial(torch.testing.assert_close, rtol=10 * rounding, atol=rounding)
            _compare_with_one_process(size, rows, own, dtype, {"backend": backend, **options}, close)
        for mode, modalities in itertools.product(("gather", "ring"), (2, 3)):
            _compare_bfloat16(size, rows, own, mode, modalities)
        _train_with_ddp(rank, size, rows, own)
        if size == 2:
            _train_with_fsdp(rank, size, rows, own)
        if size == 4:
            _count_exchanges(rank, size)
        with pytest.raises(ValueError, match="every process of `group` must hold the same number of rows"):
            gap_loss(*random_embeddings(rows + rank, 4), group=dist.group.WORLD)
        gc.collect()  # wrapped models that outlive the group may hang at the end
    finally:
        dist.destroy_process_group()


def _compare_bfloat16(size, rows, own, mode, modalities):
    """Products that travel in bfloat16 are as near to float64 as the type allows."""
    whole = random_embeddings(size * rows, 16, modalities, torch.bfloat16)
    leaves = [e.double().requires_grad_() for e in whole]
    gap_loss(*leaves, logit_scale=10.0).backward()
    parts = [e[own].clone().requires_grad_() for e in whole]
    gap_loss(*parts, logit_scale=10.0, group="world", group_mode=mode).backward()
    for ours, exact in zip(parts, leaves, strict=True):
        error = (ours.grad.double() / size - exact.grad[own]).norm() / exact.grad[own].norm()
        assert error < 8e-3  # half a unit in the last place, of parts that cancel in their sum


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


class TwoTowers(torch.nn.Module):
    def __init__(self, group):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.GELU(), torch.nn.Linear(8, 5)) for width in (6, 4)
        )
        self.loss = GapLoss(learn_temperature=True, group=group)

    def forward(self, images, texts):
        return self.loss(self.image(images), self.text(texts))


def _train_with_fsdp(rank, size, rows, own):
    """A step of ``fully_shard`` gives the parameters of one process, and a checkpoint of parts brings them back."""
    images, texts = random_embeddings(size * rows, 6, dtype=torch.float64)
    texts = texts[:, :4].contiguous()

    def step(model, *batch):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model(*batch).backward()
        optimizer.step()
        return optimizer

    single = TwoTowers(None).double()
    step(single, images, texts)
    model = TwoTowers("world").double()
    for tower in (model.image, model.text):
        fully_shard(tower)
    fully_shard(model)
    optimizer = step(model, images[own], texts[own])

    def compare(sharded):
        for ours, expected in zip(sharded.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), expected, rtol=1e-9, atol=1e-11)

    compare(model)
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder[0])
    restored = TwoTowers("world").double()
    for tower in (restored.image, restored.text):
        fully_shard(tower)
    fully_shard(restored)
    other = torch.optim.AdamW(restored.parameters(), lr=1e-2)
    weights, moments = get_state_dict(restored, other)
    checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=folder[0])
    set_state_dict(restored, other, model_state_dict=weights, optim_state_dict=moments)
    compare(restored)
    losses = []
    for continued, adam in ((model, optimizer), (restored, other)):
        continued.zero_grad()
        continued(images[own], texts[own]).backward()
        adam.step()
        losses.append(continued(images[own], texts[own]).item())
    assert losses[0] == losses[1]
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])


def _count_exchanges(rank, size):
    """A step sends little more than the ideal: columns and centroids once each way, in the type of the embeddings."""
    rows, dim = 256, 64
    sent = []

    def counting(name, share):
        call = getattr(owner_of[name], name)

        def counted(out, *arguments, **options):
            moved = arguments[0] if name in ("_all_gather", "_reduce_scatter", "all_to_all_single") else out
            sent.append((name, share(moved.nbytes)))
            return call(out, *arguments, **options)

        return counted

    owner_of = {
        "_all_gather": distributed,
        "_reduce_scatter": distributed,
        "all_reduce": dist,
        "all_to_all_single": dist,
    }
    others = size - 1
    shares = {
        "_all_gather": lambda bytes: bytes * others,
        "_reduce_scatter": lambda bytes: bytes * others / size,
        "all_to_all_single": lambda bytes: bytes * others / size,
        "all_reduce": lambda bytes: 2 * bytes * others / size,
    }
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (
            e[rank * rows : (rank + 1) * rows].clone().requires_grad_()
            for e in random_embeddings(size * rows, dim, dtype=dtype)
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, share in shares.items():
                patch.setattr(owner_of[name], name, counting(name, share))
            sent.clear()
            loss = gap_loss(x, y, group="world", backend="torch", group_mode="gather")
            in_forward = len(sent)
            loss.backward()
        statistics = 8 * size * rows
        ideal = 4 * rows * others * dim * dtype.itemsize
        assert sum(b for _, b in sent) <= 1.1 * ideal + 8 * statistics
        assert sum(b for _, b in sent if b >= rows * dim * dtype.itemsize) == ideal
        assert (in_forward, len(sent) - in_forward) == (8, 2)


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

        # A mistake on one process reaches those that wait.
        failing = [x, y] if rank == 0 else [x, y[:, :3]]
        waiting = r"rank 1 of `group` could not call the loss: embeddings must have one shape, got \[6, 4\]"
        with pytest.raises(ValueError, match=waiting if rank == 0 else "embeddings must have one shape"):
            gap_loss(*failing, group="world")
        with pytest.raises(
            ValueError, match="could not call the loss: `anchor` must" if rank == 0 else "`anchor` must"
        ):
            gap_loss(x, y, group="world", anchor=5 * rank)
        with pytest.raises(ValueError, match="same group_mode: rank 0 has 'auto', rank 1 has 'ring'"):
            gap_loss(x, y, group="world", group_mode=("auto", "ring")[rank])
        with pytest.raises(ValueError, match="`group_mode` must be 'auto', 'gather' or 'ring', got 'tree'"):
            gap_loss(x, y, group="world", group_mode="tree")
        for mode in ("gather", "ring"):
            spoilt = x.clone()
            if rank == 1:
                spoilt[2, 1] = torch.nan
            assert gap_loss(spoilt, y, group="world", group_mode=mode).isnan()

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


def _die_in_each_process(rank: int, size: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=20))
    x, y = (e.requires_grad_() for e in random_embeddings(6, 4))
    loss = gap_loss(x, y, group="world", backend="torch")
    if rank == 1:
        os._exit(0)  # between the forward and the backward pass
    with pytest.raises(RuntimeError, match=r"a process of `group` has ended, failed, or has not answered within"):
        loss.backward()


def test_a_process_that_dies_is_noticed():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    mp.spawn(_die_in_each_process, args=(2, port), nprocs=2)
    assert time.monotonic() - started < 60


def _on_gpus(rank: int, size: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size)
    try:
        whole = random_embeddings(size * 64, 32, 3)
        leaves = [e.double().requires_grad_() for e in whole]
        exact = gap_loss(*leaves, logit_scale=10.0)
        exact.backward()
        own = slice(rank * 64, (rank + 1) * 64)
        for mode in ("gather", "ring"):
            parts = [e[own].cuda().requires_grad_() for e in whole]
            loss = gap_loss(*parts, logit_scale=10.0, group="world", group_mode=mode)
            loss.backward()
            assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
            for ours, expected in zip(parts, leaves, strict=True):
                torch.testing.assert_close(ours.grad.cpu().double() / size, expected.grad[own], rtol=1e-2, atol=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccl_agrees_with_one_process():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = torch.cuda.device_count()
    mp.spawn(_on_gpus, args=(size, port), nprocs=size)
