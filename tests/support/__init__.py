"""Tools that tests share and that are no part of the package."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")


def not_none(value: Value | None) -> Value:
    """The value; a test fails where it is missing."""
    assert value is not None
    return value
