"""Daily-Omni in its authors' layout: `qa.json` and `Videos/<video_id>/<video_id>_video.mp4`, which have their sound.

The file is a list of records like

    {"Question": "..", "Choice": ["A. ..", "B. ..", "C. ..", "D. .."], "Answer": "B", "video_id": "Ec_lQgZ9wlg",
     "Type": "Event Sequence", "video_category": "Howto & Style", "video_duration": "30s"}
"""

from __future__ import annotations

from pathlib import Path

from acckv.benchmarks.base import Benchmark
from acckv.benchmarks.letters import leading_letter
from acckv.benchmarks.options import choice_record, groups_of, in_subset, judge_letters, lettered
from acckv.data.records import Record
from acckv.io.fields import Fields, read_objects

GROUPS = {"type": "Type", "category": "video_category", "duration": "video_duration"}


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions; `subset` is a question type, video category or duration."""
    objects = enumerate(read_objects(root / "qa.json"))
    return in_subset((_record(root, index, fields) for index, fields in objects), subset)


def _record(root: Path, index: int, fields: Fields) -> Record:
    name = fields.string("video_id")
    video = root / "Videos" / name / f"{name}_video.mp4"
    return choice_record(fields, str(index), video, groups_of(fields, GROUPS), ("Question", "Choice", "Answer"))


def prompt(record: Record) -> str:
    """The official text, choices as Python writes a list."""
    return (
        "\nYour task is to accurately answer multiple-choice questions based on the given video.\n"
        "Select the single most accurate answer from the given choices.\n"
        f"Question: {record.question}\nChoices: {lettered(record.options)}\n"
        "Your answer should be a capital letter representing your choice: A, B, C, or D. "
        "Don't generate any other text.\n"
    )


BENCHMARK = Benchmark(
    name="daily_omni",
    title="Daily-Omni",
    source="Zhou et al., 2025, https://github.com/Lliar-liar/Daily-Omni",
    load=load,
    judge=judge_letters(lambda answer, record: leading_letter(answer)),
    prompt=prompt,
    max_new_tokens=10,
)
