"""`results.json` (format 1) and `predictions.jsonl`: written whole or not at all, checked when read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from acckv.errors import InputError
from acckv.io.files import whole_file

RESULTS_FORMAT = 1
RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.jsonl"
CONTROL = "control"
"""Policy name of the row with every audio and video entry evicted."""
AUDIO_EVICTED, VIDEO_EVICTED = "control_audio_evicted", "control_video_evicted"
"""Policy names of the rows with all entries of one modality evicted and all of the other kept."""
CONTROLS = (CONTROL, AUDIO_EVICTED, VIDEO_EVICTED)
FULL = "full"
REFERENCE_NAMES = {
    FULL: "full cache",
    CONTROL: "every entry evicted (control)",
    AUDIO_EVICTED: "audio evicted (control)",
    VIDEO_EVICTED: "video evicted (control)",
}
"""What tables for readers call the rows that are no compression."""


@dataclass(frozen=True)
class GroupScore:
    """Mean item score (0..1) over the `n` questions of one group; None for a group without questions."""

    n: int
    accuracy: float | None


@dataclass(frozen=True)
class Row:
    """One policy at one ratio.

    Attributes:
        policy: a policy's name, "acckv-calibrated", or one of `CONTROLS`.
        ratio: kept share of the audio and video entries, 0..1; 0 for every control, the kept modality not counted.
        n: questions.
        accuracy: mean item score, 0..1.
        relative: accuracy as a share of the full cache's on the same questions; None where that is 0.
        ci95: interval of `accuracy`; clips are drawn with replacement.
        kept_entries: audio and video entries held, merged ones included; mean over layers and clips.
        full_entries: audio and video entries before compression; mean over clips.
        kv_bytes: bytes of keys and values held for a clip, text entries included, over all layers; mean over clips.
        groups: score of each question group.
        standard_error: of `accuracy`, clustered by video; None where there is only one video.
        metrics: scores of all answers together, such as BLEU-4; None where a score is not defined.
        cut: answers that the limit of tokens ended.
    """

    policy: str
    ratio: float
    n: int
    accuracy: float
    relative: float | None
    ci95: tuple[float, float]
    kept_entries: float
    full_entries: float
    kv_bytes: int
    groups: dict[str, GroupScore] = field(default_factory=dict)
    standard_error: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    cut: int = 0


@dataclass(frozen=True)
class Results:
    """One evaluation: every policy at every ratio on the same questions.

    Attributes:
        model: name, path or hub id of the base model.
        benchmark: what was asked, e.g. "generated-clips/test".
        when: "context" or "prompt".
        seed: of the evaluation.
        rows: in the order of the table.
        score: parser that the accuracies are by, "official" or "robust".
        clips: that were asked about.
        failed_clips, failed_questions: clips that could not be read and their questions, which no accuracy counts.
    """

    model: str
    benchmark: str
    when: str
    seed: int
    rows: list[Row]
    score: str = "robust"
    clips: int = 0
    failed_clips: int = 0
    failed_questions: int = 0

    def row(self, policy: str, ratio: float) -> Row | None:
        """The row of a policy at a ratio, None if it was not measured."""
        return next((row for row in self.rows if row.policy == policy and row.ratio == ratio), None)

    @property
    def references(self) -> list[Row]:
        """The rows that are no compression: the full cache and the controls."""
        return [row for row in self.rows if row.policy in REFERENCE_NAMES]

    def by_ratio(self) -> list[tuple[float, list[Row]]]:
        """For each ratio between 0 and 1 the references and all policies at it, as columns of a table."""
        others = [row for row in self.rows if row.policy not in REFERENCE_NAMES]
        ratios = dict.fromkeys(row.ratio for row in others if 0 < row.ratio < 1)
        return [(ratio, [*self.references, *(row for row in others if row.ratio == ratio)]) for ratio in ratios]

    @property
    def full(self) -> Row | None:
        """The row of the full cache."""
        return self.row(FULL, 1.0)

    @property
    def control(self) -> Row | None:
        """The row with every audio and video entry evicted."""
        return self.row(CONTROL, 0.0)


def write_results(path: str | Path, results: Results) -> None:
    """Write `results` as `results.json`, format 1.

    Raises:
        ValueError: a number that JSON cannot hold (nan or infinite).
    """
    values = {"format": RESULTS_FORMAT, **asdict(results)}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_results(path: str | Path) -> Results:
    """Read a `results.json`.

    Raises:
        InputError: no such file, no JSON, an unknown format, or a field that is missing or ill-valued.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("no such file", source=path) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not a whole JSON file ({error})", source=path) from error
    top = _Fields(values, path, "")
    if top.number("format") != RESULTS_FORMAT:
        raise InputError(
            f"unknown format {values['format']!r}; this version reads format 1", source=path, field="format"
        )
    when = top.text("when")
    if when not in ("context", "prompt"):
        raise InputError(f"{when!r} is neither 'context' nor 'prompt'", source=path, field="when")
    rows = [parse_row(row, path, i) for i, row in enumerate(top.items("rows"))]
    added: dict[str, Any] = {
        name: int(top.number(name, 0)) for name in ("clips", "failed_clips", "failed_questions") if name in values
    }
    if "score" in values:
        added["score"] = top.text("score")
    return Results(top.text("model"), top.text("benchmark"), when, int(top.number("seed")), rows, **added)


def write_predictions(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def parse_row(values: Any, source: str | Path, index: int) -> Row:
    """The row of a parsed `results.json` entry.

    Args:
        values: the entry.
        source, index: the file and the place of the row in it, for messages.

    Raises:
        InputError: a field is missing or ill-valued.
    """
    row = _Fields(values, source, f"rows[{index}].")
    bounds = row.items("ci95")
    if len(bounds) != 2 or not all(isinstance(b, (int, float)) and not isinstance(b, bool) for b in bounds):
        raise row.error("ci95", "expected [low, high]")
    groups: dict[str, GroupScore] = {}
    named = _Fields(row.take("groups"), row.source, f"{row.prefix}groups.")
    for name, score in named.values.items():
        group = _Fields(score, row.source, f"{named.prefix}{name}.")
        groups[name] = GroupScore(int(group.number("n", 0)), group.optional("accuracy", 0, 1))
    metrics = _Fields(row.values.get("metrics", {}), row.source, f"{row.prefix}metrics.")  # older files have none
    return Row(
        policy=row.text("policy"),
        ratio=row.number("ratio", 0, 1),
        n=int(row.number("n", 0)),
        accuracy=row.number("accuracy", 0, 1),
        relative=row.optional("relative", 0, math.inf),
        ci95=(bounds[0], bounds[1]),
        kept_entries=row.number("kept_entries", 0),
        full_entries=row.number("full_entries", 0),
        kv_bytes=int(row.number("kv_bytes", 0)),
        groups=groups,
        standard_error=row.optional("standard_error", 0, math.inf) if "standard_error" in row.values else None,
        metrics={name: metrics.optional(name, 0, math.inf) for name in metrics.values},
        cut=int(row.number("cut", 0)) if "cut" in row.values else 0,
    )


class _Fields:
    """A parsed JSON object whose fields are checked as they are taken."""

    def __init__(self, values: Any, source: str | Path, prefix: str) -> None:
        if not isinstance(values, dict):
            raise InputError("expected an object", source=source, field=prefix.rstrip(".") or None)
        self.values, self.source, self.prefix = values, source, prefix

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(name, f"{value!r} is not a number from {low:g} to {high:g}")
        return value

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise self.error(name, f"{value!r} is not a text")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list):
            raise self.error(name, "expected a list")
        return value

    def optional(self, name: str, low: float, high: float) -> float | None:
        return None if self.take(name) is None else self.number(name, low, high)

    def take(self, name: str) -> Any:
        if name not in self.values:
            raise self.error(name, "missing")
        return self.values[name]

    def error(self, name: str, message: str) -> InputError:
        return InputError(message, source=self.source, field=f"{self.prefix}{name}")
