"""MS-COCO captions: photographs, each with five sentences; classes from images with objects of one category only.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312; Chen et al., arXiv 1504.00325.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gapkernels.errors import UserError
from gapkernels.training.config import COCOData
from gapkernels.training.data.dataset import NO_CLASS, Dataset, ImageSpec, Split, TextSpec
from gapkernels.training.data.files import decode_images, find_first, read_file, require_folder
from gapkernels.training.data.tokenizer import Tokenizer
from gapkernels.training.data.transforms import FirstCaption, Normalize, RandomCaption, RandomCropFlip

_CAPTIONS_PER_IMAGE = 5
_LONGEST_CAPTION = 32  # tokens; 99 % of COCO's captions are shorter
_MEAN, _STD = (0.470, 0.447, 0.408), (0.277, 0.273, 0.288)  # of the training images
_FOLDERS = ("", "coco/", "mscoco/", "coco_mini/")


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
    categories = _read(root / "annotations" / "instances_val2017.json", _categories)
    train_images, train_captions, train_labels = _read_part(root, "train2017", config.train_samples, categories)
    test_images, test_captions, test_labels = _read_part(root, "val2017", config.test_samples, categories)
    tokenizer = Tokenizer.from_captions(
        [caption for captions in train_captions for caption in captions], level="word", max_length=_LONGEST_CAPTION
    )

    def split(paths: list[Path], captions: list[list[str]], labels: Tensor, transforms: dict[str, nn.Module]) -> Split:
        tokens = [tokenizer.encode(islice(cycle(texts), _CAPTIONS_PER_IMAGE)) for texts in captions]
        images = decode_images(paths, config.image_size)
        return Split({"image": images, "text": torch.stack(tokens)}, labels, torch.arange(len(labels)), transforms)

    normalize = Normalize(_MEAN, _STD)
    augment = nn.Sequential(RandomCropFlip(config.image_size // 8), normalize) if config.augment else normalize
    return Dataset(
        train=split(train_images, train_captions, train_labels, {"image": augment, "text": RandomCaption()}),
        test=split(test_images, test_captions, test_labels, {"image": normalize, "text": FirstCaption()}),
        specs={
            "image": ImageSpec(channels=3, height=config.image_size, width=config.image_size),
            "text": TextSpec(vocabulary_size=tokenizer.size, length=tokenizer.length),
        },
        class_names=tuple(categories.values()),
    )


def _read_part(
    root: Path, part: str, limit: int | None, categories: dict[int, str]
) -> tuple[list[Path], list[list[str]], Tensor]:
    """Return image files, captions of each, and labels [N], in the order of the annotation file."""
    annotations = root / "annotations"
    names, captions = _read(annotations / f"captions_{part}.json", _captions)
    objects = _read(annotations / f"instances_{part}.json", _categories_of_images)
    described = [image for image in names if captions[image]]
    # Checked by the caller for the split as a whole; reading no more than needed keeps a small run small.
    described = described[:limit]
    paths = [root / part / names[image] for image in described]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} images of {part} are missing, the first is {missing[0]}")
    index = {category: number for number, category in enumerate(categories)}
    labels = [index[next(iter(objects[image]))] if len(objects[image]) == 1 else NO_CLASS for image in described]
    return paths, [captions[image] for image in described], torch.tensor(labels)


def _read(path: Path, parse: Any) -> Any:
    if not path.is_file():
        raise UserError(f"MS-COCO needs the annotation file {path}")
    return read_file(path, lambda path: parse(json.loads(path.read_bytes())), "COCO annotations")


def _captions(content: dict[str, Any]) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return file names and captions by image."""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[int, list[str]] = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return names, captions


def _categories(content: dict[str, Any]) -> dict[int, str]:
    return {category["id"]: category["name"] for category in content["categories"]}


def _categories_of_images(content: dict[str, Any]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = defaultdict(set)
    for annotation in content["annotations"]:
        found[annotation["image_id"]].add(annotation["category_id"])
    return found
