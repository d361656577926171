"""Values of JSON files; every complaint names the file, and the line where there is one value a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acckv.errors import InputError
from acckv.io.files import write_text


def read_json(file: str | Path, remedy: str = "is the file cut off?") -> Any:
    """The value of a JSON file.

    Args:
        remedy: what to do where it is no JSON.

    Raises:
        InputError: no such file, no UTF-8 text, or no whole JSON.
    """
    with _readable(file):
        text = Path(file).read_text(encoding="utf-8")
    return parse_json(text, file, remedy=remedy)


def write_json(file: str | Path, value: Any, **options: Any) -> None:
    """Write a value as JSON; the file is whole or not there.

    Args:
        options: of `json.dumps`.

    Raises:
        ValueError: a number that JSON cannot hold (nan or infinite).
    """
    write_text(file, json.dumps(value, allow_nan=False, **{"ensure_ascii": False, **options}) + "\n")


def read_json_lines(file: str | Path) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of each line of a file with one JSON value a line; blank lines are passed over.

    Raises:
        InputError: no such file, no UTF-8 text, or a line that is no JSON.
    """
    # Split at line feeds alone: a text may hold other line separators, such as U+2028.
    with _readable(file), Path(file).open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, parse_json(line, file, f"line {number}")


def parse_json(text: str, source: str | Path, field: str | None = None, remedy: str = "is the file cut off?") -> Any:
    """The value of a JSON text that was found in `field` of `source`.

    Raises:
        InputError: no whole JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON ({error}); {remedy}", source=source, field=field) from error


@contextmanager
def _readable(file: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError("no such file", source=file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read as UTF-8 text ({error})", source=file) from error
