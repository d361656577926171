"""What the tasks beside this file refer to."""

from __future__ import annotations

from typing import Any

from acckv.benchmarks.music_avqa_questions import VOCABULARY, robust_match
from acckv.data.synthetic.events import COLOURS, PITCHES, SHAPES, TIMBRES

WORDS = {*VOCABULARY, *COLOURS, *SHAPES, *TIMBRES, *PITCHES}


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """The clip; the model reads its sound from the same file."""
    return [doc["video"]]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the first known word of the answer is right, as `evaluate.py` counts it."""
    return {"accuracy": float(robust_match(results[0], doc["answer"], WORDS))}
