"""`report.html`: one evaluation in one file that needs nothing else, `python -m acckv.report.html runs/eval`.

Made from the files in an evaluation's folder alone (`results.json`, `predictions.jsonl`; `report.json`,
`timelines.safetensors` and `failures.json` where they are there), so it can be made again without a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from acckv.benchmarks.judging import UNPARSED
from acckv.errors import InputError
from acckv.evaluation.results import (
    CALIBRATED,
    CONTROLS,
    FAILURES_FILE,
    FULL,
    PREDICTIONS_FILE,
    REFERENCE_NAMES,
    RESULTS_FILE,
    Failure,
    Results,
    Row,
    Setting,
    read_failures,
    read_predictions,
    read_results,
)
from acckv.evaluation.timeline import TIMELINES_FILE, Timeline, load_timelines
from acckv.io.files import whole_file
from acckv.metrics.intervals import Interval
from acckv.report import figures, timeline
from acckv.report.answers import Answers, Flip
from acckv.report.run_record import RECORD_FILE, Budget, RunRecord, read_run
from acckv.report.table import control_warning, metric_names

REPORT_FILE = "report.html"
MOST_FLIPS = 25
"""Flipped answers that are listed of one setting and direction; the rest is counted."""


def write_html(folder: str | Path) -> Path:
    """Write `report.html` into the folder of an evaluation; returns its path.

    Raises:
        InputError: results.json or predictions.jsonl is missing, or a file is not whole.
    """
    folder = Path(folder)
    results = read_results(folder / RESULTS_FILE)
    answers = Answers(read_predictions(folder / PREDICTIONS_FILE))
    run = read_run(folder / RECORD_FILE) if (folder / RECORD_FILE).exists() else None
    timelines = load_timelines(folder / TIMELINES_FILE) if (folder / TIMELINES_FILE).exists() else []
    text = render_html(results, answers, run, timelines, read_failures(folder / FAILURES_FILE))
    with whole_file(folder / REPORT_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / REPORT_FILE


def render_html(
    results: Results,
    answers: Answers,
    run: RunRecord | None,
    timelines: Sequence[Timeline],
    failures: Sequence[Failure] = (),
) -> str:
    """The report as HTML; everything that was read is escaped.

    Args:
        run: None leaves out the command, the versions and the budgets.
        failures: broken clips.
    """
    environment = Environment(
        loader=PackageLoader("acckv.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters |= {"percent": _percent, "bytes": lambda size: f"{size:,}"}
    shown = shown_policy(results)
    shares = {row.setting: answers.share_of_full(row.setting, results.seed) for row in results.rows}
    intervals = {setting: interval for setting, interval in shares.items() if interval is not None}
    return environment.get_template("report.html.jinja").render(
        results=results,
        shown=shown,
        run=run,
        failures=failures,
        warning=control_warning(results),
        names=REFERENCE_NAMES,
        clips=len({answer.clip for answer in answers.full.values()}),
        rows=[_line(row, intervals.get(row.setting)) for row in results.rows],
        headline=_headline(results, shown, intervals),
        pareto=_pareto(results, intervals),
        controls=[row for row in results.rows if row.policy == FULL or row.policy in CONTROLS],
        groups=_groups(results),
        metrics=_metrics(results),
        budgets=_budgets(run, shown),
        flips=_flips(results, answers),
        flipped=_flipped(results, answers, shown),
        most=MOST_FLIPS,
        timelines=[_timeline(each) for each in timelines],
    )


def shown_policy(results: Results) -> str | None:
    """The policy that a report is about: the calibrated one, else the most accurate that looks at the entries."""
    names = results.policies
    if CALIBRATED in names or not names:
        return CALIBRATED if names else None

    def accuracy(name: str) -> float:
        rows = [row.accuracy for row in results.rows if row.policy == name and 0 < row.ratio < 1]
        return sum(rows) / len(rows) if rows else 0.0

    return max([name for name in names if name != "random"] or names, key=accuracy)


# ------------------------------------------------------------------ parts


@dataclass(frozen=True)
class Line:
    """A row of the table with the interval of its share of the full cache."""

    row: Row
    name: str
    interval: Interval | None


def _line(row: Row, interval: Interval | None) -> Line:
    return Line(row, REFERENCE_NAMES.get(row.policy, row.policy), interval)


def _headline(
    results: Results, shown: str | None, intervals: Mapping[Setting, Interval]
) -> list[tuple[Line, Row | None]]:
    """The shown policy's rows between 0 and 1, each with the best training-free row at its ratio.

    None where the full cache got nothing right, so that there is nothing to keep.
    """
    found: list[tuple[Line, Row | None]] = []
    for row in results.rows:
        if row.policy == shown and 0 < row.ratio < 1 and row.relative is not None:
            others = [r for r in results.rows if r.ratio == row.ratio and r.policy not in (shown, *REFERENCE_NAMES)]
            best = max(others, key=lambda other: other.accuracy, default=None)
            found.append((_line(row, intervals.get(row.setting)), best))
    return found


def _pareto(results: Results, intervals: Mapping[Setting, Interval]) -> list[Markup]:
    if not results.policies or results.full is None or results.full.accuracy <= 0:
        return []
    pictures = []
    for by_bytes, over in ((False, "the kept share of entries"), (True, "the bytes of keys and values")):
        alt = (
            f"Accuracy in % of the full cache's over {over}, a line a policy with 95 % intervals; controls are "
            "horizontal lines. All numbers are in the table below."
        )
        pictures.append(figures.inline_svg(figures.pareto(results, intervals, by_bytes), alt))
    return pictures


def _groups(results: Results) -> list[tuple[str, list[Row], list[tuple[str, int, list[float | None]]]]]:
    """Tables of accuracy by group: title, columns, and rows of name, questions and accuracies."""
    tables = []
    for ratio, columns in results.by_ratio():
        lines = []
        for name in dict.fromkeys(name for row in columns for name in row.groups if name != UNPARSED):
            scores = [row.groups.get(name) for row in columns]
            count = max(score.n for score in scores if score is not None)
            lines.append((name, count, [None if score is None else score.accuracy for score in scores]))
        tables.append((f"ratio {ratio:g}", columns, lines))
    return tables


def _metrics(results: Results) -> list[tuple[str, list[Row], list[tuple[str, list[float | None]]]]]:
    """Tables of scores of all answers together: title, columns, and rows of name and values."""
    tables = []
    for ratio, columns in results.by_ratio() or [(1.0, results.references)]:
        lines = [(name, [row.metrics.get(name) for row in columns]) for name in metric_names(columns)]
        if lines:
            tables.append((f"ratio {ratio:g}", columns, lines))
    return tables


def _budgets(run: RunRecord | None, shown: str | None) -> list[dict[str, Any]]:
    """Heat tables, the shown policy's first: of each layer the kept share of video and audio at every ratio."""
    if run is None:
        return []
    by_policy: dict[str, list[Budget]] = {}
    for budget in run.budgets:
        by_policy.setdefault(budget.policy, []).append(budget)
    tables = []
    for policy in sorted(by_policy, key=lambda name: name != shown):
        columns = by_policy[policy]
        shares = [
            [[kept / full if full else None for kept, full in zip(layer, run.full, strict=True)] for layer in b.kept]
            for b in columns
        ]
        tops = [max((s for layer in column for s in layer if s is not None), default=0) or 1 for column in shares]
        layers = [
            [
                [(s, 0 if s is None else round(100 * s / top)) for s in column[layer]]
                for column, top in zip(shares, tops, strict=True)
            ]
            for layer in range(len(shares[0]))
        ]
        tables.append(
            {"policy": policy, "ratios": [b.ratio for b in columns], "layers": layers, "open": policy == shown}
        )
    return tables


def _flips(results: Results, answers: Answers) -> list[tuple[Row, int, int]]:
    """Of every row but the full cache's: answers lost and won."""
    found = []
    for row in results.rows:
        if row.policy != FULL:
            flips = answers.flips(row.setting)
            found.append((row, len(flips.lost), len(flips.won)))
    return found


def _flipped(results: Results, answers: Answers, shown: str | None) -> list[tuple[Row, str, int, list[Flip]]]:
    """Tables of the shown policy's flipped answers: row, direction, how many there are, and the first of them."""
    found = []
    for row in results.rows:
        if row.policy != shown or not 0 < row.ratio < 1:
            continue
        flips = answers.flips(row.setting)
        for direction, members in (("lost", flips.lost), ("won", flips.won)):
            if members:
                found.append((row, direction, len(members), members[:MOST_FLIPS]))
    return found


def _timeline(clip: Timeline) -> dict[str, Any]:
    """A timeline as it is drawn; the settings of the ratio nearest to 0.1 are unfolded."""
    nearest = min((kept.ratio for kept in clip.kept), key=lambda ratio: abs(ratio - 0.1), default=None)
    drawn = [
        {
            "kept": kept,
            "open": kept.ratio == nearest,
            "left": timeline.frames_left(clip, kept),
            "modalities": timeline.modality_timelines(clip, kept),
            "times": timeline.over_time(clip, kept),
        }
        for kept in clip.kept
    ]
    marks = [(f"{100 * i / 4:g}", f"{clip.seconds * i / 4:.3g}") for i in range(5)]
    pictures = {"frames": timeline.frames(clip), "wave": timeline.wave(clip)}
    return {"timeline": clip, **pictures, "marks": marks, "drawn": drawn}


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m acckv.report.html",
        description="Write report.html from the files that evaluate.py left in a folder. No model is needed.",
    )
    parser.add_argument("folder", type=Path, help="output folder of evaluate.py, such as runs/eval")
    options = parser.parse_args(arguments)
    try:
        print(f"Report: {write_html(options.folder)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
