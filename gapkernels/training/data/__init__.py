"""Data sets as dictionaries of modalities: one file per data set, one entry point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gapkernels.training.config import Data
from gapkernels.training.data import digits
from gapkernels.training.data.dataset import Dataset, ImageSpec, InputSpec, Split, TextSpec

# Each loader takes the folder with the data set's files, or None if the user named none.
_LOADERS: dict[str, Callable[[Path | None], Dataset]] = {"digits": digits.load}


def load_dataset(config: Data, data_dir: Path | None = None) -> Dataset:
    """Load a data set.

    Args:
        config: which data set, and how much of its training split.
        data_dir: folder with the data set's files; a data set that ships with a library needs none.

    Raises:
        UserError: if the folder is missing or holds too few samples.
    """
    dataset = _LOADERS[config.dataset](data_dir)
    return dataset if config.train_samples is None else dataset.with_train_samples(config.train_samples)
