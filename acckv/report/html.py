"""`report.html`: one evaluation in one file that needs nothing else, `python -m acckv.report.html runs/eval`.

Made from the files in an evaluation's folder alone (`results.json`, `predictions.jsonl`; `report.json`,
`timelines.safetensors` and `failures.json` where they are there), so it can be made again without a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from acckv.errors import InputError
from acckv.evaluation.results import (
    FAILURES_FILE,
    FULL,
    PREDICTIONS_FILE,
    REFERENCE_NAMES,
    RESULTS_FILE,
    Results,
    Row,
    Setting,
    is_calibrated,
    read_failures,
    read_predictions,
    read_results,
)
from acckv.evaluation.timeline import TIMELINES_FILE, Timeline, load_timelines
from acckv.io.files import write_text
from acckv.metrics.intervals import Interval
from acckv.report import timeline
from acckv.report.answers import Answers
from acckv.report.plots import inline_svg, pareto
from acckv.report.rendering import render
from acckv.report.run_record import RECORD_FILE, RunRecord, read_run
from acckv.report.table import all_warnings, group_scores, metric_scores

REPORT_FILE = "report.html"
MOST_FLIPS = 25
"""Flipped answers that are listed of one setting and direction; the rest is counted."""
Heat = list[list[tuple[float | None, int]]]
"""Of each layer the kept share of its video and of its audio entries, each also in % of the largest at that ratio."""


def write_html(folder: str | Path) -> Path:
    """Write `report.html` into the folder of an evaluation; returns its path. Everything that was read is escaped.

    Raises:
        InputError: results.json or predictions.jsonl is missing, or a file is not whole.
    """
    folder = Path(folder)
    results = read_results(folder / RESULTS_FILE)
    answers = Answers(read_predictions(folder / PREDICTIONS_FILE))
    run = read_run(folder / RECORD_FILE) if (folder / RECORD_FILE).exists() else None
    timelines = load_timelines(folder / TIMELINES_FILE) if (folder / TIMELINES_FILE).exists() else []
    shown = shown_policy(results)
    shares = {row.setting: answers.share_of_full(row.setting, results.seed) for row in results.rows}
    intervals = {setting: interval for setting, interval in shares.items() if interval is not None}
    flips = [(row, answers.flips(row.setting)) for row in results.rows if row.policy != FULL]
    text = render(
        "report.html.jinja",
        results=results,
        shown=shown,
        run=run,
        failures=read_failures(folder / FAILURES_FILE),
        warnings=all_warnings(results),
        names=REFERENCE_NAMES,
        clips=len({answer.clip for answer in answers.full.values()}),
        intervals=intervals,
        headline=_headline(results, shown),
        pareto=_pareto(results, intervals),
        groups=group_scores(results),
        metrics=metric_scores(results),
        budgets=_budgets(run, shown),
        flips=flips,
        flipped=[
            (row, direction, members)
            for row, flipped in flips
            if row.policy == shown and row.setting.compresses
            for direction, members in (("lost", flipped.lost), ("won", flipped.won))
            if members
        ],
        most=MOST_FLIPS,
        timelines=[_timeline(each) for each in timelines],
    )
    write_text(folder / REPORT_FILE, text)
    return folder / REPORT_FILE


def shown_policy(results: Results) -> str | None:
    """The policy that a report is about: the calibrated one, else the most accurate that looks at the entries."""
    names = results.policies
    calibrated = [name for name in names if is_calibrated(name)]
    if calibrated or not names:
        return calibrated[0] if names else None

    def accuracy(name: str) -> float:
        rows = [row.accuracy for row in results.rows if row.policy == name and row.setting.compresses]
        return sum(rows) / len(rows) if rows else 0.0

    return max([name for name in names if name != "random"] or names, key=accuracy)


# ------------------------------------------------------------------ parts


def _headline(results: Results, shown: str | None) -> list[tuple[Row, Row | None]]:
    """The shown policy's rows between 0 and 1, each with the best other row at its ratio.

    None where the full cache got nothing right, so that there is nothing to keep.
    """
    own = [row for row in results.rows if row.policy == shown and row.setting.compresses and row.relative is not None]
    return [(row, results.best_other(row)) for row in own]


def _pareto(results: Results, intervals: Mapping[Setting, Interval]) -> list[Markup]:
    if not results.policies or results.full is None or results.full.accuracy <= 0:
        return []
    pictures = []
    for by_bytes, over in ((False, "the kept share of entries"), (True, "the bytes of keys and values")):
        alt = (
            f"Accuracy in % of the full cache's over {over}, a line a policy with 95 % intervals; controls are "
            "horizontal lines. All numbers are in the table below."
        )
        pictures.append(inline_svg(pareto(results, intervals, by_bytes), alt))
    return pictures


def _budgets(run: RunRecord | None, shown: str | None) -> list[tuple[str, list[tuple[float, Heat]]]]:
    """The heat of every ratio by policy, the shown one first."""
    tables: dict[str, list[tuple[float, Heat]]] = {}
    if run is None:
        return []
    for budget in run.budgets:
        shares = [[kept / of if of else None for kept, of in zip(pair, run.full, strict=True)] for pair in budget.kept]
        top = max((share for layer in shares for share in layer if share is not None), default=0) or 1
        layers = [[(share, round(100 * (share or 0) / top)) for share in layer] for layer in shares]
        tables.setdefault(budget.policy, []).append((budget.ratio, layers))
    return sorted(tables.items(), key=lambda table: table[0] != shown)


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
