"""The table of warnings counts what it says, and every type of question that was held out is warned of."""

from __future__ import annotations

import json
from pathlib import Path

from acckv.data.asked_questions import Coverage
from benchmarks.held_out_types import SUBJECTS
from benchmarks.question_coverage import embedded_model, music_avqa, pretrained_kinds, warned
from lightning_modules.evaluation.datamodule import EvaluationData


def test_every_type_that_was_held_out_is_warned_of(cache: Path) -> None:
    test = EvaluationData(clips=2, split="validation", cache_dir=str(cache))
    found = embedded_model(6, test)
    held_out = {(name, kind): found[name][kind] for name in SUBJECTS for kind in SUBJECTS[name] if kind in found[name]}
    assert len(held_out) > 10 and all(one.outside == one.asked and not own for one, own in held_out.values())
    assert [own for _, own in found["nothing"].values()] == [True] * len(found["nothing"])


def test_kinds_of_clips_that_were_not_calibrated_on_are_warned_of() -> None:
    facts = pretrained_kinds(3)["facts"]
    outside = {kind for kind, (one, _) in facts.items() if one.warning}
    assert outside == {"other", "quotes", "joined", "counted", "summary"}
    assert {kind for kind, (_, own) in facts.items() if own} == {"facts", "facts, other names"}


def test_question_files_are_compared_without_a_video(tmp_path: Path) -> None:
    types = {"Counting": "How many {}s are there?", "Location": "Where in the picture does the {} stand?"}
    rows = [
        {
            "video_id": "1",
            "question_id": number,
            "type": f'["Visual", "{name}"]',
            "question_content": words.format(thing),
            "templ_values": "[]",
            "question_deleted": 0,
            "anser": "two",
        }
        for name, words in types.items()
        for number, thing in enumerate(("flute", "piano", "drum", "banjo"))
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    tables = music_avqa(tmp_path / "questions.json", tmp_path / "questions.json")
    assert len(tables) == 2
    for found in tables.values():
        assert warned(found) == (
            "warned of 2 of 2 kinds that were not calibrated on and of 0 of 2 kinds that were calibrated on"
        )


def test_warnings_are_counted() -> None:
    many, few = Coverage(10, 5, ["why"]), Coverage(10, 1, ["why"])
    found = {"a": {"x": (few, True), "y": (many, False)}, "b": {"x": (few, False), "y": (many, True)}}
    line = "warned of 1 of 2 kinds that were not calibrated on and of 1 of 2 kinds that were calibrated on"
    assert warned(found) == line
