"""Finding and reading the files of data sets, with messages that say what was expected where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from os import cpu_count
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gapkernels.errors import UserError

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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {path}, expected {expected} ({reason})") from error


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
        except OSError as error:
            where = "an image" if isinstance(entry, bytes) else f"the image {entry}"
            raise UserError(f"cannot decode {where} ({' '.join(str(error).split())})") from error
        pixels[number] = np.asarray(rgb).transpose(2, 0, 1)

    with ThreadPoolExecutor(cpu_count()) as pool:
        for _ in pool.map(decode, range(len(encoded))):
            pass
    return torch.from_numpy(pixels)
