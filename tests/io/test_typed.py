"""Dataclasses are read from JSON by the types of their fields, and a complaint names file and field."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from acckv.errors import InputError
from acckv.io.typed import Count, Share, from_json


@dataclass(frozen=True)
class Inner:
    share: Share
    pair: tuple[int, str] | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    file: Path
    counts: list[Count] = field(default_factory=list)
    texts: tuple[str, ...] = ()
    by_name: dict[str, Inner] = field(default_factory=dict)
    flag: bool = False
    rest: Any = None


WHOLE = {
    "name": "x",
    "kind": "b",
    "file": "a/b.mp4",
    "counts": [0, 3],
    "texts": ["u", "v"],
    "by_name": {"one": {"share": 1, "pair": [2, "t"]}, "two": {"share": 0.5, "unknown": 1}},
    "flag": True,
    "rest": [{"any": None}],
}


def test_every_kind_of_field_is_read() -> None:
    by_name = {"one": Inner(1, (2, "t")), "two": Inner(0.5)}
    expected = Outer("x", "b", Path("a/b.mp4"), [0, 3], ("u", "v"), by_name, True, [{"any": None}])
    assert from_json(Outer, WHOLE, "f.json") == expected
    assert from_json(Outer, {"name": "x", "kind": "a", "file": ""}, "f.json") == Outer("x", "a", Path())
    assert from_json(list[Inner], [{"share": 0}], "f.json") == [Inner(0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name: 3 is not a text"),
        ({"kind": "c"}, "kind: 'c' is neither 'a' nor 'b'"),
        ({"file": None}, "file: None is not a path"),
        ({"counts": [1, -1]}, r"counts\[1\]: -1 is not a number from 0 to inf"),
        ({"counts": [True]}, r"counts\[0\]: True is not a whole number"),
        ({"counts": {}}, "counts: expected a list"),
        ({"texts": ["u", None]}, r"texts\[1\]: None is not a text"),
        ({"by_name": {"one": {}}}, r"by_name\.one\.share: missing"),
        ({"by_name": {"one": {"share": float("nan")}}}, r"by_name\.one\.share: nan is not a number from 0 to 1"),
        ({"by_name": {"one": {"share": "1"}}}, r"by_name\.one\.share: '1' is not a number"),
        ({"by_name": {"one": {"share": 1, "pair": [2]}}}, r"by_name\.one\.pair: expected 2 values, got 1"),
        ({"by_name": []}, "by_name: expected an object"),
        ({"flag": 1}, "flag: 1 is not true or false"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^f\.json: line 2\.{message}"):
        from_json(Outer, {**WHOLE, **change}, "f.json", "line 2")
    with pytest.raises(InputError, match=r"^f\.json: expected an object"):
        from_json(Outer, [], "f.json")
