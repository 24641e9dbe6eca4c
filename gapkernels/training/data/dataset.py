"""What the training loop knows of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from pydantic import Field
from torch import Tensor, nn

from gapkernels.training.settings import Integer, Section


class Samples(Section):
    """How much of a data set; the settings of every data set begin with these."""

    train_samples: Integer | None = Field(
        default=None, gt=0, le=2**40, description="train on this many samples (null: on all)"
    )
    test_samples: Integer | None = Field(
        default=None, gt=1, le=2**40, description="test on this many samples (null: on all)"
    )


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


@dataclass(frozen=True)
class VectorSpec:
    """Features of a fixed width."""

    width: int


InputSpec = ImageSpec | TextSpec | VectorSpec


@dataclass(frozen=True)
class Split:
    """N samples, each present in every modality.

    Args:
        modalities: stored samples by modality, each [N, ...].
        labels: class of each sample, int64 [N]; `NO_CLASS`, -1, keeps a sample out of clustering and classification.
        ids: what a sample says, int64 [N]: in retrieval any sample with the query's id is a right answer.
        transforms: what turns a batch of stored samples into the input of the encoder, for modalities where these
            differ. Inputs are: images float32 [n, C, H, W], token numbers int64 [n, L], features float32 [n, D].
        groups: which samples share a source, int64 [N], or None if none do: they stay on one side where classifiers
            are trained on one part of the split and tested on another.
    """

    modalities: Mapping[str, Tensor]
    labels: Tensor
    ids: Tensor
    transforms: Mapping[str, nn.Module] = field(default_factory=dict)
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        assert all(len(values) == len(self.labels) == len(self.ids) for values in self.modalities.values())
        assert self.groups is None or len(self.groups) == len(self)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the samples `indices` (int64 [n]) as they are stored, on the device they are stored on."""
        return {name: values[indices.to(values.device)] for name, values in self.modalities.items()}

    def prepare(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn a batch of stored samples into the inputs of the encoders; a training split may draw at random."""
        return {
            name: self.transforms[name](values) if name in self.transforms else values for name, values in batch.items()
        }

    def take(self, indices: Tensor) -> Split:
        """Return the split that consists of the samples `indices` (int64 [n])."""
        modalities = {name: values[indices] for name, values in self.modalities.items()}
        return replace(
            self,
            modalities=modalities,
            labels=self.labels[indices],
            ids=self.ids[indices],
            groups=None if self.groups is None else self.groups[indices],
        )

    def to(self, device: torch.device) -> Split:
        """Move samples and transforms to a device; labels, ids and groups stay on the CPU, where metrics want them."""
        return replace(
            self,
            modalities={name: values.to(device) for name, values in self.modalities.items()},
            transforms={name: transform.to(device) for name, transform in self.transforms.items()},
        )


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and what an encoder must know of its input.

    Args:
        train: samples to train on.
        test: samples held out for every reported metric.
        specs: shape of the inputs by modality.
        class_names: name of each class, in the order of the labels.
        fingerprint: of everything that was read, see `fingerprint_of`.
    """

    train: Split
    test: Split
    specs: Mapping[str, InputSpec]
    class_names: tuple[str, ...]
    fingerprint: str

    def to(self, device: torch.device) -> Dataset:
        """Move both splits to a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def fingerprint_of(*arrays: Tensor | None) -> str:
    """Return a checksum of what a data set was read from; a run is continued on the same data only.

    Args:
        arrays: as they are in the files, before anything that another computer would round differently.
    """
    digest = hashlib.sha256()
    for values in arrays:
        if values is None:
            digest.update(b"absent;")
            continue
        digest.update(f"{values.dtype} {list(values.shape)};".encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
