"""Objects of files of questions, whose fields are checked as they are taken; complaints name file, record and field."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from acckv.errors import InputError
from acckv.io.json_files import read_json, read_json_lines


def read_objects(file: Path) -> Iterator[Fields]:
    """The objects of a JSON file that holds a list of them, or of a `.jsonl` file with one a line.

    Raises:
        InputError: as `read_json`, or something that is no object, with its number.
    """
    values: Any
    if file.suffix == ".jsonl":
        values = ((f"line {number}", value) for number, value in read_json_lines(file))
    else:
        values = read_json(file)
        if not isinstance(values, list):
            raise InputError(f"expected a list of records, got {type(values).__name__}", source=file)
        values = ((f"record {index}", value) for index, value in enumerate(values))
    for name, value in values:
        if not isinstance(value, dict):
            raise InputError(f"expected an object, got {type(value).__name__}", source=file, field=name)
        yield Fields(file, name, value)


class Fields:
    """An object whose fields are checked as they are taken.

    Args:
        file: it was read from.
        name: of the object in the file, such as "line 3", for messages.
        values: field -> value.
    """

    def __init__(self, file: Path, name: str, values: dict[str, Any]) -> None:
        self.file, self.name, self.values = file, name, values

    def error(self, field: str, message: str) -> InputError:
        """A complaint about a field of this record."""
        return InputError(message, source=self.file, field=f"{self.name}, {field}")

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

    def strings(self, field: str, length: int | None = None, default: Sequence[str] | None = None) -> list[str]:
        """A list of texts."""
        return self._list_of_texts(field, self._value(field, default), length, "a list of texts")

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
