"""The MUSIC-AVQA loader on small hand-written files in the data set's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acckv.benchmarks.music_avqa_questions import (
    VOCABULARY,
    fill_template,
    load_music_avqa,
    official_match,
    robust_answer,
    robust_match,
)
from acckv.errors import InputError

ROW = {
    "video_id": "00000272",
    "question_id": 50,
    "type": '["Audio-Visual", "Temporal"]',
    "question_content": "Where is the <FL> sounding instrument?",
    "templ_values": '["first"]',
    "question_deleted": 0,
    "anser": "left",
}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "00000272.mp4").write_bytes(b"")
    return folder


def write(folder: Path, rows: Any) -> Path:
    file = folder / "avqa-test.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return file


def test_a_record(tmp_path: Path, videos: Path) -> None:
    last = ROW | {"question_id": 51, "question_content": "Is the <Object> louder than the <Object>?"}
    last |= {"templ_values": '["violin", "flute"]', "anser": "yes", "type": '["Audio", "Comparative"]'}
    first, second = load_music_avqa(write(tmp_path, [ROW, last]), videos)
    assert first.id == "50" and first.video == videos / "00000272.mp4"
    assert first.question == "Where is the first sounding instrument?"
    assert first.answer == "left" and first.options is None and first.audio is None
    assert first.groups == ("Audio-Visual", "Audio-Visual/Temporal") and first.protocol == "word"
    assert second.question == "Is the violin louder than the flute?"


def test_deleted_questions_and_descriptions(tmp_path: Path, videos: Path) -> None:
    rows = [ROW | {"question_deleted": 1}, ROW | {"question_id": 2, "type": '["Audio", "Description"]', "anser": "a b"}]
    (record,) = load_music_avqa(write(tmp_path, rows), videos)
    assert record.id == "2" and record.protocol == "description" and record.answer == "a b"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"video_id": None}, "video_id"),
        ({"video_id": "99999999"}, "video_id"),
        ({"question_id": "fifty"}, "question_id"),
        ({"type": "Temporal"}, "type"),
        ({"type": '["Temporal"]'}, "type"),
        ({"type": ["Audio-Visual", "Temporal"]}, "type"),
        ({"question_content": ""}, "question_content"),
        ({"templ_values": "[]"}, "templ_values"),
        ({"templ_values": '["first", "second"]'}, "templ_values"),
        ({"templ_values": "[first"}, "templ_values"),
        ({"templ_values": "[1]"}, "templ_values"),
        ({"question_deleted": "no"}, "question_deleted"),
        ({"anser": 3}, "anser"),
    ],
)
def test_a_malformed_record_names_file_index_and_field(
    tmp_path: Path, videos: Path, change: dict[str, Any], field: str
) -> None:
    file = write(tmp_path, [ROW, ROW | {"question_id": 51} | change])
    with pytest.raises(InputError) as caught:
        load_music_avqa(file, videos)
    assert caught.value.source == str(file) and caught.value.field == f"record 1, {field}"


@pytest.mark.parametrize("field", sorted(set(ROW) - {"question_deleted"}))
def test_a_missing_field_is_named(tmp_path: Path, videos: Path, field: str) -> None:
    with pytest.raises(InputError, match=f"record 0, {field}: missing"):
        load_music_avqa(write(tmp_path, [{k: v for k, v in ROW.items() if k != field}]), videos)


def test_files_that_are_no_question_files(tmp_path: Path, videos: Path) -> None:
    whole = json.dumps([ROW, ROW | {"question_id": 51}])
    cases = {
        whole[: len(whole) // 2]: "cut off",
        '{"a": 1}': "expected a list",
        "[3]": "record 0: expected an object",
        json.dumps([ROW, ROW]): "50 appears twice",
    }
    for text, message in cases.items():
        file = write(tmp_path, text)
        with pytest.raises(InputError, match=message) as caught:
            load_music_avqa(file, videos)
        assert caught.value.source == str(file)
    with pytest.raises(InputError, match="no such file"):
        load_music_avqa(tmp_path / "none.json", videos)
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(InputError, match="UTF-8"):
        load_music_avqa(tmp_path / "latin.json", videos)


def test_a_missing_video_is_named(tmp_path: Path, videos: Path) -> None:
    with pytest.raises(InputError, match=r"no such video .*00000272\.mp4"):
        load_music_avqa(write(tmp_path, [ROW]), tmp_path / "elsewhere")


@given(st.lists(st.sampled_from(["word", "<Object>", "<FL>"]), min_size=1, max_size=8), st.booleans())
def test_templates_are_filled_in_order(tokens: list[str], mark: bool) -> None:
    holes = [token for token in tokens if "<" in token]
    values = [f"value{k}" for k in range(len(holes))]
    filled = fill_template(" ".join(tokens) + "?" * mark, values)
    assert "<" not in filled and filled.endswith("?") == mark
    assert [word for word in filled.rstrip("?").split(" ") if word.startswith("value")] == values
    with pytest.raises(ValueError, match="values"):
        fill_template(" ".join(tokens), [*values, "more"])


def test_the_vocabulary_has_42_words() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 42


@pytest.mark.parametrize(
    ("prediction", "answer", "official", "robust"),
    [
        ("Left. ", "left", True, True),
        ("yes", "no", False, False),
        ("The left one, not the right.", "left", False, True),
        ("The right one, not the left.", "left", False, False),
        ("more than ten", "more_than_ten", False, True),
        ("More than ten.", "more than ten", True, True),
        ("more than ten", "ten", False, False),
        ("An Acoustic Guitar plays", "acoustic_guitar", False, True),
        ("someone", "one", False, False),
        ("", "yes", False, False),
        ("red", "red", True, True),
        ("a green one", "green", False, True),
    ],
)
def test_both_parsers(prediction: str, answer: str, official: bool, robust: bool) -> None:
    assert official_match(prediction, answer) is official
    assert robust_match(prediction, answer) is robust


def test_an_answer_that_cannot_be_parsed() -> None:
    assert robust_answer("I cannot tell") is None
    assert robust_answer("It is a violin or a cello") == "violin"
