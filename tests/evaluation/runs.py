"""Evaluations that tests run, and what they say and write."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from acckv.data.encoding import encode
from acckv.data.media import read_media
from acckv.data.records import Record
from acckv.evaluation.results import Results
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation

CLIPS, QUESTIONS = 5, 2
"""Of the questions that an evaluation's tests share, and how many there are of each clip."""


def recorder() -> Console:
    """A console whose `export_text` gives what was printed."""
    return Console(file=io.StringIO(), width=200, record=True)


def run(options: EvaluationOptions, command: str | None = None) -> tuple[Results, str]:
    """An evaluation's results, and what it printed."""
    console = recorder()
    return run_evaluation(options, command=command, console=console), console.export_text()


def predictions(output: Path) -> list[dict[str, Any]]:
    """The answers that an evaluation wrote, in the order of the file."""
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def generated(model: Any, processor: Any, record: Record, limit: int) -> str:
    """The answer of the model's own `generate`, of `limit` tokens at most."""
    inputs = encode(processor, [read_media(record.video)], [record.question])
    out = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return str(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
