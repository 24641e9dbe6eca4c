"""Pre-computed features of frozen encoders, from a file: only what projects them into the joint space is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gapkernels.errors import UserError
from gapkernels.training.data.dataset import Dataset, Samples, Split, VectorSpec, fingerprint_of
from gapkernels.training.data.files import require_folder
from gapkernels.training.embeddings import NO_CLASS, Embeddings, read_features
from gapkernels.training.settings import Number

_SPLIT_SEED = 0


class FeaturesData(Samples):
    """Pre-computed features, from .npz or .safetensors files in the data folder."""

    dataset: Literal["features"] = Field(default="features", description="name of the data set")
    train_file: str = Field(default="train.safetensors", description="file with one array [N, D] per modality")
    test_file: str | None = Field(default=None, description="likewise (null: part of the training file)")
    test_fraction: Number = Field(
        default=0.2, gt=0, lt=1, description="share of the training file to test on if there is no test file"
    )


def load(config: FeaturesData, data_dir: Path | None) -> Dataset:
    """Load features of two or more modalities from .npz or .safetensors files.

    Args:
        config: names of the files, and the share to test on if there is one file only.
        data_dir: the folder that holds them.

    Returns:
        One modality per array, float32 [N, D of the modality]. Without `labels` in the file no sample has a class;
        without `ids` each sample matches itself alone; without `groups` none share a source.

    Raises:
        UserError: if a file is missing or damaged, or the files do not fit together.
    """
    folder = require_folder(data_dir, "features")
    files = [read_features(folder / name) for name in (config.train_file, config.test_file) if name is not None]
    classes = torch.cat(
        [file.labels for file in files if file.labels is not None] or [torch.empty(0, dtype=torch.int64)]
    )
    # Numbered anew: what the file calls its classes may be any number, and a name for each below it would be too many.
    numbers = classes[classes != NO_CLASS].unique()
    train, *tests = (_split_of(file, numbers) for file in files)
    train, test = (train, tests[0]) if tests else _divide(train, config.test_fraction)
    widths, test_widths = _widths(train), _widths(test)
    if widths != test_widths:
        raise UserError(f"the training file holds features {widths}, the test file {test_widths}")
    return Dataset(
        train=train,
        test=test,
        specs={name: VectorSpec(width) for name, width in widths.items()},
        class_names=tuple(map(str, numbers.tolist())),
        fingerprint=fingerprint_of(*(values for file in files for values in _arrays(file))),
    )


def _arrays(features: Embeddings) -> list[Tensor | None]:
    return [*(features.modalities[name] for name in sorted(features.modalities)), *_sample_numbers(features)]


def _sample_numbers(features: Embeddings) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    assert not isinstance(features.ids, Mapping)  # only embeddings have ids by modality
    return features.labels, features.ids, features.groups


def _split_of(features: Embeddings, classes: Tensor) -> Split:
    """Return the samples of a file, their labels as places in `classes` (the class numbers there are, ascending)."""
    samples = len(next(iter(features.modalities.values())))
    labels, ids, groups = _sample_numbers(features)
    if labels is not None:
        labels = torch.where(labels == NO_CLASS, NO_CLASS, torch.searchsorted(classes, labels))
    return Split(
        modalities={name: values.float() for name, values in features.modalities.items()},
        labels=torch.full((samples,), NO_CLASS) if labels is None else labels,
        ids=torch.arange(samples) if ids is None else ids,
        groups=groups,
    )


def _widths(split: Split) -> dict[str, int]:
    return {name: values.shape[1] for name, values in sorted(split.modalities.items())}


def _divide(split: Split, test_fraction: float) -> tuple[Split, Split]:
    """Draw the test samples at random, the same ones every time; samples of one group, or of one id, stay together.

    Where ids are classes, as with class names for captions, every class would fall on one side: then single samples
    are drawn.
    """
    groups = split.groups
    if groups is None:
        groups = torch.arange(len(split)) if torch.equal(split.ids, split.labels) else split.ids
    names, group_of = groups.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(len(names), generator=generator)
    tested = torch.zeros(len(names), dtype=torch.bool)
    tested[order[: round(test_fraction * len(names))]] = True
    in_test = tested[group_of]
    if in_test.all() or not in_test.any():
        raise UserError(f"a test_fraction of {test_fraction} leaves one side of {len(names)} samples empty")
    return split.take((~in_test).nonzero().flatten()), split.take(in_test.nonzero().flatten())
