"""Finding and reading the files of data sets, with messages that say what was expected where."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from os import cpu_count
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gapkernels.errors import UserError, printable

Content = TypeVar("Content")


def require_folder(data_dir: Path | None, dataset: str) -> Path:
    """Return the data folder.

    Raises:
        UserError: if the user named none.
    """
    if data_dir is None:
        raise UserError(f"data set {dataset} is read from files: name their folder with --data-dir")
    return data_dir


def find_first(data_dir: Path, candidates: Iterable[str], what: str) -> Path:
    """Return the first path under `data_dir` that exists.

    Args:
        data_dir: the data folder.
        candidates: relative paths, in order of preference.
        what: what is looked for, for the message.

    Raises:
        UserError: if none of them exists.
    """
    names = list(candidates)
    for name in names:
        if (data_dir / name).exists():
            return data_dir / name
    raise UserError(f"{what} not found in {data_dir}: expected {' or '.join(names)}")


def read_file(path: Path, read: Callable[[Path], Content], expected: str) -> Content:
    """Read a file.

    Args:
        path: the file.
        read: reads it; any exception means that the file is not what it should be.
        expected: what the file should hold, for the message.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        return read(path)
    except Exception as error:
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise UserError(f"cannot read {path}, expected {expected} ({reason})") from error


def class_numbers(values: np.ndarray, classes: int) -> Tensor:
    """Return labels as int64 [N].

    Raises:
        ValueError: if they are no whole numbers below the number of classes.
    """
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"labels must be whole numbers [N], found {values.dtype} {list(values.shape)}")
    wrong = (values < 0) | (values >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"labels must be numbers from 0 to {classes - 1}, found {values[row]} in row {row}")
    return torch.from_numpy(values.astype(np.int64))


def cut(joined: np.ndarray, offsets: np.ndarray, count: int, what: str) -> list[np.ndarray]:
    """Return the parts of an array that holds many, one after another.

    Args:
        joined: [T].
        offsets: where each part begins and the last one ends, [count + 1], from 0 to T.
        count: number of parts.
        what: values of the array, for the message.

    Raises:
        ValueError: if these do not fit together.
    """
    if joined.ndim != 1 or offsets.ndim != 1 or offsets.dtype.kind not in "iu":
        raise ValueError(f"offsets must be whole numbers [N + 1], found {offsets.dtype} {list(offsets.shape)}")
    places = offsets.tolist()
    if len(places) != count + 1 or places[-1] != len(joined):
        raise ValueError(f"{count} labels, {len(places)} offsets and {len(joined)} {what} do not fit together")
    if places[0] != 0 or any(start >= stop for start, stop in itertools.pairwise(places)):
        raise ValueError("offsets must rise from 0")
    return [joined[start:stop] for start, stop in itertools.pairwise(places)]


def decode_images(encoded: Sequence[bytes | Path], size: int) -> Tensor:
    """Decode images with as many threads as there are cores; the decoder releases Python's lock.

    Args:
        encoded: contents of image files, or paths to them.
        size: side of the results; an image of another shape is scaled and its middle square cut out.

    Returns:
        uint8 [N, 3, size, size].

    Raises:
        UserError: if an image cannot be decoded.
    """
    from PIL import Image, ImageOps

    # Filled in place: a list of arrays, stacked at the end, would take the memory of all images twice.
    pixels = np.empty((len(encoded), 3, size, size), dtype=np.uint8)

    def decode(number: int) -> None:
        entry = encoded[number]
        try:
            with Image.open(BytesIO(entry) if isinstance(entry, bytes) else entry) as image:
                rgb = image.convert("RGB")
            if rgb.size != (size, size):
                rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
        except Exception as error:  # the decoders of the formats raise whatever they like
            where = "an image" if isinstance(entry, bytes) else f"the image {entry}"
            raise UserError(f"cannot decode {where} ({printable(' '.join(str(error).split()))})") from error
        pixels[number] = np.asarray(rgb).transpose(2, 0, 1)

    with ThreadPoolExecutor(cpu_count()) as pool:
        for _ in pool.map(decode, range(len(encoded))):
            pass
    return torch.from_numpy(pixels)
