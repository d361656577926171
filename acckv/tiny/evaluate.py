"""Measure the tiny AV-LLM on real .mp4 clips it has never seen: `python -m acckv.tiny.evaluate`.

Clips are generated, read back, run through the processor, and answered by greedy search from a full cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from acckv import KVCompressor
from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.data.encoding import encode_context
from acckv.data.media import read_media
from acckv.data.records import Record
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.data.synthetic.events import DESCRIPTION_TYPES
from acckv.errors import InputError
from acckv.evaluation.answering import answer_questions
from acckv.metrics.words import word_hits
from acckv.models import load_model
from acckv.models.clips import Media
from acckv.models.loading import TINY_MODEL

WORD_TOKENS = 3
DESCRIPTION_TOKENS = 64


def answer(model: Any, processor: Any, clip: Media, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to several questions about one clip, each from a copy of its full cache."""
    with KVCompressor("full")(model, processor) as session:
        cache = session.compress(**encode_context(processor, clip))
        (answers,) = answer_questions(session, processor, cache, [questions], max_new_tokens)
    return [answer.text for answer in answers]


def evaluate(model: Any, processor: Any, records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """Accuracy per question type, and over all types of one protocol ("word", "description").

    A word counts when the whole answer is right; a description by its words at the right position.

    Returns:
        type -> {"accuracy": share, "words": words asked for, "questions": number of questions}.
    """
    right: dict[str, int] = defaultdict(int)
    words: dict[str, int] = defaultdict(int)
    questions: dict[str, int] = defaultdict(int)
    by_clip = [list(group) for _, group in groupby(records, key=lambda record: record.video)]
    for asked in track(by_clip, description="answering", transient=True, disable=len(by_clip) < 8):
        clip = read_media(asked[0].video)
        for protocol, limit in (("word", WORD_TOKENS), ("description", DESCRIPTION_TOKENS)):
            chosen = [record for record in asked if record.protocol == protocol]
            if not chosen:
                continue
            replies = answer(model, processor, clip, [record.question for record in chosen], limit)
            for record, reply in zip(chosen, replies, strict=True):
                hits, total = word_hits(reply, record.answer)
                if protocol == "word":
                    hits, total = int(reply == record.answer), 1
                for name in (record.groups[-1], protocol):
                    right[name] += hits
                    words[name] += total
                    questions[name] += 1
    return {
        name: {"accuracy": right[name] / words[name], "words": words[name], "questions": questions[name]}
        for name in words
    }


def held_out_questions(root: Path | None, clips: int, questions_per_clip: int, slots: int = 16) -> Path:
    """Question file of held-out test clips, written to `root` (the default folder when None) if it is not there."""
    return write_clips(
        root,
        "test",
        clips,
        seed=20_000,
        slots=slots,
        questions_per_clip=questions_per_clip,
        descriptions_per_clip=len(DESCRIPTION_TYPES),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m acckv.tiny.evaluate",
        description="Accuracy per question type of the tiny audio-video LLM on generated, held-out .mp4 clips.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=TINY_MODEL, help="checkpoint folder")
    parser.add_argument("--data", type=Path, default=None, help="folder for the clips (default: the cache folder)")
    parser.add_argument("--clips", type=int, default=400, help="number of test clips")
    parser.add_argument("--questions", type=int, default=8, help="one-word questions a clip, spread over the types")
    parser.add_argument("--slots", type=int, default=16, help="seconds a clip")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    try:
        model, processor = load_model(options.model)
        file = held_out_questions(options.data, options.clips, options.questions, options.slots)
        figures = evaluate(model, processor, load_music_avqa(file, video_folder(file)))
    except InputError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    table = Table("question type", "accuracy", "questions", title=f"{options.clips} clips of {options.slots} s")
    for name, row in sorted(figures.items()):
        table.add_row(name, f"{row['accuracy']:.1%}", str(row["questions"]))
    console.print(table)
    console.print(f"{time.perf_counter() - started:.0f} s")
    text = json.dumps(figures, indent=1, sort_keys=True)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
