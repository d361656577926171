"""The record of a run beside its results (`report.json`): the command, the versions, the budgets by layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from acckv.errors import InputError
from acckv.io.files import whole_file
from acckv.io.json_files import read_json
from acckv.io.typed import from_json

RECORD_FILE = "report.json"
_FORMAT = 1


@dataclass(frozen=True)
class Budget:
    """The entries that one setting's budget went to.

    Attributes:
        policy, ratio: of the setting.
        kept: [layers][2] video and audio entries that each layer kept, mean over clips, merged ones included.
    """

    policy: str
    ratio: float
    kept: list[tuple[float, float]]


@dataclass(frozen=True)
class RunRecord:
    """One evaluation.

    Attributes:
        command: as it was typed, None where there was none.
        versions: of Python and the packages that numbers depend on; "commit" where acckv runs from a git checkout.
        full: video and audio entries before compression, mean over clips.
        budgets: of every setting with a ratio between 0 and 1.
    """

    command: str | None
    versions: dict[str, str]
    full: tuple[float, float]
    budgets: list[Budget] = field(default_factory=list)


def write_run(path: str | Path, run: RunRecord) -> None:
    """Write `report.json`."""
    with whole_file(path) as temporary:
        text = json.dumps({"format": _FORMAT, **asdict(run)}, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_run(path: str | Path) -> RunRecord:
    """Read `report.json`.

    Raises:
        InputError: no such file, an unknown format, or a field that is missing or ill-valued.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise InputError(f"is not of format {_FORMAT}, which this version reads", source=path, field="format")
    return from_json(RunRecord, values, path)
