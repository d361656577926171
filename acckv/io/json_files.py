"""Values of JSON files; every complaint names the file, and the line where there is one value a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acckv.errors import InputError


def read_json(file: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        InputError: no such file, no UTF-8 text, or no whole JSON.
    """
    with _readable(file):
        text = Path(file).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno} "
        raise InputError(f"not valid JSON {where}({error.msg}); is the file cut off?", source=file) from error


def read_json_lines(file: str | Path) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of each line of a file with one JSON value a line; blank lines are passed over.

    Raises:
        InputError: no such file, no UTF-8 text, or a line that is no JSON.
    """
    # Split at line feeds alone: a text may hold other line separators, such as U+2028.
    with _readable(file), Path(file).open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                message = f"not valid JSON ({error.msg}); is the file cut off?"
                raise InputError(message, source=file, field=f"line {number}") from error
            yield number, value


@contextmanager
def _readable(file: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError("no such file", source=file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read as UTF-8 text ({error})", source=file) from error
