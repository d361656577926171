"""The record of a run beside its results (`report.json`): the command, the versions, the budgets by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from acckv.io.typed import read_versioned, write_versioned

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
    write_versioned(path, run, _FORMAT)


def read_run(path: str | Path) -> RunRecord:
    """Read `report.json`; raises InputError as :func:`read_versioned`."""
    return read_versioned(RunRecord, path, _FORMAT)
