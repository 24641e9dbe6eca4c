"""Opening .npz files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile


def open_npz(path: Path) -> NpzFile:
    """Open a .npz file; arrays of Python objects, which could run any program, are refused.

    Raises:
        ValueError: if it is no archive. NumPy would take it for a pickle and tell the user how to load that.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no .npz archive")
    return np.load(path, allow_pickle=False)
