"""Answers outside a benchmark's own evaluation, such as after a calibration on it, are scored by their protocol."""

from __future__ import annotations

from pathlib import Path

import pytest

from acckv.benchmarks.judging import DESCRIPTIONS, SINGLE, Judge
from acckv.data.records import Protocol, Record


@pytest.mark.parametrize(
    ("protocol", "right", "said", "official", "robust", "parsed", "group"),
    [
        ("word", "left", "It is left", 0.0, 1.0, True, SINGLE),
        ("choice", "B", "B", 1.0, 1.0, True, SINGLE),
        ("choice", "B", "The answer is B", 0.0, 1.0, True, SINGLE),
        ("choice", "B", "none of them", 0.0, 0.0, False, SINGLE),
        ("yes_no", "no", "Well, no", 0.0, 1.0, True, SINGLE),
        ("text", "a red ring", "a red ring", 1.0, 1.0, True, DESCRIPTIONS),
        ("description", "red ring", "red square", None, 0.5, True, DESCRIPTIONS),
    ],
)
def test_an_answer_is_scored_by_its_protocol(
    protocol: Protocol, right: str, said: str, official: float | None, robust: float, parsed: bool, group: str
) -> None:
    options = ("cat", "dog") if protocol == "choice" else None
    record = Record("1", Path("a.mp4"), None, "?", options, right, ("kind",), protocol)
    judge = Judge(None, {"left", "right"}, "robust")
    found = judge(record, said)
    assert (found.official, found.score, found.parsed) == (official, robust, parsed)
    assert judge.groups(record) == (group, "kind")
