"""A batch of 2,048 pairs with the activations of 128 in memory: gradient caching.

    python examples/large_batch.py

A contrastive loss of 16 small batches is another loss, with fewer negatives. Here one loss sees all 2,048 embeddings,
and the gradient is the one that a single large batch would give.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gapkernels import GapLoss, GradientCache

BATCH, MICRO_BATCH = 2048, 128


def main(steps: int = 3) -> list[float]:
    """Train for a few steps; the loss before each."""
    torch.manual_seed(0)
    image_tower, text_tower = (
        nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64)) for width in (48, 32)
    )
    loss = GapLoss(learn_temperature=True)
    parameters = [*image_tower.parameters(), *text_tower.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def encode(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, texts = part
        return image_tower(images), text_tower(texts)

    content = torch.randn(BATCH, 16)
    images, texts = content @ torch.randn(16, 48), content @ torch.randn(16, 32)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        step = GradientCache(encode, list(zip(images.split(MICRO_BATCH), texts.split(MICRO_BATCH), strict=True)))
        value = loss(*step.embeddings)
        value.backward()  # reaches the learned temperature and the embeddings
        step.backward()  # and now the towers, one micro-batch at a time
        optimizer.step()
        losses.append(value.item())
    return losses


if __name__ == "__main__":
    print("loss before each step:", ", ".join(f"{value:.4f}" for value in main()))
