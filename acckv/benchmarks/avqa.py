"""AVQA in its authors' layout: `{val,train}_qa.json` and `<video_name>.mp4` in `videos/` or beside them.

`data/annotation` and `data/video` of the authors' repository are found as well. A record is

    {"id": 183, "video_name": "-HG3Omg_89c_000030", "video_id": 341, "question_text": "What happened in the video?",
     "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"], "answer": 1,
     "question_relation": "View", "question_type": "Happening"}

`answer` counts from 0: the authors compare it with the argmax over the choices (HAVF/hcrn_havf/validate.py). A choice
that is missing or null reads "NULL" (preprocess/preprocess_text/datautils/avqa.py). Their models are classifiers: no
prompt or parser is published, `official` takes a bare letter or option.
"""

from __future__ import annotations

from pathlib import Path

from acckv.benchmarks.base import Benchmark
from acckv.benchmarks.layout import first_file, video_folder
from acckv.benchmarks.letters import LETTERS
from acckv.benchmarks.options import in_subset, lettered
from acckv.benchmarks.protocols import judge_choice
from acckv.data.records import Record
from acckv.io.fields import Fields, read_objects

CHOICES = 4
TYPES = ("Which", "Come From", "Happening", "Where", "Why", "Before Next", "When", "Used For")


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions of a split; `subset` is a question type such as `Come From`."""
    file = first_file(root, f"{split}_qa.json", f"data/annotation/{split}_qa.json")
    videos = video_folder(root, "videos", "video", "data/video")
    return in_subset((_record(fields, videos) for fields in read_objects(file)), subset)


def _record(fields: Fields, videos: Path) -> Record:
    name = fields.string("video_name")
    kind = fields.string("question_type")
    if kind not in TYPES:
        raise fields.error("question_type", f"expected one of {', '.join(TYPES)}, got {kind!r}")
    right = fields.integer("answer")
    if not 0 <= right < CHOICES:
        raise fields.error("answer", f"expected 0 to {CHOICES - 1}, got {right}")
    return Record(
        id=str(fields.integer("id")),
        video=videos / (name if name.endswith(".mp4") else f"{name}.mp4"),
        audio=None,
        question=fields.string("question_text"),
        options=_choices(fields),
        answer=LETTERS[right],
        groups=(fields.string("question_relation"), kind),
        protocol="choice",
    )


def _choices(fields: Fields) -> tuple[str, ...]:
    given = fields.values.get("multi_choice")
    if not isinstance(given, list) or not 1 <= len(given) <= CHOICES:
        raise fields.error("multi_choice", f"expected a list of {CHOICES} texts, got {given!r}")
    if not all(choice is None or isinstance(choice, str) for choice in given):
        raise fields.error("multi_choice", f"expected texts, got {given!r}")
    return tuple("NULL" if choice is None else choice for choice in [*given, *[None] * (CHOICES - len(given))])


def prompt(record: Record) -> str:
    """Question, options and what to answer with."""
    return "\n".join(
        [record.question, *lettered(record.options), "Answer with the option's letter from the given choices."]
    )


BENCHMARK = Benchmark(
    name="avqa",
    title="AVQA",
    source="Yang et al., ACM Multimedia 2022, https://mn.cs.tsinghua.edu.cn/avqa",
    load=load,
    judge=judge_choice,
    prompt=prompt,
    splits=("val", "train"),
    subsets=TYPES,
    max_new_tokens=8,
)
