"""The border: what a file holds is validated once, where it is read, and a mistake is one line that names its place.

A reader gives the typed model of what it expects; whoever works with the result need not ask again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gapkernels.errors import LONGEST_SHOWN, UserError, printable, shown

Content = TypeVar("Content")

# A number that can be averaged, squared and drawn: no file of ours holds a larger one.
Quantity = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]

# A file that unpacks to more than this many times its size, and to more than a harmless size, is no data set: real
# pixels and features are below 20.
_LARGEST_INFLATION, _HARMLESS_BYTES = 100, 2**28


class Strict(BaseModel):
    """What is read back: no conversions, no NaN; keys that nobody asks for are left alone."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from error


def read_json(path: Path, kind: type[Content]) -> Content:
    """Read a JSON file as a typed model.

    Raises:
        UserError: if it cannot be read, is no JSON, or does not fit the model; names file and field.
    """
    return parse_json(read_bytes(path), kind, path)


def parse_json(content: bytes, kind: type[Content], path: Path, place: str = "") -> Content:
    """Turn JSON into a typed model.

    Args:
        content: the JSON.
        kind: the model, or any type that pydantic knows.
        path: file it is from.
        place: where in it, `line 3` for instance.

    Raises:
        UserError: as `read_json`.
    """
    try:
        return _adapter(cast(Any, kind)).validate_json(content)
    except ValidationError as error:
        raise UserError(_complain(error, path, place)) from error


def check(value: Any, kind: type[Content], path: Path) -> Content:
    """Validate what a file of another format held.

    Raises:
        UserError: as `read_json`.
    """
    try:
        return _adapter(cast(Any, kind)).validate_python(value)
    except ValidationError as error:
        raise UserError(_complain(error, path, "")) from error


def message(detail: Mapping[str, Any]) -> str:
    """Return what one of pydantic's errors says, and what was given where that is a plain value."""
    text = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = "" if isinstance(detail["input"], dict | list | tuple | BaseModel) else f", got {shown(detail['input'])}"
    return f"{text[:1].lower()}{text[1:]}{given}"


def check_inflation(stated: int, stored: int) -> None:
    """Refuse, before anything is unpacked, a file that states to be far larger than it could be.

    Args:
        stated: size when unpacked, in bytes, as the file states it.
        stored: size on the disk.

    Raises:
        ValueError: if the file unpacks to an unbelievable size, or to more than this computer's memory.
    """
    if stated > max(_HARMLESS_BYTES, _LARGEST_INFLATION * stored):
        raise ValueError(f"{stored} bytes that unpack to {stated} are no data, more than {_LARGEST_INFLATION} times")
    memory = _physical_memory()
    if memory is not None and stated > memory:
        raise ValueError(f"it unpacks to {stated} bytes, this computer has {memory} bytes of memory")


def _physical_memory() -> int | None:
    names = getattr(os, "sysconf_names", {})  # Windows has none
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _complain(error: ValidationError, path: Path, place: str) -> str:
    details: Sequence[Any] = error.errors(include_url=False)
    first = details[0]
    if first["type"] == "json_invalid":
        reason = " ".join(str(first["msg"]).split())
        return f"{path} is damaged ({place}{': ' if place else ''}{reason})"
    field = ".".join(printable(str(part))[:LONGEST_SHOWN] for part in first["loc"])
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    where = ", ".join(part for part in (str(path), place) if part)
    if first["type"] == "missing":
        return f"{where}: {field} is missing{more}"
    return f"{where}: {field}{': ' if field else ''}{message(first)}{more}"
