"""Read JSON files of questions; every complaint names file, record and field."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acckv.errors import InputError


def read_json(file: Path) -> Any:
    """The value of a JSON file.

    Raises:
        InputError: no such file, no UTF-8 text, or no whole JSON.
    """
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise InputError(
            f"not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); is the file cut off?",
            source=file,
        ) from error


def read_rows(file: Path) -> Iterator[Row]:
    """The records of a JSON file that holds a list of objects, or of a `.jsonl` file with one object a line.

    Raises:
        InputError: as `read_json`, or something that is no object, with its place.
    """
    values = _lines(file) if file.suffix == ".jsonl" else read_json(file)
    if not isinstance(values, list):
        raise InputError(f"expected a list of records, got {type(values).__name__}", source=file)
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise InputError(f"expected an object, got {type(value).__name__}", source=file, field=f"record {index}")
        yield Row(file, f"record {index}", value)


class Row:
    """One record whose fields are checked as they are taken.

    Args:
        file: it was read from.
        place: of the record in the file, for messages.
        values: field -> value.
    """

    def __init__(self, file: Path, place: str, values: dict[str, Any]) -> None:
        self.file, self.place, self.values = file, place, values

    def error(self, field: str, message: str) -> InputError:
        """A complaint about a field of this record."""
        return InputError(message, source=self.file, field=f"{self.place}, {field}")

    def string(self, field: str, default: str | None = None) -> str:
        """A text that is not blank."""
        value = self._value(field, default)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"expected a text, got {value!r}")
        return value

    def integer(self, field: str, default: int | None = None) -> int:
        """A whole number."""
        value = self._value(field, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(field, f"expected a whole number, got {value!r}")
        return value

    def seconds(self, field: str) -> float | None:
        """A time of 0 s or more; None where the field is missing or null."""
        value = self.values.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise self.error(field, f"expected seconds, got {value!r}")
        return float(value)

    def strings(self, field: str, length: int | None = None) -> list[str]:
        """A list of texts."""
        return self._list_of_texts(field, self._value(field), length, "a list of texts")

    def string_list(self, field: str, length: int | None = None) -> list[str]:
        """A text that holds a list of texts, e.g. '["Audio", "Counting"]'."""
        value = self._value(field)
        try:
            parsed = ast.literal_eval(value) if isinstance(value, str) else None
        except (ValueError, SyntaxError):
            parsed = None
        if not isinstance(parsed, list):
            raise self.error(field, f"expected a text that holds a list of texts, got {value!r}")
        return self._list_of_texts(field, parsed, length, "a text that holds a list of texts")

    def choice(self, field: str, letters: str) -> str:
        """One of some letters, given as 'B', 'B.' or '(B)'."""
        value = self.string(field).strip().strip("().").upper()
        if len(value) != 1 or value not in letters:
            raise self.error(field, f"expected one of {', '.join(letters)}, got {self.values[field]!r}")
        return value

    def _list_of_texts(self, field: str, value: Any, length: int | None, expected: str) -> list[str]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
            raise self.error(field, f"expected {expected}, got {value!r}")
        if length is not None and len(value) != length:
            raise self.error(field, f"expected {length} entries, got {len(value)}")
        return list(value)

    def _value(self, field: str, default: Any = None) -> Any:
        if field in self.values:
            return self.values[field]
        if default is None:
            raise self.error(field, "missing")
        return default


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("no such file", source=file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read as UTF-8 text ({error})", source=file) from error


def _lines(file: Path) -> list[Any]:
    values = []
    # Not `splitlines`: a text may hold other line separators, such as U+2028.
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(
                f"not valid JSON ({error.msg}); is the file cut off?", source=file, field=f"line {number}"
            ) from error
    return values
