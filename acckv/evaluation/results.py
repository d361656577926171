"""`results.json` (format 1) and `predictions.jsonl`: written whole or not at all, checked when read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from acckv.data.asked_questions import Coverage
from acckv.io.files import write_text
from acckv.io.json_files import read_json, read_json_lines, write_json
from acckv.io.typed import Amount, Count, Share, from_json, read_versioned, write_versioned
from acckv.policies.acckv import CalibratedAccKV

RESULTS_FORMAT = 1
RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.jsonl"
FAILURES_FILE = "failures.json"
RIGHT = 0.5
"""Least score of a right answer."""
CONTROL = "control"
"""Policy name of the row with every audio and video entry evicted."""
AUDIO_EVICTED, VIDEO_EVICTED = "control_audio_evicted", "control_video_evicted"
"""Policy names of the rows with all entries of one modality evicted and all of the other kept."""
CONTROLS = (CONTROL, AUDIO_EVICTED, VIDEO_EVICTED)
FULL = "full"
CALIBRATED = CalibratedAccKV.name
"""Policy name of an export's rows."""
REFERENCE_NAMES = {
    FULL: "full cache",
    CONTROL: "every entry evicted (control)",
    AUDIO_EVICTED: "audio evicted (control)",
    VIDEO_EVICTED: "video evicted (control)",
}
"""Names, in tables for readers, of the rows that are no compression."""


def with_heads(policy: str, head_budgets: str) -> str:
    """The name of a policy's rows, which names the budgets of the KV heads where they are not equal."""
    if head_budgets == "equal":
        return policy
    options = f"{policy[:-1]}, " if policy.endswith(")") else f"{policy}("
    return f"{options}head_budgets={head_budgets})"


def is_calibrated(policy: str) -> bool:
    """Whether a name is that of an export's rows."""
    return policy.partition("(")[0] == CALIBRATED


class Setting(NamedTuple):
    """A policy at a ratio: one row of the table."""

    policy: str
    ratio: float

    @property
    def compresses(self) -> bool:
        """Whether it keeps a part of the audio and video entries: neither a reference nor ratio 0 or 1."""
        return 0 < self.ratio < 1

    def __str__(self) -> str:
        return f"{self.policy} at {self.ratio:g}"


@dataclass(frozen=True)
class Answer:
    """One setting's answer to one question: a line of `predictions.jsonl`, judged when it was given.

    Attributes:
        policy, ratio: of the setting.
        id: of the question; clip: number of its clip; video: file name of the clip.
        protocol, groups: of the question, see :class:`acckv.data.records.Record`.
        question, answer, prediction: asked, right, given.
        cut: whether the limit of tokens ended the answer.
        score: 0..1, accuracies are means of it.
        official, robust: the score by either parser; None where there is no such parser, or it leaves the answer out.
        parsed: whether the parser that gives `score` found an answer.
    """

    policy: str
    ratio: Share
    id: str
    clip: Count
    video: str
    protocol: str
    groups: list[str]
    question: str
    answer: str
    prediction: str
    cut: bool
    score: Share
    official: Share | None
    robust: Share | None
    parsed: bool

    @property
    def setting(self) -> Setting:
        return Setting(self.policy, self.ratio)

    @property
    def right(self) -> bool:
        """Whether it counts as right where an answer is right or wrong; one-word answers score 0 or 1."""
        return self.score >= RIGHT


@dataclass(frozen=True)
class Failure:
    """A clip that could not be read, and why."""

    clip: str
    error: str


@dataclass(frozen=True)
class GroupScore:
    """Mean item score (0..1) over the `n` questions of one group; None for a group without questions."""

    n: Count
    accuracy: Share | None


@dataclass(frozen=True)
class Row:
    """One policy at one ratio.

    Attributes:
        policy: a policy's name with options that are not the defaults, "acckv-calibrated", or one of `CONTROLS`.
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
    ratio: Share
    n: Count
    accuracy: Share
    relative: Amount | None
    ci95: tuple[float, float]
    kept_entries: Amount
    full_entries: Amount
    kv_bytes: Count
    groups: dict[str, GroupScore] = field(default_factory=dict)
    standard_error: Amount | None = None
    metrics: dict[str, Amount | None] = field(default_factory=dict)
    cut: Count = 0

    @property
    def setting(self) -> Setting:
        return Setting(self.policy, self.ratio)


@dataclass(frozen=True)
class Results:
    """One evaluation: every policy at every ratio on the same questions.

    Attributes:
        model: name, path or hub id of the base model.
        benchmark: name of the questions, e.g. "generated-clips/test".
        when: "context" or "prompt".
        seed: of the evaluation.
        rows: in the order of the table.
        score: parser that the accuracies are by, "official" or "robust".
        clips: that were asked about.
        failed_clips, failed_questions: clips that could not be read and their questions, which no accuracy counts.
        coverage: how many of the questions the export was not calibrated for; None without an export, or where it does
            not say what its calibration asked.
    """

    model: str
    benchmark: str
    when: Literal["context", "prompt"]
    seed: int
    rows: list[Row]
    score: str = "robust"
    clips: int = 0
    failed_clips: int = 0
    failed_questions: int = 0
    coverage: Coverage | None = None

    def row(self, policy: str, ratio: float) -> Row | None:
        """The row of a policy at a ratio, None if it was not measured."""
        return next((row for row in self.rows if row.setting == (policy, ratio)), None)

    @property
    def policies(self) -> list[str]:
        """The policies that compress, in the order of the rows."""
        return list(dict.fromkeys(row.policy for row in self.rows if row.policy not in REFERENCE_NAMES))

    @property
    def references(self) -> list[Row]:
        """The rows that are no compression: the full cache and the controls."""
        return [row for row in self.rows if row.policy in REFERENCE_NAMES]

    def best_other(self, row: Row, *left_out: str) -> Row | None:
        """The most accurate of the other policies at a row's ratio, some policies left out."""
        ignored = (row.policy, *REFERENCE_NAMES, *left_out)
        others = [other for other in self.rows if other.ratio == row.ratio and other.policy not in ignored]
        return max(others, key=lambda other: other.accuracy, default=None)

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
    write_versioned(path, results, RESULTS_FORMAT, indent=1, ensure_ascii=True)


def read_results(path: str | Path) -> Results:
    """Read a `results.json`.

    Raises:
        InputError: no such file, no JSON, an unknown format, or a field that is missing or ill-valued.
    """
    return read_versioned(Results, path, RESULTS_FORMAT)


def write_predictions(path: str | Path, answers: Iterable[Answer]) -> None:
    """Write `predictions.jsonl`: one answer a line."""
    lines = (json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) + "\n" for answer in answers)
    write_text(path, "".join(lines))


def read_predictions(path: str | Path) -> Iterator[Answer]:
    """The answers of a `predictions.jsonl`.

    Raises:
        InputError: no such file, a line that is no JSON object, or a field that is missing or ill-valued.
    """
    for number, values in read_json_lines(path):
        yield from_json(Answer, values, path, f"line {number}")


def write_failures(path: str | Path, failures: Iterable[Failure]) -> None:
    """Write `failures.json`."""
    write_json(path, [asdict(failure) for failure in failures], indent=1)


def read_failures(path: str | Path) -> list[Failure]:
    """The broken clips of an evaluation; none where there is no such file.

    Raises:
        InputError: the file is not a list of clips with their errors.
    """
    return from_json(list[Failure], read_json(path), path) if Path(path).exists() else []
