"""Answers outside a benchmark's own evaluation, such as after a calibration on it, are scored by their protocol."""

from __future__ import annotations

from pathlib import Path

import pytest

from acckv.benchmarks.answers import DESCRIPTIONS, SINGLE, question_groups, score_answer
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
    found = score_answer(record, said, {"left", "right"})
    assert (found.official, found.score, found.parsed) == (official, robust, parsed)
    assert question_groups(record) == (group, "kind")
