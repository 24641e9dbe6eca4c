"""Swap the loss in a plain training loop: two towers, pairs of images and texts.

    python examples/plain_loop.py

The data is made up: images and texts are two noisy views of what they show. Put your own towers and loader here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gapkernels import GapLoss
from gapkernels.metrics import modality_gap, retrieval


def make_pairs(samples: int) -> TensorDataset:
    """Images ``[N, 32]`` and texts ``[N, 24]`` of the same hidden content."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(samples, 8, generator=generator)
    views = [content @ torch.randn(8, width, generator=generator) for width in (32, 24)]
    return TensorDataset(*(view + 0.3 * torch.randn(view.shape, generator=generator) for view in views))


def main() -> dict[str, float]:
    """Train for a few epochs; the gap and the recall afterwards."""
    torch.manual_seed(0)
    image_tower, text_tower = (nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 16)) for width in (32, 24))
    loss = GapLoss(temperature=0.1, learn_temperature=True)  # was: open_clip.loss.ClipLoss()
    parameters = [*image_tower.parameters(), *text_tower.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    loader = DataLoader(make_pairs(1024), batch_size=256, shuffle=True, drop_last=True)

    epochs = 12
    for epoch in range(epochs):
        # The paper's schedule: uniformity fades, alignment grows. The weights are plain attributes.
        done = epoch / epochs
        loss.cu_weight = 1 - min(max((done - 0.2) / 0.5, 0), 1)
        loss.atp_weight = 1 + max(2 * done - 1, 0)
        for images, texts in loader:
            terms = loss(image_tower(images), text_tower(texts), return_terms=True)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
        if epoch % 4 == 3:
            print(f"epoch {epoch + 1}: loss {terms.loss:.3f}, gap {terms.modality_gap:.3f}")

    with torch.no_grad():
        images, texts = make_pairs(1024).tensors
        embeddings = image_tower(images), text_tower(texts)
    return {"gap": modality_gap(*embeddings), "recall": retrieval(*embeddings).query_to_target.recall[1]}


if __name__ == "__main__":
    print(main())
