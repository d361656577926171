"""AVHBench in its authors' layout: `QA.json` and `<video_id>.mp4` in `videos/` or beside it. A record is

    {"video_id": "00191", "task": "Video-driven Audio Hallucination",
     "text": "Is the couch making sound in the audio?", "label": "No"}

The authors publish no scoring code. They report accuracy, precision, recall, F1 and the share of yes for the questions,
which `acckv.metrics.yes_no.YesNoScores` gives, and METEOR and CIDEr for captions. `official` reads the first word of an
answer, so that an answer without yes or no is wrong; their table has models that are right far less often than chance.
"""

from __future__ import annotations

from pathlib import Path

from acckv.benchmarks.base import Benchmark
from acckv.benchmarks.layout import first_file, video_folder
from acckv.benchmarks.options import in_subset
from acckv.benchmarks.protocols import judge_protocol
from acckv.data.records import Record
from acckv.io.fields import Fields, read_objects

CAPTIONS = "AV Captioning"
TASKS = ("Audio-driven Video Hallucination", "Video-driven Audio Hallucination", "AV Matching", CAPTIONS)
_ALIASES = {
    "AV Hallucination (Audio)": "Video-driven Audio Hallucination",
    "AV Hallucination (Video)": "Audio-driven Video Hallucination",
    "Audio-Visual Matching": "AV Matching",
    "Audio-visual Captioning": CAPTIONS,
}


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions in file order; `subset` is a task."""
    file = first_file(root, "QA.json", "qa.json", "avhbench_QA.json")
    videos = video_folder(root, "videos", "video")
    return in_subset((_record(fields, number, videos) for number, fields in enumerate(read_objects(file))), subset)


def _record(fields: Fields, number: int, videos: Path) -> Record:
    task = fields.string("task")
    task = _ALIASES.get(task, task)
    if task not in TASKS:
        raise fields.error("task", f"expected one of {', '.join(TASKS)}, got {task!r}")
    label = fields.string("label")
    if task != CAPTIONS:
        label = label.strip().lower()
        if label not in ("yes", "no"):
            raise fields.error("label", f"expected Yes or No, got {fields.values['label']!r}")
    video_id = fields.string("video_id")
    return Record(
        id=f"{video_id}-{number}",
        video=videos / f"{video_id}.mp4",
        audio=None,
        question=fields.string("text"),
        options=None,
        answer=label,
        groups=(task,),
        protocol="text" if task == CAPTIONS else "yes_no",
        references=(label,) if task == CAPTIONS else (),
    )


BENCHMARK = Benchmark(
    name="avhbench",
    title="AVHBench",
    source="Sung-Bin et al., ICLR 2025, https://github.com/kaist-ami/AVHBench",
    load=load,
    judge=judge_protocol,
    subsets=TASKS,
    max_new_tokens=64,
)
