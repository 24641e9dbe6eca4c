"""The one exception type for mistakes that lie outside the program, and what its messages may hold."""

from __future__ import annotations

from typing import Any

LONGEST_SHOWN = 60  # characters of a value in a message


class UserError(Exception):
    """An error whose cause is what the user asked for: the command line prints it as one line and exits with code 2."""


class SharedError(UserError):
    """One that every process of a training raises together: only the first process needs to print it."""


class Stopped(Exception):
    """A training was asked to end (SIGTERM) and has written a checkpoint; the message says where."""


def shown(value: Any) -> str:
    """Return a value for a message: on one line and short, whatever it is."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except Exception:  # an integer of more digits than Python prints
        text = f"a value of type {type(value).__name__}"
    text = printable(text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


def printable(text: str) -> str:
    """Return text that a terminal prints as one line: anything else would move the cursor or break a table."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
