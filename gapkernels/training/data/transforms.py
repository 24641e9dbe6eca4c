"""From stored samples to the input of an encoder, on the device and for a whole batch at once.

Data sets are kept in a compact form (uint8 pixels, numbers of recordings, every caption of an image). What turns a
batch of them into floats is a module here, so that its tables and constants move to a device with the data. Random
transforms draw from torch's generator of that device, the one that a checkpoint keeps and gradient caching replays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Normalize(nn.Module):
    """Maps uint8 pixels [N, C, H, W] to float32 of zero mean and unit variance per channel.

    Args:
        mean: per channel, of pixels scaled to [0, 1].
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise a batch."""
        return (images.float() - self.mean) / self.std


class RandomCropFlip(nn.Module):
    """Pads every image with zeros, crops it at a place of its own and mirrors every second one.

    Args:
        padding: pixels added on each side.
        flip: mirror from left to right with probability 1/2.

    Source:
        He et al., arXiv 1512.03385, section 4.2, for CIFAR-10 with a padding of 4.
    """

    def __init__(self, padding: int, flip: bool = True) -> None:
        super().__init__()
        self.padding = padding
        self.flip = flip

    def forward(self, images: Tensor) -> Tensor:
        """Augment images [N, C, H, W] of any dtype."""
        samples, channels, height, width = images.shape
        device = images.device
        padded = F.pad(images, [self.padding] * 4)
        top, left = torch.randint(2 * self.padding + 1, (2, samples, 1), device=device)
        rows = top + torch.arange(height, device=device)
        columns = left + torch.arange(width, device=device)
        if self.flip:
            mirrored = torch.rand(samples, 1, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        # One gather for the whole batch, each index broadcast to [N, C, H, W].
        sample = torch.arange(samples, device=device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


class RandomCaption(nn.Module):
    """Takes one of each image's captions at random: token numbers [N, K, L] become [N, L]."""

    def forward(self, captions: Tensor) -> Tensor:
        """Choose captions."""
        samples, choices, _ = captions.shape
        chosen = torch.randint(choices, (samples,), device=captions.device)
        return captions[torch.arange(samples, device=captions.device), chosen]


class FirstCaption(nn.Module):
    """Takes the first caption of each image: token numbers [N, K, L] become [N, L]."""

    def forward(self, captions: Tensor) -> Tensor:
        """Choose captions."""
        return captions[:, 0]


class Lookup(nn.Module):
    """Replaces row numbers [N] by rows of a table, which many samples may share.

    Args:
        table: [R, ...], any dtype; rows come out as float32.
    """

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, rows: Tensor) -> Tensor:
        """Look up a batch."""
        return self.table[rows].float()
