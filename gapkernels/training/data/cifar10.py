"""CIFAR-10: 60,000 colour images of 32x32 pixels in ten classes; the text is the name of the class.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from gapkernels.training.data.dataset import Dataset, ImageSpec, Samples, Split, TextSpec, fingerprint_of
from gapkernels.training.data.files import class_numbers, cut, decode_images, find_first, read_file, require_folder
from gapkernels.training.data.tokenizer import Tokenizer
from gapkernels.training.data.transforms import Normalize, RandomCropFlip
from gapkernels.training.npz import open_npz
from gapkernels.training.settings import Integer

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SIDE = 32
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images

_ORIGINAL_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_JPEG_FILES = {"train": ["train-0.npz", "train-1.npz"], "test": ["test.npz"]}
_PLACES = [
    *("cifar-10-batches-py/data_batch_1", "cifar10/cifar-10-batches-py/data_batch_1", "data_batch_1"),
    *("cifar10/train-0.npz", "train-0.npz"),
]


class _Images(NamedTuple):
    """uint8 [N, 3, 32, 32] and int64 [N]."""

    pixels: Tensor
    labels: Tensor


class CIFAR10Data(Samples):
    """Images and class names."""

    dataset: Literal["cifar10"] = Field(default="cifar10", description="name of the data set")
    augment: bool = Field(default=True, description="random crops and flips of training images")
    crop_padding: Integer = Field(
        default=4, ge=0, le=256, description="pixels by which a random crop moves an image at most"
    )


def load(config: CIFAR10Data, data_dir: Path | None) -> Dataset:
    """Load CIFAR-10 from the original download or from files of JPEG streams.

    Args:
        config: whether and how training images are augmented.
        data_dir: holds `cifar-10-batches-py/` (the unpacked original for Python), or `cifar10/` or directly
            `train-0.npz`, `train-1.npz` and `test.npz` with arrays `jpeg` (all streams joined, uint8), `offsets`
            (int64 [N + 1]) and `labels` (uint8 [N]).

    Returns:
        Modalities `image` (stored as uint8 [N, 3, 32, 32]) and `text` (the class name as one word, int64 [N, 1]). All
        samples of one class share its text, hence its id.

    Raises:
        UserError: if files are missing or damaged.
    """
    first = find_first(require_folder(data_dir, "cifar10"), _PLACES, "CIFAR-10")
    original = first.name == "data_batch_1"
    names, read = (_ORIGINAL_BATCHES, _read_batch) if original else (_JPEG_FILES, _read_jpeg_file)
    tokenizer = Tokenizer.from_captions(CLASS_NAMES, level="word")
    texts = tokenizer.encode(CLASS_NAMES)

    def split(part: str, image_transform: nn.Module) -> Split:
        files = [first.parent / name for name in names[part]]
        images = [read_file(path, read, "images and labels of CIFAR-10") for path in files]
        pixels, labels = (torch.cat(parts) for parts in zip(*images, strict=True))
        return Split({"image": pixels, "text": texts[labels]}, labels, labels, {"image": image_transform})

    normalize = Normalize(_MEAN, _STD)
    augment = nn.Sequential(RandomCropFlip(config.crop_padding), normalize) if config.augment else normalize
    train, test = split("train", augment), split("test", normalize)
    return Dataset(
        train=train,
        test=test,
        specs={
            "image": ImageSpec(channels=3, height=_SIDE, width=_SIDE),
            "text": TextSpec(vocabulary_size=tokenizer.size, length=tokenizer.length),
        },
        class_names=CLASS_NAMES,
        fingerprint=fingerprint_of(train.modalities["image"], train.labels, test.modalities["image"], test.labels),
    )


def _read_jpeg_file(path: Path) -> _Images:
    with open_npz(path) as file:
        stream, offsets, labels = file["jpeg"], file["offsets"], class_numbers(file["labels"], len(CLASS_NAMES))
    if stream.dtype != np.uint8:
        raise ValueError(f"`jpeg` must hold bytes, found {stream.dtype}")
    parts = cut(stream, offsets, len(labels), "bytes")
    return _Images(decode_images([part.tobytes() for part in parts], _SIDE), labels)


def _read_batch(path: Path) -> _Images:
    with path.open("rb") as file:
        content: dict[bytes, Any] = _ArrayUnpickler(file, encoding="bytes").load()
    pixels, labels = np.asarray(content[b"data"]), class_numbers(np.asarray(content[b"labels"]), len(CLASS_NAMES))
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3 * _SIDE * _SIDE:
        raise ValueError(f"images must be bytes [N, {3 * _SIDE * _SIDE}], found {pixels.dtype} {list(pixels.shape)}")
    if len(pixels) != len(labels):
        raise ValueError(f"{len(pixels)} images and {len(labels)} labels")
    return _Images(torch.from_numpy(pixels.copy()).view(-1, 3, _SIDE, _SIDE), labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled arrays and nothing else: a pickle from elsewhere could run any program."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a batch of CIFAR-10 holds no {module}.{name}")
