"""MUSIC-AVQA in its authors' layout: `avqa-{train,val,test}.json`, and `<video_id>.mp4` beside them or in `videos/`.

`data/json_update` and `data/json` of the authors' repository are found as well. In the latter 55 questions of the test
split stand twice with different answers: both are kept, the second as `<id>-2`. A question without an answer of the
vocabulary is malformed. The authors' models are classifiers over the vocabulary, so that no prompt is published.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from acckv.benchmarks.base import Benchmark
from acckv.benchmarks.layout import first_file, video_folder
from acckv.benchmarks.music_avqa_questions import VOCABULARY, read_questions
from acckv.benchmarks.options import in_subset
from acckv.benchmarks.protocols import judge_word
from acckv.data.records import Record

MODALITIES = {
    "Audio": ("Counting", "Comparative"),
    "Visual": ("Counting", "Location"),
    "Audio-Visual": ("Existential", "Location", "Counting", "Comparative", "Temporal"),
}
GROUPS = (*MODALITIES, *(f"{modality}/{kind}" for modality, kinds in MODALITIES.items() for kind in kinds))
"""Three modalities and nine question types."""


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions of a split; `subset` is a modality or type such as `Audio-Visual` or `Audio-Visual/Temporal`."""
    name = f"avqa-{split}.json"
    file = first_file(root, name, f"data/json_update/{name}", f"data/json/{name}")
    seen: Counter[str] = Counter()
    records = []
    for fields, record in read_questions(file, video_folder(root, "videos", "data/video")):
        if record.answer not in VOCABULARY:
            raise fields.error("anser", f"{record.answer!r} is none of the {len(VOCABULARY)} answers")
        if record.groups[-1] not in GROUPS:
            raise fields.error("type", f"{record.groups[-1]!r} is none of the nine types")
        seen[record.id] += 1
        records.append(record if seen[record.id] == 1 else replace(record, id=f"{record.id}-{seen[record.id]}"))
    return in_subset(records, subset)


BENCHMARK = Benchmark(
    name="music_avqa",
    title="MUSIC-AVQA",
    source="Li et al., CVPR 2022, https://gewu-lab.github.io/MUSIC-AVQA",
    load=load,
    judge=judge_word,
    prompt=lambda record: f"{record.question}\nAnswer with a single word or phrase.",
    splits=("test", "val", "train"),
    subsets=GROUPS,
    max_new_tokens=8,
)
