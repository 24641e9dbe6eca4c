"""Opening .npz files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib.npyio import NpzFile

from gapkernels.reading import check_inflation


def open_npz(path: Path) -> NpzFile:
    """Open a .npz file; arrays of Python objects, which could run any program, are refused.

    Raises:
        ValueError: if it is no archive (NumPy would take it for a pickle and tell the user how to load that), or states
            sizes that it cannot have.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no .npz archive")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        check_inflation(sum(entry.file_size for entry in entries), path.stat().st_size)
        for entry in entries:
            with archive.open(entry) as member:
                _check_size(member, entry)
    return np.load(path, allow_pickle=False)


def _check_size(member: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Raise where an array's header asks for other memory than the entry holds: NumPy would allocate it."""
    if not entry.filename.endswith(".npy"):
        raise ValueError(f"{entry.filename!r} in it is no array")
    version = np.lib.format.read_magic(member)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(member)
    if dtype.hasobject:
        return  # np.load refuses it
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size != entry.file_size - member.tell():
        raise ValueError(f"{entry.filename!r} in it has the shape {list(shape)}, but not as many values")
