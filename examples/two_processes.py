"""The loss of the batch of all processes, with DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/two_processes.py

``group="world"`` takes the rows of all processes. Every process then returns the loss of the whole batch, and the mean
of gradients that DistributedDataParallel takes is its gradient. On GPUs, use the backend "nccl" and a device per
process.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gapkernels import GapLoss


class TwoTowers(nn.Module):
    """Both towers and the loss in one module, so that the learned temperature is averaged over processes too."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower, self.text_tower = nn.Linear(32, 16), nn.Linear(24, 16)
        self.loss = GapLoss(learn_temperature=True, group="world")

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.loss(self.image_tower(images), self.text_tower(texts))


def train(steps: int = 5) -> list[float]:
    """Train for a few steps; the loss before each, the same on every process."""
    torch.manual_seed(0)
    model = DistributedDataParallel(TwoTowers())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Every process holds an equal number of rows: a DistributedSampler with drop_last=True sees to that.
    content = torch.randn(512, 8)
    images, texts = content @ torch.randn(8, 32), content @ torch.randn(8, 24)
    own = slice(dist.get_rank(), None, dist.get_world_size())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = model(images[own], texts[own])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    try:
        losses = train()
        print(f"rank {dist.get_rank()}: " + " ".join(f"{value:.6f}" for value in losses), flush=True)
        # A wrapped model that outlives the group may hang at the end (gloo's threads then end under Python's lock, for
        # which they may wait), and it holds references in a circle: let it go now.
        gc.collect()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
