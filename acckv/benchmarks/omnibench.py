"""OmniBench in its authors' layouts.

Of their repository: `dataset/batch-5_1142_20240817.jsonl`, `mm_data/image/` and `mm_data/audio/`. Of the hub:
`data/*.parquet` with the same columns and the media in `image` and `audio`.

Each line is a record like

    {"index": 0, "task type": "Action and Activity", "audio type": "speech", "question": "What are the men doing?",
     "answer": "Talking.", "options": ["Singing.", "Talking.", "Eating.", "Reading."], "audio_path": "2_009.mp3",
     "image_path": "2_009.png", "audio content": "..", "image content": ".."}

about one picture and one sound.
"""

from __future__ import annotations

from pathlib import Path

from acckv.benchmarks.base import Benchmark
from acckv.benchmarks.letters import LETTERS, omnibench_letter
from acckv.benchmarks.options import choice_record, in_subset, judge_letters, lettered
from acckv.benchmarks.packed_media import PackedMedia
from acckv.data.records import Record
from acckv.io.fields import Fields, read_objects
from acckv.io.parquet import read_parquet

QUESTIONS = "dataset/batch-5_1142_20240817.jsonl"


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions; `subset` is a task type or audio type."""
    parts = sorted((root / "data").glob("*.parquet"))
    if parts and not (root / QUESTIONS).is_file():
        packed = PackedMedia("omnibench", root)
        return in_subset((_packed_record(packed, fields) for fields in read_parquet(parts, root / "data")), subset)
    return in_subset((_listed_record(root, fields) for fields in read_objects(root / QUESTIONS)), subset)


def _listed_record(root: Path, fields: Fields) -> Record:
    image, audio = fields.string("image_path"), fields.string("audio_path")
    return _record(fields, root / "mm_data/image" / image, root / "mm_data/audio" / audio)


def _packed_record(packed: PackedMedia, fields: Fields) -> Record:
    name = str(fields.integer("index"))
    image, audio = (packed.file(fields, field, fields.values.get(field), name) for field in ("image", "audio"))
    return _record(fields, image, audio)


def _record(fields: Fields, image: Path, audio: Path) -> Record:
    groups = f"task/{fields.string('task type').strip()}", f"audio/{fields.string('audio type').strip().lower()}"
    return choice_record(fields, str(fields.integer("index")), image, groups, right=_right, audio=audio)


def _right(fields: Fields) -> str:
    # The original looks for a letter in the answer's text, which fails for short texts and finds A in "A man ..".
    answer, texts = fields.string("answer"), [text.split() for text in fields.strings("options")]
    if answer.split() not in texts:
        raise fields.error("answer", f"{answer!r} is not one of the options")
    return LETTERS[texts.index(answer.split())]


def prompt(record: Record) -> str:
    """The official text for picture and sound."""
    options = "\n".join(lettered(record.options))
    return (
        f"Please answer the following question based on the given image and audio:\n{record.question}.\n"
        f"Please choose only one answer from the following options:\n{options}."
    )


BENCHMARK = Benchmark(
    name="omnibench",
    title="OmniBench",
    source="Li et al., 2024, https://github.com/multimodal-art-projection/OmniBench",
    load=load,
    judge=judge_letters(lambda answer, record: omnibench_letter(answer, record.options or ())),
    prompt=prompt,
    max_new_tokens=64,
)
