"""Questions lie inside or outside what a calibration asked, as a slow reference and known answers have it."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from acckv import InputError
from acckv.data.asked_questions import MOST, AskedQuestions, Coverage
from acckv.data.records import Record

SOUNDS, SHAPES = ("beep", "knock", "siren", "chirp", "hiss"), ("ring", "bar", "cross", "square", "circle")
PITCH, AFTER = (
    [f"What pitch was the {sound}?" for sound in SOUNDS],
    [f"Which shape came after the {s}?" for s in SHAPES],
)
ASKED = AskedQuestions({"pitch": PITCH, "after": AFTER, "all": ["Describe the clip."]})


def runs(text: str) -> set[str]:
    return {f"<{text.lower()}>"[at : at + n] for n in (2, 3, 4) for at in range(len(text) + 3 - n)}


def slow_distance(one: str, other: str, wordings: list[str]) -> float:
    """1 - cosine, every weight counted anew."""
    held = Counter(run for text in wordings for run in runs(text))

    def square(some: set[str]) -> float:
        total = 0.0
        for run in some:
            total += ((held[run] + 1) / len(wordings)) ** 0.5 if run in held else (1 / len(wordings)) ** 0.5
        return total

    return 1 - square(runs(one) & runs(other)) / math.sqrt(square(runs(one)) * square(runs(other)))


def test_questions_of_the_calibration_lie_inside_and_others_outside() -> None:
    inside = [*PITCH, *AFTER, "Describe the clip.", "What pitch was the bell?", "WHAT  pitch was the beep?"]
    outside = [
        *("What colour was the ring?", "Which sound came after the beep?", "List the sounds in order."),
        *("Describe the sounds.", "Who is the man with the hat?", "?", ""),
    ]
    assert ASKED.outside(inside) == [False] * len(inside)
    assert ASKED.outside(outside) == [True] * len(outside)


def test_distances_and_reach_are_those_of_a_slow_reference() -> None:
    wordings = [*PITCH, *AFTER, "Describe the clip."]
    texts = [*wordings, "What colour was the ring?", "zzz", *(f"question {number}" for number in range(40))]
    found = ASKED._index.distances(texts)
    expected = torch.tensor([[slow_distance(one, other, wordings) for other in wordings] for one in texts])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    farthest = [max(min(slow_distance(a, b, wordings) for b in own if b != a) for a in own) for own in (PITCH, AFTER)]
    reach = torch.tensor([farthest[0]] * 5 + [farthest[1]] * 5 + [0.0])  # of so few the largest is all that 99 % can be
    torch.testing.assert_close(ASKED._reach, reach, atol=1e-5, rtol=0)


def test_about_one_new_question_of_a_hundred_lies_outside() -> None:
    draw, words = random.Random(0), [f"{a}{b}{c}" for a in "bdkmt" for b in "aeiou" for c in "lnrs"]
    calibrated = [" ".join(draw.sample(words, 6)) for _ in range(600)]
    new = [" ".join(draw.sample(words, 6)) for _ in range(2000)]
    assert 0.002 <= sum(AskedQuestions({"all": calibrated}).outside(new)) / len(new) <= 0.03


def test_a_part_of_many_wordings_is_kept_of_every_kind() -> None:
    def record(number: int) -> Record:
        kind = "rare" if number < 3 else "common"
        return Record(str(number), Path("clip"), None, f"Is it {number % 9000}?", None, "", (kind,), "word")

    records = [record(number) for number in range(12_000)]
    kept = AskedQuestions.of(records, lambda record: record.groups[-1])
    assert {kind: len(own) for kind, own in kept.wordings.items()} == {"common": MOST // 2, "rare": 3}
    assert len({*kept.wordings["common"]}) == MOST // 2 and kept == AskedQuestions.of(records, lambda r: r.groups[-1])
    assert kept.coverage(["Is it 10000?", "Is it 8888?"]).outside == 0


def test_a_warning_counts_every_question_and_names_two() -> None:
    colours = ["What colour was the ring?", "What colour was the bar?", "What colour was the cross?"]
    found = ASKED.coverage([*PITCH, *colours, colours[0]])
    assert found == Coverage(9, 4, colours[:2])
    assert found.warning == (
        "warning: 4 of 9 questions lie outside what the export was calibrated for, such as 'What colour was the ring?' "
        "and 'What colour was the bar?': what they ask about may have been evicted; calibrate on such questions, or "
        "for whatever can be asked (calibrate_for: general)"
    )
    assert Coverage(20, 2, colours[:2]).warning is None and Coverage(20, 3, colours[:2]).warning is not None


def test_nothing_asked_is_nothing_outside() -> None:
    assert AskedQuestions({"pitch": PITCH, "none": []}).outside([PITCH[0], "Why?"]) == [False, True]
    assert ASKED.outside([]) == [] and ASKED.coverage([]) == Coverage(0, 0, []) and ASKED.coverage([]).warning is None


def test_no_wording_at_all_is_refused() -> None:
    empty: list[dict[str, list[str]]] = [{}, {"pitch": []}]
    for wordings in empty:
        with pytest.raises(InputError, match="wordings: hold no question"):
            AskedQuestions(wordings)
