"""Files that are whole or absent, and checkpoints that bring a run back bit by bit."""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gapkernels.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` only once it is complete and on the disk.

    A crash at any moment leaves the old file, or the new one, never a part of it.
    """
    # In the same folder, as a rename is atomic only within one file system. A fixed name: what a crash leaves behind
    # is overwritten by the next attempt.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as file:
        file.write(text.encode())


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: where to.
        state: tensors, numbers, strings, lists, tuples and dictionaries of them.
    """
    with atomic_write(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory, without running any code in it.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        # torch.load does not compare checksums: a flipped bit in a weight would pass unnoticed.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason})") from error


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every random number generator a run draws from, in types a checkpoint can hold."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (the global generator, which libraries draw from)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            **numpy_state,
            "state": {**numpy_state["state"], "key": torch.from_numpy(numpy_state["state"]["key"])},
        },
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set every random number generator to what `random_state` returned."""
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    inner = {**numpy_state["state"], "key": numpy_state["state"]["key"].numpy()}
    np.random.set_state({**numpy_state, "state": inner})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; only POSIX systems can open a folder for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
