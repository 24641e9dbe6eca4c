"""Contrasts with options over several processes: as one process on the concatenated batch."""

import os
import socket

import contrast_cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contrast_cases import CASES, NUM_NEGATIVES
from oracle import random_embeddings

from gapkernels import gap_loss, info_nce, similarity_logsumexp

ROWS, SIZE = 12, 2


def _own(x: torch.Tensor, rank: int) -> torch.Tensor:
    rows = x.shape[0] // SIZE
    return x[rank * rows : (rank + 1) * rows]


def _evaluate(case, embeddings, tensors, group):
    leaves = [e.clone().requires_grad_() for e in embeddings]
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    tensors = {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in tensors.items()}
    loss = gap_loss(*leaves, logit_scale=scale, group=group, **{**case, **tensors})
    inputs = [*leaves, scale, *(t for t in tensors.values() if t.requires_grad)]
    return loss, torch.autograd.grad(loss, inputs)


def _in_each_process(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=SIZE)
    try:
        embeddings = random_embeddings(ROWS, 8, dtype=torch.float64)
        for case in CASES:
            tensors = contrast_cases.tensors_of(case, embeddings[0])
            shared = {"logit_bias"}
            own = {k: t.detach() if k in shared else _own(t.detach(), rank) for k, t in tensors.items()}
            whole = {k: t.detach() for k, t in tensors.items()}
            loss, gradients = _evaluate(case, [_own(e, rank) for e in embeddings], own, "world")
            expected, expected_gradients = _evaluate(case, embeddings, whole, None)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, msg=str(case))
            for gradient, value in zip(gradients, expected_gradients, strict=True):
                if value.dim():  # gradients of what a process holds are scaled for the mean that DDP takes
                    gradient, value = gradient / SIZE, _own(value, rank)
                torch.testing.assert_close(gradient, value, rtol=1e-10, atol=1e-12, msg=str(case))
        own = [_own(e, rank) for e in embeddings]
        losses = info_nce(*own, reduction="none", same_side=True, group="world")
        torch.testing.assert_close(losses, _own(info_nce(*embeddings, reduction="none", same_side=True), rank))
        with pytest.raises(ValueError, match="number of columns: rank 0 has 3, rank 1 has 2"):
            similarity_logsumexp(own[0], own[0][: 3 - rank], matched=False, group="world")
    finally:
        dist.destroy_process_group()


def test_processes_agree_with_one():
    assert ROWS % SIZE == NUM_NEGATIVES % SIZE == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_in_each_process, (port,), nprocs=SIZE)
