"""Write the clips and questions of the tasks: `python -m benchmarks.lmms_eval.prepare`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.data.synthetic.events import COLOURS, PITCHES, SHAPES, TIMBRES
from acckv.io.files import whole_file

FOLDER = Path("runs/lmms_eval")
QUESTIONS = "questions.jsonl"


def prepare(folder: Path = FOLDER, clips: int = 8, workers: int = 2) -> Path:
    """Generate clips of the test split and write their one-word questions.

    Args:
        folder: to write to; the tasks read `runs/lmms_eval`, seen from where lmms-eval is started.
        clips: how many; each has 8 questions.
        workers: processes that write clips.

    Returns:
        the file of questions, a JSON object a line: id, video, question, answer, choices, type.
    """
    file = write_clips(folder, "test", clips, seed=1, workers=workers, progress=False, descriptions_per_clip=0)
    lines = []
    for record in load_music_avqa(file, video_folder(file)):
        choices = next(words for words in (COLOURS, SHAPES, TIMBRES, PITCHES) if record.answer in words)
        row = {
            "id": record.id,
            "video": str(record.video.resolve()),
            "question": record.question,
            "answer": record.answer,
            "choices": choices,
            "type": record.groups[-1],
        }
        lines.append(json.dumps(row) + "\n")
    with whole_file(folder / QUESTIONS) as path:
        path.write_text("".join(lines), encoding="utf-8")
    return folder / QUESTIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--clips", type=int, default=8, help="number of clips, each with 8 questions")
    options = parser.parse_args()
    print(prepare(options.folder, options.clips))


if __name__ == "__main__":
    main()
