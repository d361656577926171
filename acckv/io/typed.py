"""JSON values into dataclasses, checked by the types of their fields; a complaint names file and field.

A field with a default may be missing, and unknown names are passed over, so that a format can grow.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from acckv.errors import InputError
from acckv.io.json_files import read_json, write_json

Made = TypeVar("Made")
PLAIN: dict[type, tuple[Any, str]] = {
    float: (int | float, "a number"),
    int: (int, "a whole number"),
    str: (str, "a text"),
    bool: (bool, "true or false"),
    Path: (str, "a path"),
}
"""Type of a field -> type in JSON, and its name in messages."""


class Within(NamedTuple):
    """Bounds of a number, for `Annotated`."""

    low: float
    high: float = float("inf")


Share = Annotated[float, Within(0, 1)]
Amount = Annotated[float, Within(0)]
Count = Annotated[int, Within(0)]


def from_json(kind: type[Made], value: Any, source: str | Path, field: str = "") -> Made:
    """A value of JSON as a `kind`: a dataclass, or what its fields are made of.

    Args:
        kind: dataclasses, lists, tuples, dicts with text keys, unions, literals, paths, and numbers within bounds.
        source: the file; field: of the value; both for messages.

    Raises:
        InputError: something is missing or ill-valued.
    """
    return _read(kind, value, source, field)


def read_versioned(kind: type[Made], file: str | Path, version: int, remedy: str = "") -> Made:
    """A JSON file of a dataclass's fields beside its `format`.

    Args:
        remedy: what to do with a file of another format.

    Raises:
        InputError: no such file, no JSON, another format, or a field that is missing or ill-valued.
    """
    values = read_json(file)
    found = values.get("format") if isinstance(values, dict) else None
    if found != version:
        message = f"unknown format {found!r}; this version reads format {version}{remedy and f'; {remedy}'}"
        raise InputError(message, source=file, field="format")
    return from_json(kind, values, file)


def write_versioned(file: str | Path, value: Any, version: int, **options: Any) -> None:
    """Write a dataclass as `read_versioned` reads it.

    Args:
        options: of `json.dumps`.
    """
    write_json(file, {"format": version, **asdict(value)}, **options)


def _read(kind: Any, value: Any, source: str | Path, field: str) -> Any:
    def refuse(message: str) -> InputError:
        return InputError(message, source=source, field=field or None)

    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind) or origin is dict:
        if not isinstance(value, Mapping):
            raise refuse("expected an object")
        if origin is dict:
            return {name: _read(inner[1], each, source, f"{field}.{name}") for name, each in value.items()}
        return _dataclass(kind, value, source, f"{field}." if field else "")
    if origin is Annotated:
        number, bounds = _read(inner[0], value, source, field), inner[1]
        if not bounds.low <= number <= bounds.high:
            raise refuse(f"{value!r} is not a number from {bounds.low:g} to {bounds.high:g}")
        return number
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _read(next(each for each in inner if each is not type(None)), value, source, field)
    if origin is Literal:
        if value not in inner:
            raise refuse(f"{value!r} is neither {' nor '.join(map(repr, inner))}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise refuse("expected a list")
        if origin is tuple and inner[-1] is not Ellipsis and len(value) != len(inner):
            raise refuse(f"expected {len(inner)} values, got {len(value)}")
        each = [inner[0]] * len(value) if origin is list or inner[-1] is Ellipsis else inner
        return origin(
            _read(one, part, source, f"{field}[{index}]")
            for index, (one, part) in enumerate(zip(each, value, strict=True))
        )
    accepted, expected = PLAIN[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise refuse(f"{value!r} is not {expected}")
    return Path(value) if kind is Path else value


def _dataclass(kind: Any, values: Mapping[str, Any], source: str | Path, prefix: str) -> Any:
    made = {}
    for each in fields(kind):
        if each.name in values:
            made[each.name] = _read(_hints(kind)[each.name], values[each.name], source, prefix + each.name)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise InputError("missing", source=source, field=prefix + each.name)
    return kind(**made)


_hints = cache(partial(get_type_hints, include_extras=True))
