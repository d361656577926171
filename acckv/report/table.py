"""The tables of an evaluation, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from acckv.benchmarks.corpus import CIDER
from acckv.benchmarks.judging import UNPARSED
from acckv.evaluation.results import (
    AUDIO_EVICTED,
    CONTROL,
    CONTROLS,
    FAILURES_FILE,
    FULL,
    VIDEO_EVICTED,
    Results,
    Row,
    Setting,
    is_calibrated,
)
from acckv.evaluation.scores import Outcome

_SHOWN = 5  # broken clips that are named below the tables
_TABLE_WIDTH = 120  # the group tables need this much; a narrower terminal wraps them


def print_tables(console: Console, outcome: Outcome) -> None:
    """Accuracy by question group, the table of all rows, and what is to be known about it."""
    console = console if console.width >= _TABLE_WIDTH else Console(file=console.file, width=_TABLE_WIDTH)
    results = outcome.results
    for table in render_group_tables(results):
        console.print(table)
    console.print(render_table(results, outcome.relative_intervals))
    for table in render_metric_tables(results):
        console.print(table)
    for line in [*_leads(outcome), *_parsing(outcome), *_cut(outcome), *_left_out(outcome)]:
        console.print(line, highlight=False)
    for line in _failures(outcome):
        console.print(line, style="bold red", highlight=False, soft_wrap=True)
    for warning in all_warnings(results):
        console.print(warning, style="bold red", markup=False, highlight=False, soft_wrap=True)


def all_warnings(results: Results) -> list[str]:
    """Whatever makes numbers say less than they seem to: a benchmark that needs no cache, questions outside those that
    the export was calibrated for."""
    outside = results.coverage.warning if results.coverage is not None else None
    return [warning for warning in (control_warning(results), outside) if warning is not None]


def _leads(outcome: Outcome) -> list[str]:
    """The calibrated compressor against the best training-free policy at each ratio, paired by clip."""
    lines, results = [], outcome.results
    calibrated = [name for name in results.policies if is_calibrated(name)]
    for row in results.rows:
        best = results.best_other(row, *calibrated)
        if row.policy in calibrated and row.setting.compresses and best is not None:
            difference, (low, high) = outcome.scores[row.setting].against(outcome.scores[best.setting])
            lines.append(
                f"ratio {row.ratio:g}: {row.policy} against {best.policy}, the best training-free policy: "
                f"{100 * difference:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
            )
    return lines


def _parsing(outcome: Outcome) -> list[str]:
    """The largest share of answers that the parser could make nothing of."""
    asked = next(iter(outcome.config.judge.parsers))
    shares = {
        str(row.setting): row.groups[UNPARSED].n / row.groups[asked].n
        for row in outcome.results.rows
        if UNPARSED in row.groups and row.groups[asked].n
    }
    if not shares:
        return []
    most = max(shares, key=lambda name: shares[name])
    what = "answers without a known word" if outcome.config.benchmark is None else "answers that could not be parsed"
    return [f"{what} (counted as wrong): most {shares[most]:.1%}, {most}"]


def _cut(outcome: Outcome) -> list[str]:
    """The largest share of answers that the limit of tokens ended."""
    rows = [row for row in outcome.results.rows if row.n]
    most = max(rows, key=lambda row: row.cut / row.n, default=None)
    if most is None or not most.cut:
        return []
    share, options = f"{most.cut / most.n:.1%}, {most.setting}", "--word_tokens, --description_tokens"
    return [f"answers that the limit of tokens ended ({options}): most {share}; in predictions.jsonl they are cut"]


def _left_out(outcome: Outcome) -> list[str]:
    """A line where CIDEr is missing beside the other scores of captions."""
    row = outcome.results.rows[0]
    missing = "BLEU-4" in row.metrics and CIDER not in row.metrics
    return [f"{CIDER} is left out: it needs pip install 'acckv[captions]'"] if missing else []


def _failures(outcome: Outcome) -> list[str]:
    results, failures = outcome.results, outcome.failures
    if not failures:
        return []
    lines = [
        f"{results.failed_clips} of {results.failed_clips + results.clips} clips could not be read; their "
        f"{results.failed_questions} questions are in no accuracy ({FAILURES_FILE}, --strict true makes it an error):"
    ]
    lines += [f"  {failure.error}" for failure in failures[:_SHOWN]]
    return lines + ([f"  and {len(failures) - _SHOWN} more"] if len(failures) > _SHOWN else [])


def control_warning(results: Results) -> str | None:
    """A sentence if evicting every audio and video entry hardly hurts, None if the benchmark can tell.

    The control counts as far below full when its accuracy is at most three quarters of full's and the two 95 %
    intervals do not touch. Where it is not, an answer can be right without the media, or (`when: prompt`) its first
    token was computed before the compression.
    """
    full, control = results.full, results.control
    if full is None or control is None:
        return "warning: without the rows of the full cache and of the control, accuracies say nothing about the cache"
    if control.accuracy <= 0.75 * full.accuracy and control.ci95[1] < full.ci95[0]:
        return None
    why = " (when: prompt computes the first answer token before compression)" if results.when == "prompt" else ""
    return (
        f"warning: this benchmark says nothing about the cache: with every audio and video entry evicted it still "
        f"gives {control.accuracy:.1%} against {full.accuracy:.1%} of the full cache{why}"
    )


def render_table(results: Results, paired: Mapping[Setting, tuple[float, float]] | None = None) -> Table:
    """Accuracy, share of full, 95 % intervals, kept entries and KV bytes of every row.

    Args:
        paired: 95 % intervals of the share of full, paired by clip, shown behind it where given.
    """
    questions = max((row.n for row in results.rows), default=0)
    moment = f"when: {results.when}, {questions} questions, seed {results.seed}"
    table = Table(
        title=f"{results.benchmark} on {results.model}\n{moment}",
        caption="control*: every audio and video entry evicted; no audio*, no video*: all of one modality. "
        "Entries: audio and video, a layer and clip. Brackets: 95 % intervals, clips drawn with replacement.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("policy", no_wrap=True)
    for name in ("ratio", "accuracy", "of full", "kept entries", "KV bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    previous: str | None = None
    for row in results.rows:
        if previous is not None and row.policy != previous:
            table.add_section()
        previous = row.policy
        share = paired.get(row.setting) if paired else None
        table.add_row(
            _name(row),
            f"{row.ratio:g}",
            _with_interval(row.accuracy, row.ci95),
            "-" if row.relative is None else _with_interval(row.relative, share),
            f"{row.kept_entries:.1f} / {row.full_entries:.0f}",
            f"{row.kv_bytes:,}",
            style="bold" if row.policy in (*CONTROLS, FULL) else None,
        )
    return table


def render_group_tables(results: Results) -> list[Table]:
    """The tables of `group_scores`."""
    tables = []
    for ratio, rows, lines in group_scores(results):
        tables.append(_empty_table(f"accuracy in % by question group, ratio {ratio:g}", ("group", "n"), rows))
        for name, count, scores in lines:
            cells = ("-" if score is None else f"{100 * score:.1f}" for score in scores)
            tables[-1].add_row(name, str(count), *cells)
    return tables


def render_metric_tables(results: Results) -> list[Table]:
    """The tables of `metric_scores`."""
    tables = []
    for ratio, rows, lines in metric_scores(results):
        tables.append(_empty_table(f"scores of all answers together, ratio {ratio:g}", ("score",), rows))
        for name, values in lines:
            tables[-1].add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    return tables


def group_scores(results: Results) -> list[tuple[float, list[Row], list[tuple[str, int, list[float | None]]]]]:
    """Accuracy by question group, a table a ratio between 0 and 1.

    Returns:
        its ratio, its columns (the full cache and the controls first), and its lines: group, questions, accuracies.
    """
    tables = []
    for ratio, rows in results.by_ratio():
        lines = []
        for name in dict.fromkeys(name for row in rows for name in row.groups if name != UNPARSED):
            scores = [row.groups.get(name) for row in rows]
            count = max(score.n for score in scores if score is not None)
            lines.append((name, count, [None if score is None else score.accuracy for score in scores]))
        tables.append((ratio, rows, lines))
    return tables


def metric_scores(results: Results) -> list[tuple[float, list[Row], list[tuple[str, list[float | None]]]]]:
    """Scores of all answers together, tables as those of the groups; without policies, of full cache and controls."""
    tables = []
    for ratio, rows in results.by_ratio() or [(1.0, results.references)]:
        names = dict.fromkeys(name for row in rows for name in row.metrics)
        if names:
            tables.append((ratio, rows, [(name, [row.metrics.get(name) for row in rows]) for name in names]))
    return tables


def _empty_table(title: str, first: Sequence[str], rows: Sequence[Row]) -> Table:
    """The first columns, then one a row of the results."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in first:
        table.add_column(name, justify="left" if name == first[0] else "right", no_wrap=True)
    for row in rows:
        table.add_column(_name(row).replace("_", "_\n").replace("-", "-\n"), justify="right", no_wrap=True)
    return table


def _name(row: Row) -> str:
    short = {CONTROL: "control*", AUDIO_EVICTED: "no audio*", VIDEO_EVICTED: "no video*"}
    return short.get(row.policy, row.policy)


def _with_interval(value: float, bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return f"{value:.1%}"
    return f"{value:.1%} \\[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"
