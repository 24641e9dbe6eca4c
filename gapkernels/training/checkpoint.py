"""Files that are whole or absent, and checkpoints that bring a run back bit by bit."""

from __future__ import annotations

import io
import os
import random
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from gapkernels.errors import UserError, printable, shown
from gapkernels.reading import Count, Quantity, Strict, check_inflation
from gapkernels.training.locks import open_locked


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` only once it is complete and on the disk.

    A crash at any moment leaves the old file, or the new one, never a part of it.
    """
    # In the same folder, as a rename is atomic only within one file system. A fixed name: what a crash leaves behind
    # is overwritten by the next attempt; two processes that write one file take turns.
    temporary = path.with_name(f".{path.name}.tmp")
    file = open_locked(temporary)
    try:
        file.truncate()
        yield file
        file.flush()
        os.fsync(file.fileno())
        if os.name != "posix":
            file.close()  # an open file cannot be renamed there
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        file.close()
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


def keep_newest(path: Path, step: int, count: int) -> None:
    """Keep the checkpoint just written under the name of its step too, with the newest `count` of that kind.

    Args:
        path: of the checkpoint; the others are `checkpoint-<step>.pt` beside it.
        step: at which it was written.
        count: how many to keep, this one included; of one alone no second name is made.
    """
    kept = path.with_name(f"{path.stem}-{step:09d}{path.suffix}")
    if count > 1:
        kept.unlink(missing_ok=True)
        try:
            os.link(path, kept)  # no second copy of the bytes
        except OSError:  # a file system without links
            shutil.copyfile(path, kept)
    older = sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))
    for file in older if count == 1 else older[:-count]:
        file.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory, without running any code in it.

    Raises:
        UserError: if the file is missing or damaged, or holds something else than named values.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        # torch.load does not compare checksums: a flipped bit in a weight would pass unnoticed.
        with zipfile.ZipFile(path) as archive:
            check_inflation(sum(entry.file_size for entry in archive.infolist()), path.stat().st_size)
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a value of type {type(state).__name__}")
    except Exception as error:
        reason = printable(str(error).partition("\n")[0]) or type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason})") from error
    return state


def pack_checkpoint(state: dict[str, Any]) -> bytes:
    """Return a checkpoint as bytes, to be sent to another process."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def unpack_checkpoint(content: bytes) -> dict[str, Any]:
    """Return what `pack_checkpoint` was given, in CPU memory."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a model, all of them or none.

    Raises:
        ValueError: if names, shapes or dtypes do not fit, or a value is not finite.
    """
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in own or name not in weights:
            raise ValueError(f"the weights {'lack' if name in own else 'hold'} {shown(name)}")
    for name, expected in own.items():
        require_like(f"weights {name}", weights[name], expected)
    model.load_state_dict(dict(weights))


def require_like(name: str, values: object, expected: Tensor) -> None:
    """Raise ValueError unless a value is a finite tensor of the shape and dtype of another."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} must be a tensor, found {type(values).__name__}")
    if values.layout != torch.strided or (values.shape, values.dtype) != (expected.shape, expected.dtype):
        found, right = (f"{t.dtype} {list(t.shape)}" for t in (values, expected))
        raise ValueError(f"{name} must be {right}, found {found}")
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite")


class Checkpoint(Strict):
    """What a run keeps to go on from: `Trainer` writes it and reads it back."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    config: dict[str, Any]
    method: str
    seed: Count
    data: str
    step: Count
    seconds: Annotated[Quantity, Field(ge=0)]
    log_size: Count
    log_digest: str
    model: dict[str, Tensor]
    log_logit_scale: Tensor
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    random: dict[str, Any]


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


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set every random number generator to what `random_state` returned.

    Raises:
        ValueError: if a state is none that its generator can take.
    """
    try:
        random.setstate(state["python"])
        numpy_state = state["numpy"]
        inner = {**numpy_state["state"], "key": numpy_state["state"]["key"].numpy()}
        np.random.set_state({**numpy_state, "state": inner})  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if device.type != "cpu" and "device" in state:
            torch.get_device_module(device).set_rng_state(state["device"])
    except Exception as error:  # each generator has errors of its own
        raise ValueError(
            f"the state of a random number generator is damaged, {type(error).__name__}: {error}"
        ) from error


def seed_torch(*numbers: int) -> None:
    """Seed torch's generators with several numbers at once, each of which matters."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


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
