"""Data sets as dictionaries of modalities: one file per data set, with its settings and its loader; one entry point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from gapkernels.errors import UserError
from gapkernels.training.data import av_mnist, cifar10, digits, features, mscoco
from gapkernels.training.data.av_mnist import AVMNISTData
from gapkernels.training.data.cifar10 import CIFAR10Data
from gapkernels.training.data.dataset import Dataset, ImageSpec, InputSpec, Samples, Split, TextSpec, VectorSpec
from gapkernels.training.data.digits import DigitHalvesData, DigitsData
from gapkernels.training.data.features import FeaturesData
from gapkernels.training.data.mscoco import COCOData

Data = Annotated[
    DigitsData | DigitHalvesData | CIFAR10Data | AVMNISTData | COCOData | FeaturesData,
    Field(discriminator="dataset", description="which data set, and how much of it"),
]

# Each loader takes its settings and the folder with the files, or None if the user named none.
_LOADERS: dict[type[Samples], Callable[[Any, Path | None], Dataset]] = {
    DigitsData: digits.load,
    DigitHalvesData: digits.load_halves,
    CIFAR10Data: cifar10.load,
    AVMNISTData: av_mnist.load,
    COCOData: mscoco.load,
    FeaturesData: features.load,
}


def load_dataset(config: Data, data_dir: Path | None = None) -> Dataset:
    """Load a data set.

    Args:
        config: which data set, and how much of its splits.
        data_dir: folder with the data set's files; a data set that ships with a library needs none.

    Raises:
        UserError: if the folder is missing or holds too few samples.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"there is no data folder {data_dir}")
    dataset = _LOADERS[type(config)](config, data_dir)
    dataset = replace(
        dataset,
        train=_first(dataset.train, config.train_samples, "train_samples"),
        test=_first(dataset.test, config.test_samples, "test_samples"),
    )
    for name, split in (("training", dataset.train), ("test", dataset.test)):
        if len(split) < 2:
            raise UserError(f"the {name} split of {config.dataset} must hold at least 2 samples, got {len(split)}")
    return dataset


def _first(split: Split, count: int | None, setting: str) -> Split:
    if count is None:
        return split
    if count > len(split):
        raise UserError(f"data.{setting} is {count}, but the split has {len(split)} samples")
    return split.take(torch.arange(count))
