"""The one error that a user of acckv is meant to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Made = TypeVar("Made")


class InputError(ValueError):
    """Bad input of the user: a file, a field of a file, or an option.

    Args:
        message: what was wrong and what to do about it, in one line.
        source: the file (or hub id) it was found in.
        field: the field or option in that file.
    """

    def __init__(self, message: str, *, source: str | Path | None = None, field: str | None = None) -> None:
        where = ": ".join(str(part) for part in (source, field) if part is not None)
        super().__init__(f"{where}: {message}" if where else message)
        self.source = None if source is None else str(source)
        self.field = field


def or_error(make: Callable[..., Made], *args: object) -> Made | InputError:
    """The result of a function, or its `InputError` as a value: so it crosses from a data loader's process as it is."""
    try:
        return make(*args)
    except InputError as error:
        return error
