"""Data sets as dictionaries of modalities: one file per data set, one entry point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gapkernels.errors import UserError
from gapkernels.training.config import Data
from gapkernels.training.data import av_mnist, cifar10, digits, features, mscoco
from gapkernels.training.data.dataset import Dataset, ImageSpec, InputSpec, Split, TextSpec, VectorSpec

# Each loader takes its section of the configuration and the folder with the files, or None if the user named none.
_LOADERS: dict[str, Callable[[Any, Path | None], Dataset]] = {
    "digits": digits.load,
    "digit-halves": digits.load_halves,
    "cifar10": cifar10.load,
    "av-mnist": av_mnist.load,
    "mscoco": mscoco.load,
    "features": features.load,
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
    dataset = _LOADERS[config.dataset](config, data_dir)
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
