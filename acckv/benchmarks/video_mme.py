"""Video-MME as it is distributed: `videomme/test-00000-of-00001.parquet` and `data/<videoID>.mp4`, with their sound.

Columns: video_id, duration, domain, sub_category, url, videoID, question_id, task_type, question, options, answer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from acckv.benchmarks.base import Benchmark, Mode, Verdict
from acckv.benchmarks.letters import VIDEO_MME_PREFIXES, first_capital
from acckv.benchmarks.options import choice_record, groups_of, in_subset, judge_letters, lettered
from acckv.data.records import Record
from acckv.io.fields import Fields
from acckv.io.parquet import read_parquet

TASK = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
GROUPS = {"duration": "duration", "domain": "domain", "category": "sub_category", "task": "task_type"}
_judge = judge_letters(lambda answer, record: first_capital(answer, VIDEO_MME_PREFIXES))


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions; `subset` is a duration ("short", "medium", "long"), domain, category or task type."""
    rows = read_parquet(sorted((root / "videomme").glob(f"{split}-*.parquet")), root / "videomme")
    return in_subset((_record(root, fields) for fields in rows), subset)


def _record(root: Path, fields: Fields) -> Record:
    video = _video(root / "data", fields.string("videoID"))
    return choice_record(fields, fields.string("question_id"), video, groups_of(fields, GROUPS))


def _video(folder: Path, name: str) -> Path:
    files = [folder / f"{name}.{ending}" for ending in ("mp4", "MP4", "mkv")]
    return next((file for file in files if file.is_file()), files[0])


def prompt(record: Record) -> str:
    """The official text without subtitles."""
    return "\n".join([TASK, record.question, *lettered(record.options), "The best answer is:"])


def judge(record: Record, answer: str, mode: Mode) -> Verdict:
    """Official: accuracy among the answers that could be parsed; the others are not counted."""
    verdict = _judge(record, answer, mode)
    return replace(verdict, counted=verdict.parsed) if mode == "official" else verdict


BENCHMARK = Benchmark(
    name="video_mme",
    title="Video-MME",
    source="Fu et al., CVPR 2025, https://huggingface.co/datasets/lmms-lab/Video-MME",
    load=load,
    judge=judge,
    prompt=prompt,
    splits=("test",),
)
