"""Questions about generated clips that the evaluations of a process share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.data.synthetic.clips import video_folder, write_clips
from tests.evaluation.runs import CLIPS, QUESTIONS


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated clips in the format for data of one's own: one-word questions alone."""
    root = tmp_path_factory.mktemp("benchmark")
    file = write_clips(root / "clips", "test", CLIPS, questions_per_clip=QUESTIONS, workers=1, progress=False)
    rows = [
        {"video": f"videos/{r.video.name}", "question": r.question, "answer": r.answer, "groups": r.groups}
        for r in load_music_avqa(file, video_folder(file))
        if r.protocol == "word"
    ]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    video_folder(file).rename(root / "videos")
    return root
