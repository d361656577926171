"""Parameters of tests in which one axis need not meet every combination of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any


def by_turns(turns: Sequence[Any], *axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every combination of the axes, each after one of `turns` (values or tuples); neighbours on any axis get another.

    So each of two turns meets each value of each axis, where there are two axes of two values or more. Rows with the
    same turn stand together, since it is often what a fixture is made from:

    >>> by_turns(["sdpa", "eager"], ["greedy", "beams"], [0.5, 0.1])
    [('sdpa', 'greedy', 0.5), ('sdpa', 'beams', 0.1), ('eager', 'greedy', 0.1), ('eager', 'beams', 0.5)]
    """
    rows: list[list[tuple[Any, ...]]] = [[] for _ in turns]
    for combination in product(*(enumerate(axis) for axis in axes)):
        place = sum(place for place, _ in combination) % len(turns)
        turn = turns[place] if isinstance(turns[place], tuple) else (turns[place],)
        rows[place].append((*turn, *(value for _, value in combination)))
    return [row for part in rows for row in part]
