"""The multiple-choice benchmarks on fixtures in their official layout, against records written by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from acckv.benchmarks import BENCHMARKS, load_benchmark
from acckv.data.records import Record
from acckv.errors import InputError
from tests.benchmarks.edits import AV_PART, COUNT, LINES, edit_json, edit_table
from tests.benchmarks.scored_by_hand import CHOICE
from tests.paths import FIXTURES


def unpacked(root: Path) -> Path:
    """The only folder that media of a copy were unpacked to; nothing of them is beside the copy."""
    assert not (root / "media").exists()
    (folder,) = (root.parent / "cache/av_odyssey").iterdir()
    return folder


def test_records_of_mvbench() -> None:
    records = {record.id: record for record in load_benchmark("MVBench", FIXTURES / "mvbench")}
    videos = FIXTURES / "mvbench/video"
    assert records["action_sequence/0"] == Record(
        id="action_sequence/0",
        video=videos / "star/Charades_v1_480/ZS9XR.mp4",
        audio=None,
        question="Which square is shown after the red one?",
        options=("The red square.", "The green square.", "The blue square.", "No square."),
        answer="B",
        groups=("subtask/action_sequence",),
        protocol="choice",
        start=0.0,
        end=2.0,
    )
    cut = records["object_interaction/0"]
    assert cut.video == videos / "star/Charades_segment/46GP8_0.5_1.5.mp4" and (cut.start, cut.end) == (None, None)
    (one,) = load_benchmark("mvbench", FIXTURES / "mvbench", subset="action_count")
    assert one.id == "action_count/0" and one.video == videos / "perception/videos/video_7.mp4"


def test_seconds_of_mvbench_count_where_the_original_uses_them(copied: Callable[[str], Path]) -> None:
    root = copied("mvbench")
    edit_json(root / COUNT, [0, "start"], 0.5)
    edit_json(root / COUNT, [0, "end"], 1.0)
    (record,) = load_benchmark("mvbench", root, subset="action_count")
    assert (record.start, record.end) == (None, None)
    (record,) = load_benchmark("mvbench", root, subset="action_prediction")
    assert (record.start, record.end) == (0.0, 1.0)


def test_videos_of_mvbench_without_the_video_folder(copied: Callable[[str], Path]) -> None:
    root = copied("mvbench")
    shutil.move(root / "video/perception", root / "perception")
    (record,) = load_benchmark("mvbench", root, subset="state_change")
    assert record.video == root / "perception/videos/video_7.mp4"


def test_records_of_worldsense() -> None:
    record = load_benchmark("WorldSense", FIXTURES / "worldsense")[1]
    assert record == Record(
        id="aJxSquRe/task1",
        video=FIXTURES / "worldsense/videos/aJxSquRe.mp4",
        audio=None,
        question="How often does the tone change?",
        options=("Once.", "Twice.", "Never."),
        answer="C",
        groups=(
            *("task domain/Understanding", "task type/Audio Counting", "domain/Music", "category/Covers"),
            *("duration/<1min", "audio/Music", "audio/Event"),
        ),
        protocol="choice",
    )


def test_records_of_daily_omni() -> None:
    record = load_benchmark("daily-omni", FIXTURES / "daily_omni")[2]
    assert record == Record(
        id="2",
        video=FIXTURES / "daily_omni/Videos/-rieb8cBb2z/-rieb8cBb2z_video.mp4",
        audio=None,
        question="What is the square's colour?",
        options=("A red square", "A green square", "A blue square", "'Nothing at all'"),
        answer="C",
        groups=("type/Context understanding", "category/Music", "duration/60s"),
        protocol="choice",
    )


def test_records_of_omnibench() -> None:
    record = load_benchmark("omnibench", FIXTURES / "omnibench")[3]
    assert record == Record(
        id="3",
        video=FIXTURES / "omnibench/mm_data/image/2_009_four.png",
        audio=FIXTURES / "omnibench/mm_data/audio/2_009_four.mp3",
        question="What is it?",
        options=("Whistling.", "Humming.", "Silence.", "Vitamin A."),
        answer="D",
        groups=("task/Action and Activity", "audio/music"),
        protocol="choice",
    )


def test_lines_of_omnibench_end_at_line_feeds_alone(copied: Callable[[str], Path]) -> None:
    root = copied("omnibench")
    text = (root / LINES).read_text().replace("What is it?", "What\u2028is\x85it?").replace("\n", "\r\n")
    (root / LINES).write_bytes(text.encode())
    records = load_benchmark("omnibench", root)
    assert len(records) == 5 and records[3].question == "What\u2028is\x85it?"


def test_records_of_video_mme(copied: Callable[[str], Path]) -> None:
    root = copied("video_mme")
    (root / "data/w0Wmc8C0Eq0.mp4").rename(root / "data/w0Wmc8C0Eq0.mkv")
    records = load_benchmark("Video-MME", root)
    assert records[2] == Record(
        id="301-1",
        video=root / "data/_qr46dZ7vgQ.mp4",
        audio=None,
        question="Which colour is the first square?",
        options=("Red.", "Green.", "Blue.", "White."),
        answer="C",
        groups=("duration/medium", "domain/Sports Competition", "category/Basketball", "task/Attribute Perception"),
        protocol="choice",
    )
    assert records[4].video == root / "data/w0Wmc8C0Eq0.mkv"


def test_records_of_av_odyssey(copied: Callable[[str], Path]) -> None:
    root = copied("av_odyssey")
    records = {record.id: record for record in load_benchmark("AV-Odyssey", root)}
    media = unpacked(root)
    assert records["26_4"] == Record(
        id="26_4",
        video=media / "26_4_video_1.mp4",
        audio=media / "26_4_audio_2.wav",  # named first
        question="Is [audio2] higher than [audio1]? [video1]",
        options=("Yes", "No", "Partly", "Cannot be said at all from it"),
        answer="D",
        groups=("subfield/Hallucination", "task/26", "data type/video"),
        protocol="choice",
        attachments=(media / "26_4_audio_1.wav",),
    )
    pictures = records["1_0"]
    assert (pictures.video, pictures.audio) == (media / "1_0_image_1.png", media / "1_0_audio_1.wav")
    assert pictures.attachments == (media / "1_0_image_2.png",)
    sounds = records["3_7"]
    assert (sounds.video, sounds.audio) == (media / "3_7_audio_2.wav", None)
    assert sounds.attachments == (media / "3_7_audio_1.wav",)
    stored = parquet.read_table(root / AV_PART).to_pylist()[0]
    assert pictures.video.read_bytes() == stored["image_1"]
    assert pictures.attachments[0].read_bytes() == stored["image_2"]


def test_media_are_unpacked_once_and_for_the_subset_alone(copied: Callable[[str], Path]) -> None:
    root = copied("av_odyssey")
    load_benchmark("av_odyssey", root, subset="Tone")
    assert sorted(file.name for file in unpacked(root).iterdir()) == ["3_7_audio_1.wav", "3_7_audio_2.wav"]
    first, second = sorted(unpacked(root).iterdir())
    written, whole = first.stat().st_mtime_ns, second.read_bytes()
    second.write_bytes(whole[:100])  # a copy that was broken off
    load_benchmark("av_odyssey", root, subset="Tone")
    assert first.stat().st_mtime_ns == written and second.read_bytes() == whole


def test_av_odyssey_with_paths_in_place_of_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCKV_CACHE", str(tmp_path / "cache"))
    row = {"question_id": "q1", "question_type_id": 2, "data_type": "image", "subfield": "Tone", "answer": "C"}
    row |= {"question": "[audio1] and [img1]?", "options": ["A. 1", "B. 2", "C. 3", "D. 4"]}
    row |= {"image_path": ["images/a.png"], "video_path": [], "audio_path": ["audios/a.wav", "audios/b.wav"]}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "av_odyssey.parquet")
    (record,) = load_benchmark("av_odyssey", tmp_path)
    assert (record.video, record.audio) == (tmp_path / "images/a.png", tmp_path / "audios/a.wav")
    assert record.attachments == (tmp_path / "audios/b.wav",) and record.options == ("1", "2", "3", "4")
    assert not (tmp_path / "cache").exists()


def test_media_are_written_nowhere_else(copied: Callable[[str], Path]) -> None:
    root = copied("av_odyssey")
    edit_table(root / AV_PART, 0, question_id="../../escaped")
    record = load_benchmark("av_odyssey", root)[0]
    media = unpacked(root)
    assert record.video == media / "______escaped_image_1.png" and record.video.is_file()
    shutil.rmtree(media)
    media.write_text("")  # a file where the folder should be
    with pytest.raises(InputError, match="cannot be written here"):
        load_benchmark("av_odyssey", root)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *(("mvbench", "video"), ("worldsense", "videos"), ("daily_omni", "Videos"), ("omnibench", "mm_data")),
        ("video_mme", "data"),
    ],
)
def test_missing_media_do_not_stop_loading(name: str, folder: str, copied: Callable[[str], Path]) -> None:
    root = copied(name)
    shutil.rmtree(root / folder)
    records = load_benchmark(name, root)
    assert len(records) == len(CHOICE[name]) and not any(record.video.exists() for record in records)


@pytest.mark.parametrize(
    ("name", "subset", "ids"),
    [
        ("worldsense", "Music", ["aJxSquRe/task0", "aJxSquRe/task1", "aJxSquRe/task2"]),
        ("worldsense", "audio/Speech", ["kQb2Wz9T/task0", "kQb2Wz9T/task1"]),
        ("worldsense", "Audio Counting", ["aJxSquRe/task1"]),
        ("daily_omni", "60s", ["2", "3", "4"]),
        ("omnibench", "sound event", ["0", "1"]),
        ("av_odyssey", "task/1", ["1_0", "1_1"]),
        ("video_mme", "long", ["601-1", "601-2"]),
    ],
)
def test_subsets(name: str, subset: str, ids: list[str], copied: Callable[[str], Path]) -> None:
    root = copied(name)
    assert [record.id for record in load_benchmark(name, root, subset=subset)] == ids
    with pytest.raises(InputError, match="no question of"):
        load_benchmark(name, root, subset="nothing of that name")


PROMPTS = {
    "mvbench": "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
    "movement of objects, and the action and pose of persons. Based on your observations, select the best option that "
    "accurately addresses the question.\nQuestion: Which square is shown after the red one?\nOptions:\n"
    "(A) The red square.\n(B) The green square.\n(C) The blue square.\n(D) No square.\nOnly give the best option.",
    "worldsense": "Carefully watch this video and pay attention to every detail. Based on your observations, select "
    "the best option that accurately addresses the question.\nThese are the frames of a video and the corresponding "
    "audio. Select the best answer to the following multiple-choice question based on the video. Respond with only "
    "the letter (A, B, C, or D) of the correct option.\nQuestion: Which colour is the first square?\nA. Red.\n"
    "B. Green.\nC. Blue.\nD. White.\nAnswer: ",
    "daily_omni": "\nYour task is to accurately answer multiple-choice questions based on the given video.\nSelect "
    "the single most accurate answer from the given choices.\nQuestion: What was shown first?\nChoices: ['A. A red "
    "square', 'B. A green square', 'C. A blue square', \"D. 'Nothing at all'\"]\nYour answer should be a capital "
    "letter representing your choice: A, B, C, or D. Don't generate any other text.\n",
    "omnibench": "Please answer the following question based on the given image and audio:\nWhat is shown?.\nPlease "
    "choose only one answer from the following options:\nA. A red square is shown with a tone.\nB. A green square is "
    "shown with a tone.\nC. A blue square is shown with a tone.\nD. No square is shown at all..",
    "av_odyssey": "What fits [audio1]?\nA:[img1]\nB:[img2]\nC:Both\nD:Neither\nAnswer with the option's letter from "
    "the given choices directly.",
    "video_mme": "Select the best answer to the following multiple-choice question based on the video. Respond with "
    "only the letter (A, B, C, or D) of the correct option.\nWhich colour is the first square?\nA. Red.\nB. Green.\n"
    "C. Blue.\nD. White.\nThe best answer is:",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_the_official_texts(name: str, copied: Callable[[str], Path]) -> None:
    assert BENCHMARKS[name].prompt(load_benchmark(name, copied(name))[0]) == PROMPTS[name]
