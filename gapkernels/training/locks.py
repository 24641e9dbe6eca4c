"""Locks between processes: files that one process at a time may hold, and that a killed process lets go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gapkernels.errors import UserError

_LOCK = ".lock"


def open_locked(path: Path, wait: bool = True) -> BinaryIO:
    """Open a file, made if need be, for reading and writing from its start, and hold it until it is closed.

    Args:
        path: the file.
        wait: until nobody else holds it.

    Raises:
        BlockingIOError: if someone else holds it and `wait` is False.
        OSError: if it cannot be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        file = os.fdopen(descriptor, "r+b")
        try:
            _lock(file, wait)
            # Whoever held it before may have renamed or deleted it: then this is no longer the file of that name.
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold a run folder: two processes that train into one would overwrite each other's files.

    Raises:
        UserError: if another process holds it; names that process.
    """
    path = folder / _LOCK
    try:
        file = open_locked(path, wait=False)
    except BlockingIOError as error:
        holder = path.read_bytes().decode(errors="replace").strip() or "unknown"
        raise UserError(
            f"another process trains into {folder} (process {holder}): wait for it, or choose another folder with --out"
        ) from error
    try:
        file.truncate()
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        yield
    finally:
        if os.name == "posix":  # elsewhere an open file cannot be deleted; it does no harm
            path.unlink(missing_ok=True)
        file.close()


def is_lock(path: Path) -> bool:
    """Tell whether a file is the lock of its folder."""
    return path.name == _LOCK


if os.name == "posix":
    import fcntl

    def _lock(file: BinaryIO, wait: bool) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

else:
    import msvcrt

    def _lock(file: BinaryIO, wait: bool) -> None:
        # A byte far behind the content, which others may then still read.
        file.seek(2**30)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError(str(error)) from error
        file.seek(0)
