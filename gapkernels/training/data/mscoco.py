"""MS-COCO captions: photographs, each with five sentences; classes from images with objects of one category only.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312; Chen et al., arXiv 1504.00325.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from gapkernels.errors import UserError
from gapkernels.reading import Strict, read_json
from gapkernels.training.data.dataset import Dataset, ImageSpec, Samples, Split, TextSpec, fingerprint_of
from gapkernels.training.data.files import decode_images, find_first, require_folder
from gapkernels.training.data.tokenizer import Tokenizer
from gapkernels.training.data.transforms import FirstCaption, Normalize, RandomCaption, RandomCropFlip
from gapkernels.training.embeddings import NO_CLASS
from gapkernels.training.settings import Integer

Content = TypeVar("Content", bound=Strict)

_CAPTIONS_PER_IMAGE = 5
_LONGEST_CAPTION = 32  # tokens; 99 % of COCO's captions are shorter
_MEAN, _STD = (0.470, 0.447, 0.408), (0.277, 0.273, 0.288)  # of the training images
_FOLDERS = ("", "coco/", "mscoco/", "coco_mini/")


class COCOData(Samples):
    """Photographs with five captions each."""

    dataset: Literal["mscoco"] = Field(default="mscoco", description="name of the data set")
    image_size: Integer = Field(default=224, gt=7, le=2048, description="side of the images in pixels")
    augment: bool = Field(default=True, description="random crops and flips of training images")


def load(config: COCOData, data_dir: Path | None) -> Dataset:
    """Load COCO 2017 in its own layout.

    Args:
        config: side of the images, how many to decode, and whether to augment.
        data_dir: holds `annotations/{captions,instances}_{train,val}2017.json`, `train2017/*.jpg` and
            `val2017/*.jpg`, directly or in `coco/`, `mscoco/` or `coco_mini/`.

    Returns:
        Modalities `image` (stored as uint8 [N, 3, side, side]) and `text` (words; stored with five captions per image,
        of which training takes one at random and testing the first). Every image is its own id. The label is the
        category of an image whose objects are all of one category, else `NO_CLASS`: clustering and classification
        leave such images out.

    Raises:
        UserError: if files are missing or damaged.
    """
    folder = require_folder(data_dir, "mscoco")
    root = find_first(
        folder, [f"{place}annotations/captions_train2017.json" for place in _FOLDERS], "MS-COCO"
    ).parent.parent
    categories = _categories(root / "annotations" / "instances_val2017.json")
    train_images, train_captions, train_labels = _read_part(root, "train2017", config.train_samples, categories)
    test_images, test_captions, test_labels = _read_part(root, "val2017", config.test_samples, categories)
    try:
        tokenizer = Tokenizer.from_captions(
            [caption for captions in train_captions for caption in captions], level="word", max_length=_LONGEST_CAPTION
        )
    except ValueError as error:
        raise UserError(f"MS-COCO in {root}: {error}") from error

    def split(paths: list[Path], captions: list[list[str]], labels: Tensor, transforms: dict[str, nn.Module]) -> Split:
        tokens = [tokenizer.encode(islice(cycle(texts), _CAPTIONS_PER_IMAGE)) for texts in captions]
        images = decode_images(paths, config.image_size)
        return Split({"image": images, "text": torch.stack(tokens)}, labels, torch.arange(len(labels)), transforms)

    normalize = Normalize(_MEAN, _STD)
    augment = nn.Sequential(RandomCropFlip(config.image_size // 8), normalize) if config.augment else normalize
    train = split(train_images, train_captions, train_labels, {"image": augment, "text": RandomCaption()})
    test = split(test_images, test_captions, test_labels, {"image": normalize, "text": FirstCaption()})
    return Dataset(
        train=train,
        test=test,
        specs={
            "image": ImageSpec(channels=3, height=config.image_size, width=config.image_size),
            "text": TextSpec(vocabulary_size=tokenizer.size, length=tokenizer.length),
        },
        class_names=tuple(categories.values()),
        fingerprint=fingerprint_of(
            *(values for part in (train, test) for values in (*part.modalities.values(), part.labels))
        ),
    )


def _read_part(
    root: Path, part: str, limit: int | None, categories: dict[int, str]
) -> tuple[list[Path], list[list[str]], Tensor]:
    """Return image files, captions of each, and labels [N], in the order of the annotation file."""
    names, captions = _captions(root / "annotations" / f"captions_{part}.json")
    objects = _categories_of_images(root / "annotations" / f"instances_{part}.json", categories)
    described = [image for image in names if captions[image]]
    if not described:
        raise UserError(f"{root / 'annotations' / f'captions_{part}.json'} holds no image with a caption")
    # Checked by the caller for the split as a whole; reading no more than needed keeps a small run small.
    described = described[:limit]
    paths = [root / part / names[image] for image in described]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} images of {part} are missing, the first is {missing[0]}")
    index = {category: number for number, category in enumerate(categories)}
    labels = [index[next(iter(objects[image]))] if len(objects[image]) == 1 else NO_CLASS for image in described]
    return paths, [captions[image] for image in described], torch.tensor(labels)


class _Image(Strict):
    id: int
    file_name: str

    @field_validator("file_name")
    @classmethod
    def _stays_in_its_folder(cls, value: str) -> str:
        parts = PurePosixPath(value).parts
        if not parts or ".." in parts or value.startswith("/") or any(sign in value for sign in "\\:\0"):
            raise ValueError("must name a file in the folder of the images")
        return value


class _Caption(Strict):
    image_id: int
    caption: str


class _Object(Strict):
    image_id: int
    category_id: int


class _Category(Strict):
    id: int
    name: str


class _CaptionFile(Strict):
    images: list[_Image]
    annotations: list[_Caption]


class _ObjectFile(Strict):
    annotations: list[_Object]


class _CategoryFile(Strict):
    categories: list[_Category]


def _read(path: Path, kind: type[Content]) -> Content:
    if not path.is_file():
        raise UserError(f"MS-COCO needs the annotation file {path}")
    try:
        return read_json(path, kind)
    except UserError as error:
        raise UserError(f"cannot read {path}, expected COCO annotations ({error})") from error


def _captions(path: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return file names and captions by image."""
    content = _read(path, _CaptionFile)
    captions: dict[int, list[str]] = defaultdict(list)
    for annotation in content.annotations:
        captions[annotation.image_id].append(annotation.caption)
    return {image.id: image.file_name for image in content.images}, captions


def _categories(path: Path) -> dict[int, str]:
    return {category.id: category.name for category in _read(path, _CategoryFile).categories}


def _categories_of_images(path: Path, categories: Mapping[int, str]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = defaultdict(set)
    for number, annotation in enumerate(_read(path, _ObjectFile).annotations):
        if annotation.category_id not in categories:
            raise UserError(
                f"{path}: annotations.{number}.category_id is {annotation.category_id}, which is no category of "
                "instances_val2017.json"
            )
        found[annotation.image_id].add(annotation.category_id)
    return found
