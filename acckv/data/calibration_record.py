"""The data and ratios that an export was calibrated on, as its config.json and its card say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from acckv.data.records import Record
from acckv.io.typed import from_json

Objective = Literal["task", "general", "mixed"]
FIELD = "calibration"
"""Of config.json."""


def finest_group(record: Record) -> str:
    """The kind of a question: its finest group, or how it is scored where it has none."""
    return record.groups[-1] if record.groups else record.protocol


@dataclass(frozen=True)
class CalibrationRecord:
    """The data and the ratios of one calibration.

    Attributes:
        data: where the clips and questions came from, in words.
        clips: number of training clips.
        questions: number of training questions.
        kinds: kind of question -> number of training questions.
        calibrate_for: what was trained for: answers to the questions (task), whatever can be asked (general), or both.
        ratio_min, ratio_max: kept shares that were trained.
        steps: optimiser steps until the export.
    """

    data: str
    clips: int
    questions: int
    kinds: dict[str, int]
    ratio_min: float
    ratio_max: float
    steps: int
    calibrate_for: Objective = "task"

    @classmethod
    def of(
        cls,
        data: str,
        records: Sequence[Record],
        ratios: tuple[float, float],
        steps: int,
        kind: Callable[[Record], str] = finest_group,
        calibrate_for: Objective = "task",
    ) -> CalibrationRecord:
        """The record of a calibration.

        Args:
            records: the training questions; 'general' asks none of them.
            ratios: least and largest kept share trained.
            kind: of a question.
        """
        clips = len({record.clip for record in records})
        asked = [] if calibrate_for == "general" else records
        kinds = Counter(kind(record) for record in asked)
        return cls(data, clips, len(asked), dict(sorted(kinds.items())), *ratios, steps, calibrate_for)

    @classmethod
    def from_dict(cls, values: Any, source: str | Path = "config.json") -> CalibrationRecord | None:
        """The record in a config.json; None where it has none.

        Raises:
            InputError: a field is missing or ill-valued.
        """
        return None if values is None else from_json(cls, values, source, FIELD)
