"""What groups of settings are made of: they are immutable, and an unknown key is an error."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_truth_value(value: Any) -> Any:
    """Refuse `true` where a number belongs: Python, and pydantic with it, would take it for 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not a truth value")
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(_no_truth_value)]


class Section(BaseModel):
    """A group of settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
