"""WorldSense in its authors' layout: `worldsense_qa.json` and `videos/<video>.mp4`, which have their sound.

The authors' archives hold bare videos, which may lie beside the questions too.

The file maps videos to what is asked of them:

    {"aBcDeFgH": {"duration": "1-2min", "domain": "Music", "sub_category": "Covers", "audio_class": ["Music"],
                  "video_caption": "..", "task0": {"task_domain": "Recognition", "task_type": "Audio Change",
                  "question": "..", "candidates": ["A. ..", "B. .."], "answer": "B"}}}
"""

from __future__ import annotations

from pathlib import Path

from acckv.benchmarks.base import Benchmark
from acckv.benchmarks.layout import video_folder
from acckv.benchmarks.letters import WORLDSENSE_PREFIXES, first_capital
from acckv.benchmarks.options import choice_record, groups_of, in_subset, judge_letters, lettered
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.io.fields import Fields
from acckv.io.json_files import read_json

SYSTEM = (
    "Carefully watch this video and pay attention to every detail. "
    "Based on your observations, select the best option that accurately addresses the question."
)
TASK = (
    "These are the frames of a video and the corresponding audio. "
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions; `subset` is a task type, task domain, domain, category, duration or audio class."""
    file = root / "worldsense_qa.json"
    videos = read_json(file)
    if not isinstance(videos, dict):
        raise InputError(f"expected an object with a field for each video, got {type(videos).__name__}", source=file)
    folder = video_folder(root, "videos")
    records: list[Record] = []
    for name, values in videos.items():
        if not isinstance(values, dict):
            raise InputError(f"expected an object, got {type(values).__name__}", source=file, field=f"video {name}")
        video = Fields(file, f"video {name}", values)
        for task in (field for field in values if "task" in field):
            if not isinstance(values[task], dict):
                raise video.error(task, f"expected an object, got {values[task]!r}")
            records.append(_record(folder, name, video, task))
    return in_subset(records, subset)


def _record(folder: Path, name: str, video: Fields, task: str) -> Record:
    fields = Fields(video.file, f"{video.name}, {task}", video.values[task])
    groups = (
        *groups_of(fields, {"task domain": "task_domain", "task type": "task_type"}),
        *groups_of(video, {"domain": "domain", "category": "sub_category", "duration": "duration"}),
        *(f"audio/{kind}" for kind in video.strings("audio_class")),
    )
    names = ("question", "candidates", "answer")
    return choice_record(fields, f"{name}/{task}", folder / f"{name}.mp4", groups, names)


def prompt(record: Record) -> str:
    """The official text for video with sound."""
    question = "\n".join([record.question, *lettered(record.options)])
    return f"{SYSTEM}\n{TASK}\nQuestion: {question}\nAnswer: "


BENCHMARK = Benchmark(
    name="worldsense",
    title="WorldSense",
    source="Hong et al., ICLR 2026, https://huggingface.co/datasets/honglyhly/WorldSense",
    load=load,
    judge=judge_letters(lambda answer, record: first_capital(answer, WORLDSENSE_PREFIXES)),
    prompt=prompt,
)
