"""Handwritten digits with their names, whole or in halves: 1,797 real images of 8x8 pixels that ship with scikit-learn.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998. The
images are stored writer by writer; where each begins is from the scikit-learn MOOC, "Non i.i.d. data: sample grouping".
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gapkernels.training.data.dataset import Dataset, ImageSpec, Samples, Split, TextSpec, fingerprint_of
from gapkernels.training.data.principal_components import principal_components, reduce_to
from gapkernels.training.data.tokenizer import Tokenizer
from gapkernels.training.settings import Number

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LARGEST_PIXEL = 16.0

# Images 0 to 515 are the first four writers'. Testing on people never seen in training, and training on few, keeps the
# metrics below their ceiling: with a random 70/30 split every method's V-measure is 0.99 and nothing can be compared.
_TRAIN_SAMPLES = 516
# The first eight writers'. Halves are hard enough.
_TRAIN_SAMPLES_OF_HALVES = 1029


class DigitsData(Samples):
    """Small digits, bundled with scikit-learn."""

    dataset: Literal["digits"] = Field(default="digits", description="name of the data set")


class DigitHalvesData(Samples):
    """Left and right halves of the same digits and the digits' names."""

    dataset: Literal["digit-halves"] = Field(default="digit-halves", description="name of the data set")
    image_energy: Number = Field(
        default=0.5, gt=0, le=1, description="share of each half's variance that its principal components keep"
    )


def load(config: DigitsData, data_dir: Path | None) -> Dataset:
    """Load the digits, split by writer: 516 images to train on, 1,281 of other people to test on.

    Args:
        config: which part; nothing else can be set.
        data_dir: unused, the images come with scikit-learn.

    Returns:
        Modalities `image` ([N, 1, 8, 8] float32, zero mean and unit variance over the training split) and `text`
        (the digit's name as characters, int64 [N, 5]). All samples of one digit share its text, hence its id.
    """
    pixels, labels = _read()
    std, mean = torch.std_mean(pixels[:_TRAIN_SAMPLES])
    return _named({"image": (pixels - mean) / std}, pixels, labels, _TRAIN_SAMPLES)


def load_halves(config: DigitHalvesData, data_dir: Path | None) -> Dataset:
    """Load the left and the right halves of the digits, reduced to few principal components, and split them by writer.

    As in AV-MNIST neither half tells everything, and each meets the name only.

    Args:
        config: energy kept of each half.
        data_dir: unused, the images come with scikit-learn.

    Returns:
        Modalities `left` and `right` ([N, 1, 8, 4] float32, zero mean and unit variance over the training split) and
        `text` as in `load`; 1,029 training samples of eight writers and 768 test samples of six others.
    """
    pixels, labels = _read()
    halves = {}
    for name, half in zip(("left", "right"), pixels.chunk(2, dim=3), strict=True):
        training = half[:_TRAIN_SAMPLES_OF_HALVES]
        reduced = reduce_to(half, principal_components(training, config.image_energy))
        std, mean = torch.std_mean(reduced[:_TRAIN_SAMPLES_OF_HALVES])
        halves[name] = (reduced - mean) / std
    return _named(halves, pixels, labels, _TRAIN_SAMPLES_OF_HALVES)


def _read() -> tuple[Tensor, Tensor]:
    """Return images, float32 [N, 1, 8, 8] in [0, 1], and labels, int64 [N]."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    return torch.from_numpy(bundle.images).float().unsqueeze(1) / _LARGEST_PIXEL, torch.from_numpy(bundle.target).long()


def _named(images: dict[str, Tensor], pixels: Tensor, labels: Tensor, train_samples: int) -> Dataset:
    """Return the data set of images, one [N, 1, H, W] by modality, and of the digits' names; `pixels` are as read."""
    tokenizer = Tokenizer.from_captions(DIGIT_NAMES, level="character")
    everything = Split({**images, "text": tokenizer.encode(DIGIT_NAMES)[labels]}, labels=labels, ids=labels)
    specs = {name: ImageSpec(1, values.shape[2], values.shape[3]) for name, values in images.items()}
    return Dataset(
        train=everything.take(torch.arange(train_samples)),
        test=everything.take(torch.arange(train_samples, len(labels))),
        specs={**specs, "text": TextSpec(vocabulary_size=tokenizer.size, length=tokenizer.length)},
        class_names=DIGIT_NAMES,
        fingerprint=fingerprint_of(pixels, labels),
    )
