"""What a report says besides the results (`report.json`): the command, the versions, where the budgets went."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import acckv
from acckv.errors import InputError
from acckv.io.files import whole_file

RUN_FILE = "report.json"
FAILURES_FILE = "failures.json"
_FORMAT = 1


@dataclass(frozen=True)
class Budget:
    """Where one cell's budget went.

    Attributes:
        policy, ratio: of the cell.
        kept: [layers][2] video and audio entries that each layer kept, mean over clips, merged ones included.
    """

    policy: str
    ratio: float
    kept: list[list[float]]


@dataclass(frozen=True)
class RunRecord:
    """One evaluation.

    Attributes:
        command: as it was typed, None where there was none.
        versions: of Python and the packages that numbers depend on; "commit" where acckv runs from a git checkout.
        full: video and audio entries before compression, mean over clips.
        budgets: of every cell with a ratio between 0 and 1.
    """

    command: str | None
    versions: dict[str, str]
    full: list[float]
    budgets: list[Budget] = field(default_factory=list)


@dataclass(frozen=True)
class Failure:
    """A clip that could not be read, and why."""

    clip: str
    error: str


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    found = {"python": platform.python_version(), "acckv": acckv.__version__}
    commit = _commit(Path(acckv.__file__).resolve().parent)
    if commit is not None:
        found["commit"] = commit
    return found | {name: version(name) for name in ("torch", "transformers", "lightning", "peft")}


def _commit(folder: Path) -> str | None:
    """Commit of the checkout that holds `folder`, with "+changes" where tracked files differ; None outside of one."""
    if not (folder.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):  # no git here: the version alone has to do
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit


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
    values = _json(Path(path))
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise InputError(f"is not of format {_FORMAT}, which this version reads", source=path, field="format")
    try:
        command = None if values["command"] is None else str(values["command"])
        stated = {str(name): str(value) for name, value in values["versions"].items()}
        budgets = [Budget(str(b["policy"]), float(b["ratio"]), _pairs(b["kept"])) for b in values["budgets"]]
        return RunRecord(command, stated, _pairs([values["full"]])[0], budgets)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"a field is missing or ill-valued ({error})", source=path) from error


def read_failures(path: str | Path) -> list[Failure]:
    """The broken clips that an evaluation lists in `failures.json`; none where there is no such file.

    Raises:
        InputError: the file is not a list of clips with their errors.
    """
    if not Path(path).exists():
        return []
    values = _json(Path(path))
    try:
        return [Failure(str(item["clip"]), str(item["error"])) for item in values]
    except (KeyError, TypeError) as error:
        raise InputError("not a list of {clip, error}", source=path) from error


def _pairs(values: Any) -> list[list[float]]:
    pairs = [[float(value) for value in pair] for pair in values]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("expected [video, audio]")
    return pairs


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("no such file", source=path) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not a whole JSON file ({error})", source=path) from error
