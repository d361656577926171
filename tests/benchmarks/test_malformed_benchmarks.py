"""A malformed, cut off or doubled record of a benchmark is refused by file, place and field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acckv.benchmarks import load_benchmark
from acckv.errors import InputError
from tests.benchmarks.edits import AV_PART, COUNT, LINES, MME_TABLE, QA, SENSE, edit_json, edit_table

BROKEN_JSON: list[tuple[str, str, list[Any], dict[str, Any], str]] = [
    ("mvbench", COUNT, [0], {"answer": "4"}, "record 0, answer"),
    ("mvbench", COUNT, [0], {"candidates": ["1"]}, "record 0, candidates"),
    ("mvbench", COUNT, [0], {"candidates": "1, 2"}, "record 0, candidates"),
    ("mvbench", COUNT, [0], {"video": ...}, "record 0, video"),
    ("mvbench", "json/action_sequence.json", [0], {"start": "soon"}, "record 0, start"),
    ("mvbench", "json/action_prediction.json", [0], {"end": ...}, "record 0, end"),
    ("mvbench", "json/action_sequence.json", [0], {"end": 0.0}, "record 0, end"),
    ("worldsense", SENSE, [], {"aJxSquRe": []}, "video aJxSquRe"),
    ("worldsense", SENSE, ["aJxSquRe"], {"duration": ...}, "video aJxSquRe, duration"),
    ("worldsense", SENSE, ["aJxSquRe"], {"audio_class": "Music"}, "video aJxSquRe, audio_class"),
    ("worldsense", SENSE, ["aJxSquRe"], {"task1": None}, "video aJxSquRe, task1"),
    ("worldsense", SENSE, ["aJxSquRe", "task1"], {"answer": "D"}, "video aJxSquRe, task1, answer"),
    ("worldsense", SENSE, ["aJxSquRe", "task1"], {"question": " "}, "video aJxSquRe, task1, question"),
    ("daily_omni", QA, [1], {"Choice": ...}, "record 1, Choice"),
    ("daily_omni", QA, [1], {"Answer": "E"}, "record 1, Answer"),
    ("daily_omni", QA, [1], {"video_id": 7}, "record 1, video_id"),
    ("daily_omni", QA, [1], {"video_duration": ""}, "record 1, video_duration"),
    ("omnibench", LINES, [2], {"answer": "Singing."}, "line 3, answer"),
    ("omnibench", LINES, [2], {"index": "2"}, "line 3, index"),
    ("omnibench", LINES, [2], {"audio_path": ...}, "line 3, audio_path"),
    ("omnibench", LINES, [2], {"options": ["a"] * 11}, "line 3, options"),
    ("music_avqa", "avqa-test.json", [1], {"anser": "oboe"}, "record 1, anser"),
    ("avqa", "val_qa.json", [1], {"answer": 4}, "record 1, answer"),
    ("avqa", "val_qa.json", [1], {"answer": "B"}, "record 1, answer"),
    ("avqa", "val_qa.json", [1], {"multi_choice": ["a", "b", "c", "d", "e"]}, "record 1, multi_choice"),
    ("avqa", "val_qa.json", [1], {"multi_choice": [1, 2, 3, 4]}, "record 1, multi_choice"),
    ("avqa", "val_qa.json", [1], {"question_type": "How"}, "record 1, question_type"),
    ("avqa", "val_qa.json", [1], {"video_name": ...}, "record 1, video_name"),
    ("avhbench", "QA.json", [1], {"task": "AV Hallucination"}, "record 1, task"),
    ("avhbench", "QA.json", [1], {"label": "Maybe"}, "record 1, label"),
    ("avhbench", "QA.json", [1], {"text": ""}, "record 1, text"),
    ("custom", "questions.jsonl", [1], {"video": ...}, "line 2, video"),
    ("custom", "questions.jsonl", [1], {"anser": "Yes"}, "line 2, anser"),
    ("custom", "questions.jsonl", [1], {"options": ["one"]}, "line 2, options"),
    ("custom", "questions.jsonl", [1], {"options": ["a", "b"], "answer": "C"}, "line 2, answer"),
    ("custom", "questions.jsonl", [1], {"protocol": "choice"}, "line 2, options"),
    ("custom", "questions.jsonl", [1], {"protocol": "letters"}, "line 2, protocol"),
    ("custom", "questions.jsonl", [1], {"protocol": "yes_no", "answer": "left"}, "line 2, answer"),
    ("custom", "questions.jsonl", [1], {"references": ["yes"]}, "line 2, references"),
    ("custom", "questions.jsonl", [1], {"start": 2, "end": 1}, "line 2, end"),
    ("custom", "questions.jsonl", [1], {"start": "2"}, "line 2, start"),
    ("custom", "questions.jsonl", [1], {"id": "0"}, "line 2, id"),
]


@pytest.mark.parametrize(("name", "file", "place", "change", "field"), BROKEN_JSON)
def test_a_malformed_record_names_file_place_and_field(
    name: str, file: str, place: list[Any], change: dict[str, Any], field: str, copied: Callable[[str], Path]
) -> None:
    root = copied(name)
    for key, value in change.items():
        edit_json(root / file, [*place, key], value)
    with pytest.raises(InputError) as caught:
        load_benchmark(name, root)
    assert caught.value.source == str(root / file) and caught.value.field == field


@pytest.mark.parametrize(
    ("name", "file", "values", "field"),
    [
        ("video_mme", MME_TABLE, {"answer": "E"}, "record 1, answer"),
        ("video_mme", MME_TABLE, {"options": None}, "record 1, options"),
        ("video_mme", MME_TABLE, {"videoID": ""}, "record 1, videoID"),
        ("video_mme", MME_TABLE, {"duration": None}, "record 1, duration"),
        ("av_odyssey", AV_PART, {"question_type_id": None}, "record 1, question_type_id"),
        ("av_odyssey", AV_PART, {"question": "Is it [img3]?"}, "record 1, question"),
        ("av_odyssey", AV_PART, {"answer": "B or C"}, "record 1, answer"),
    ],
)
def test_a_malformed_row_names_file_place_and_field(
    name: str, file: str, values: dict[str, Any], field: str, copied: Callable[[str], Path]
) -> None:
    root = copied(name)
    edit_table(root / file, 1, **values)
    with pytest.raises(InputError) as caught:
        load_benchmark(name, root)
    assert caught.value.source == str(root / file) and caught.value.field == field


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *(("mvbench", COUNT), ("worldsense", SENSE), ("daily_omni", QA), ("omnibench", LINES)),
        *(("av_odyssey", AV_PART), ("video_mme", MME_TABLE)),
    ],
)
def test_a_file_that_is_cut_off_or_missing(name: str, file: str, copied: Callable[[str], Path]) -> None:
    root = copied(name)
    (root / file).write_bytes((root / file).read_bytes()[:-200])
    with pytest.raises(InputError, match="cut off") as caught:
        load_benchmark(name, root)
    assert caught.value.source == str(root / file)
    (root / file).unlink()
    if name == "av_odyssey":
        (root / "av_odyssey_part2.parquet").unlink()
    with pytest.raises(InputError, match=r"no such file|no parquet file"):
        load_benchmark(name, root)


def test_a_question_that_is_there_twice(copied: Callable[[str], Path]) -> None:
    root = copied("omnibench")
    edit_json(root / LINES, [2, "index"], 1)
    with pytest.raises(InputError, match="question '1' is there 2 times"):
        load_benchmark("omnibench", root)
