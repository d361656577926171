"""MUSIC-AVQA, AVQA, AVHBench, AVSD and custom data: official layouts against records written by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from acckv.benchmarks import find_benchmark, judge, load_benchmark, score
from acckv.benchmarks.music_avqa_questions import VOCABULARY
from acckv.data.records import Record
from acckv.errors import InputError
from tests.paths import FIXTURES


def test_music_avqa_records() -> None:
    first, *_, last = load_benchmark("MUSIC-AVQA", FIXTURES / "music_avqa")
    assert first.question == "Where is the first sounding instrument?"
    assert first.groups == ("Audio-Visual", "Audio-Visual/Temporal")
    assert last.video == FIXTURES / "music_avqa" / "videos" / "va00003871.mp4"
    assert find_benchmark("music_avqa").prompt(first).startswith(first.question + "\n")
    assert "more than ten" in VOCABULARY  # as the files write it, without underscores
    counting = load_benchmark("music_avqa", FIXTURES / "music_avqa", subset="Audio-Visual/Counting")
    assert [record.id for record in counting] == ["51", "51-2"]


def test_avqa_records() -> None:
    records = load_benchmark("avqa", FIXTURES / "avqa")
    assert records[0].options == ("motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car")
    assert records[0].groups == ("View", "Happening")
    assert records[2].options == ("river", "street", "NULL", "room")
    assert records[3].options == ("hunger", "a stranger", "play", "NULL")
    assert not records[4].video.exists()  # is reported when it is read, and does not stop the loading
    assert find_benchmark("avqa").prompt(records[3]) == (
        "Why did the dog bark?\nA. hunger\nB. a stranger\nC. play\nD. NULL\n"
        "Answer with the option's letter from the given choices."
    )


def test_avhbench_records() -> None:
    records = load_benchmark("avhbench", FIXTURES / "avhbench")
    audio, video = "Video-driven Audio Hallucination", "Audio-driven Video Hallucination"
    tasks = [audio, audio, video, video, "AV Matching", "AV Matching", "AV Captioning"]
    assert [record.groups for record in records] == [(task,) for task in tasks]
    assert [record.protocol for record in records] == ["yes_no"] * 6 + ["text"]
    assert find_benchmark("avhbench").prompt(records[0]) == "Is the sleeping man making sound in the audio?"
    assert [r.id for r in load_benchmark("avhbench", FIXTURES / "avhbench", subset=video)] == ["00191-2", "00191-3"]


def test_avsd_asks_the_last_turn_of_a_test_and_every_turn_otherwise() -> None:
    right = ("i hear no audio", "no , he does not make any noise .", "no he is silent")
    test = load_benchmark("avsd", FIXTURES / "avsd")
    assert test[0].references == right and test[1].references == ("on the sofa .",)
    assert test[0].question == (
        "Q: it is a man or a woman ?\nA: it is a man on the bed\nQ: is he alone ?\nA: yes , he is alone .\n"
        "Q: does he make any noise ?"
    )
    assert "UNDISCLOSED" not in find_benchmark("avsd").prompt(test[0])
    valid = load_benchmark("avsd", FIXTURES / "avsd", split="valid")
    assert [(record.id, record.answer) for record in valid] == [
        ("CGRUM_0", "it is a man on the bed"),
        ("CGRUM_1", "yes , he is alone ."),
    ]


def test_both_shapes_of_avsd_references_are_the_same() -> None:
    first, second = load_benchmark("avsd", FIXTURES / "avsd"), load_benchmark("avsd", FIXTURES / "avsd_dstc10")
    assert [(r.id, r.question, r.references) for r in first] == [(r.id, r.question, r.references) for r in second]


def test_avsd_files_that_do_not_fit(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "avsd", tmp_path, dirs_exist_ok=True)
    shutil.copytree(FIXTURES / "avsd_dstc10", tmp_path, dirs_exist_ok=True)
    with pytest.raises(InputError, match="several editions"):
        load_benchmark("avsd", tmp_path)
    assert len(load_benchmark("avsd", tmp_path, subset="DSTC10")) == 2
    (tmp_path / "test_set4DSTC7-AVSD_multiref.json").unlink()
    with pytest.raises(InputError, match=r"dialog 0, turn 2, answer: undisclosed.*multiref"):
        load_benchmark("avsd", tmp_path, subset="DSTC7")
    with pytest.raises(InputError, match=r"train_set4DSTC7-AVSD\.json: no such file"):
        load_benchmark("avsd", tmp_path, split="train")


def test_custom_records() -> None:
    root = FIXTURES / "custom"
    records = load_benchmark("custom", root)
    assert [record.protocol for record in records] == ["choice", "yes_no", "word", "text", "description", "choice"]
    assert (records[2].start, records[2].end) == (0.5, 1.25)
    assert records[3].audio == root / "clips" / "street.mp4" and len(records[3].references) == 2
    assert records[5].attachments == (root / "clips" / "dog.mp4",)
    assert records[0].groups == ("audio", "who")
    assert find_benchmark("custom").prompt(records[0]).startswith("Who barks?\nA. a cat\nB. a dog\n")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ('{"dialogs": 3}', "dialogs"),
        ('{"dialogs": [3]}', "dialog 0"),
        ('{"dialogs": [{"dialog": [{"question": "q", "answer": "a"}]}]}', "dialog 0, image_id"),
        ('{"dialogs": [{"image_id": "A", "dialog": []}]}', "dialog 0, dialog"),
        ('{"dialogs": [{"image_id": "A", "dialog": [{"question": "q"}]}]}', "dialog 0, turn 0, answer"),
        ('{"dialogs": [{"image_id": "A", "dialog": [{"answer": "a"}]}]}', "dialog 0, turn 0, question"),
    ],
)
def test_a_malformed_dialogue_names_its_place(tmp_path: Path, change: str, field: str) -> None:
    file = tmp_path / "valid_set4DSTC7-AVSD.json"
    file.write_text(change)
    with pytest.raises(InputError) as caught:
        load_benchmark("avsd", tmp_path, split="valid")
    assert caught.value.source == str(file) and caught.value.field == field


def choice(*options: str) -> Record:
    return Record("1", Path("a.mp4"), None, "Which?", options, "B", (), "choice")


@pytest.mark.parametrize(
    ("answer", "official", "robust"),
    [
        ("B", 1, 1),
        ("b.", 1, 1),
        ("(B)", 1, 1),
        ("B. cat", 1, 1),
        ("cat", 1, 1),
        ("A", 0, 0),
        ("Answer: B", 0, 1),
        ("The correct answer is **B**.", 0, 1),
        ("A is wrong, so the answer is B", 0, 1),
        ("A cat purrs", 0, 1),
        ("a cat", 0, 1),
        ("The answer is a cat", 0, 1),
        ("It must be option D", 0, 0),
        ("The cat, not the dog", 0, 0),
        ("dog and cat", 0, 0),
        ("<think>maybe A or (C)</think>B", 0, 1),
        ("I cannot tell", 0, 0),
        ("", 0, 0),
    ],
)
def test_both_parsers_of_choices(answer: str, official: float, robust: float) -> None:
    record = choice("dog", "cat", "dog and cat", "bird")
    assert score("avqa", record, answer) == official
    assert score("avqa", record, answer, "robust") == robust


def test_an_unparsed_choice_is_told_from_a_wrong_one() -> None:
    record = choice("dog", "cat", "bird", "NULL")
    assert not judge("avqa", record, "I cannot tell", "robust").parsed
    assert judge("avqa", record, "It is A.", "robust").parsed
    assert not judge("avqa", record, "It is A.", "official").parsed


@pytest.mark.parametrize(
    ("answer", "official", "robust"),
    [
        ("Yes", 1, 1),
        (" yes.", 1, 1),
        ("**Yes**, it barks", 1, 1),
        ("The dog barks, yes", 0, 1),
        ("No, yes", 0, 0),
        ("yesterday", 0, 0),
        ("It does", 0, 0),
        ("<think>no sound?</think>Yes", 0, 1),
    ],
)
def test_both_parsers_of_yes_and_no(answer: str, official: float, robust: float) -> None:
    record = Record("1", Path("a.mp4"), None, "Does it bark?", None, "yes", ("AV Matching",), "yes_no")
    assert score("avhbench", record, answer) == official
    assert score("avhbench", record, answer, "robust") == robust
