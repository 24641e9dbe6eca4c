"""What the training loop knows of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSpec:
    """Shape of one image, or of anything else with channels, height and width."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class TextSpec:
    """Token numbers run from 0 (padding) to `vocabulary_size` - 1, `length` of them per caption."""

    vocabulary_size: int
    length: int


InputSpec = ImageSpec | TextSpec


@dataclass(frozen=True)
class Split:
    """N samples, each present in every modality.

    Args:
        modalities: inputs of the encoders by modality, each [N, ...]: images float32 [N, C, H, W], token numbers
            int64 [N, L].
        labels: class of each sample, int64 [N].
        ids: what a sample says, int64 [N]: in retrieval any sample with the query's id is a right answer.
    """

    modalities: Mapping[str, Tensor]
    labels: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        assert all(len(values) == len(self.labels) == len(self.ids) for values in self.modalities.values())

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Return the inputs of the samples `indices` (int64 [n]) on `device`."""
        return {name: values[indices].to(device, non_blocking=True) for name, values in self.modalities.items()}

    def take(self, indices: Tensor) -> Split:
        """Return the split that consists of the samples `indices` (int64 [n])."""
        modalities = {name: values[indices] for name, values in self.modalities.items()}
        return Split(modalities, self.labels[indices], self.ids[indices])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and what an encoder must know of its input.

    Args:
        train: samples to train on.
        test: samples held out for every reported metric.
        specs: shape of the inputs by modality.
        class_names: name of each class, in the order of the labels.
    """

    train: Split
    test: Split
    specs: Mapping[str, InputSpec]
    class_names: tuple[str, ...]
