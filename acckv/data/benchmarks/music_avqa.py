"""MUSIC-AVQA in its authors' layout: `avqa-{train,val,test}.json`, and `<video_id>.mp4` beside them or in `videos/`."""

from __future__ import annotations

from pathlib import Path

from acckv.data.benchmarks.base import Benchmark, Mode, Verdict
from acckv.data.music_avqa import load_music_avqa, official_match, robust_answer, robust_match
from acckv.data.records import Record


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions of a split; `subset` is a modality or type such as `Audio-Visual` or `Audio-Visual/Temporal`."""
    videos = root / "videos"
    records = load_music_avqa(root / f"avqa-{split}.json", videos if videos.is_dir() else root)
    return [record for record in records if subset is None or subset in record.groups]


def judge(record: Record, answer: str, mode: Mode) -> Verdict:
    """Official: equal up to case and trailing blanks and full stops. Robust: the first word of the vocabulary."""
    parsed = robust_answer(answer) is not None
    match = official_match if mode == "official" else robust_match
    return Verdict(float(match(answer, record.answer)), parsed)


MUSIC_AVQA = Benchmark(
    name="music_avqa",
    title="MUSIC-AVQA",
    source="Li et al., CVPR 2022, https://gewu-lab.github.io/MUSIC-AVQA",
    load=load,
    judge=judge,
    splits=("test", "val", "train"),
    max_new_tokens=4,
)
