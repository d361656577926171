"""The answers of an evaluation, policy against full cache: shares with intervals, and which answers flipped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acckv.errors import InputError
from acckv.evaluation.results import FULL
from acckv.metrics.intervals import Interval, bootstrap_ratio

RIGHT = 0.5
"""Least score that counts as right where an answer is right or wrong; one-word answers score 0 or 1."""
Cell = tuple[str, float]
"""(policy, ratio)"""


@dataclass(frozen=True)
class Answer:
    """One answer, a line of `predictions.jsonl`.

    Attributes:
        id: of the question; clip: number of its clip; video: the clip's file name.
        question, answer, prediction: asked, right, given.
        score: 0..1.
    """

    id: str
    clip: int
    video: str
    question: str
    answer: str
    prediction: str
    score: float

    @property
    def right(self) -> bool:
        return self.score >= RIGHT


@dataclass(frozen=True)
class Flip:
    """An answer that is right from one of two caches only."""

    full: Answer
    compressed: Answer


@dataclass(frozen=True)
class Flips:
    """Answers that flipped in one cell.

    Attributes:
        lost: right from the full cache only; won: right from the compressed cache only.
    """

    lost: list[Flip]
    won: list[Flip]


class Answers:
    """All answers by cell, in the order of the file.

    Attributes:
        cells: (policy, ratio) -> question's id -> answer.
    """

    def __init__(self, cells: dict[Cell, dict[str, Answer]]) -> None:
        self.cells = cells

    @property
    def full(self) -> dict[str, Answer]:
        """The full cache's answers; empty where it was not measured."""
        return self.cells.get((FULL, 1.0), {})

    def share_of_full(self, cell: Cell, seed: int) -> Interval | None:
        """95 % interval of a cell's accuracy as a share of the full cache's, paired by clip.

        None where the cell has no answers or the full cache none that is right.
        """
        pairs = self._paired(cell)
        if not pairs or sum(full.score for full, _ in pairs) <= 0:
            return None
        scores = torch.tensor([compressed.score for _, compressed in pairs])
        reference = torch.tensor([full.score for full, _ in pairs])
        return bootstrap_ratio(scores, reference, torch.tensor([full.clip for full, _ in pairs]), seed=seed)

    def flips(self, cell: Cell) -> Flips:
        """The answers of a cell that are right where the full cache's are wrong, or the other way round."""
        found = [Flip(full, compressed) for full, compressed in self._paired(cell) if full.right != compressed.right]
        return Flips([flip for flip in found if flip.full.right], [flip for flip in found if flip.compressed.right])

    def _paired(self, cell: Cell) -> list[tuple[Answer, Answer]]:
        full = self.full
        return [(full[key], answer) for key, answer in self.cells.get(cell, {}).items() if key in full]


def read_answers(path: str | Path) -> Answers:
    """Read a `predictions.jsonl`.

    Raises:
        InputError: no such file, a line that is no JSON object, or a field that is missing or ill-valued.
    """
    path = Path(path)
    cells: dict[Cell, dict[str, Answer]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                cell, answer = _parsed(line, path, number)
                cells.setdefault(cell, {})[answer.id] = answer
    except FileNotFoundError as error:
        raise InputError("no such file", source=path) from error
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({error})", source=path) from error
    return Answers(cells)


_TEXTS = ("id", "video", "question", "answer", "prediction")


def _parsed(line: str, path: Path, number: int) -> tuple[Cell, Answer]:
    try:
        values: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not a JSON object ({error})", source=path, field=f"line {number}") from error
    if not isinstance(values, dict):
        raise InputError("not a JSON object", source=path, field=f"line {number}")
    kinds = {**dict.fromkeys((*_TEXTS, "policy"), str), **dict.fromkeys(("ratio", "score"), (int, float)), "clip": int}
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):  # type: ignore[arg-type]
            raise InputError(
                f"{values.get(name)!r} is missing or ill-valued", source=path, field=f"line {number}.{name}"
            )
    texts = {name: values[name] for name in _TEXTS}
    return (values["policy"], float(values["ratio"])), Answer(
        clip=values["clip"], score=float(values["score"]), **texts
    )
