"""A benchmark of one's own: a folder of clips, and a table `<split>.csv` of questions about them.

    python examples/my_benchmark.py runs/questions        # a small folder, to try it
    python evaluate.py --plugins examples/my_benchmark.py --data.benchmark my_questions --data.root runs/questions \
        --policies keydiff
    python train.py --plugins examples/my_benchmark.py --data.source benchmark --data.benchmark my_questions \
        --data.root runs/questions --trainer.max_steps 4
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from acckv.benchmarks import Benchmark, Mode, Verdict, register_benchmark
from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.data.records import Record
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.errors import InputError

COLUMNS = ("id", "clip", "kind", "question", "answer")


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions of a split in the order of its table; `subset` is a kind of question."""
    file = root / f"{split}.csv"
    if not file.is_file():
        raise InputError("no such file", source=file)
    records = []
    with file.open(encoding="utf-8", newline="") as table:
        for number, row in enumerate(csv.DictReader(table), start=1):
            for column in COLUMNS:
                if not row.get(column):
                    raise InputError("missing", source=file, field=f"row {number}, {column}")
            record = Record(
                id=row["id"],
                video=root / row["clip"],
                audio=None,
                question=row["question"],
                options=None,
                answer=row["answer"],
                groups=(row["kind"],),
                protocol="word",
            )
            records.append(record)
    return [record for record in records if subset in (None, *record.groups)]


def judge(record: Record, answer: str, mode: Mode) -> Verdict:
    """Official: the first word is the right one. Robust: any word is."""
    words = answer.lower().split()
    return Verdict(float(record.answer in (words[:1] if mode == "official" else words)), parsed=bool(words))


register_benchmark(
    Benchmark(
        name="my_questions",
        title="My questions",
        source="examples/my_benchmark.py",
        load=load,
        judge=judge,
        splits=("test", "train", "validation"),
        max_new_tokens=4,
    )
)


def write_folder(root: Path) -> None:
    """Two generated clips for each split, and a table of one-word questions about them."""
    root.mkdir(parents=True, exist_ok=True)
    for split in ("test", "train", "validation"):
        questions = write_clips(root, split, 2, progress=False)
        records = load_music_avqa(questions, video_folder(questions))
        with (root / f"{split}.csv").open("w", encoding="utf-8", newline="") as table:
            rows = csv.writer(table)
            rows.writerow(COLUMNS)
            for record in records:
                if record.protocol == "word":
                    clip = record.video.relative_to(root)
                    rows.writerow([record.id, clip, record.groups[-1], record.question, record.answer])


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]))
