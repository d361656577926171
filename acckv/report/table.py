"""The tables of an evaluation, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from acckv.benchmarks.answers import UNPARSED
from acckv.evaluation.results import AUDIO_EVICTED, CONTROL, CONTROLS, FULL, VIDEO_EVICTED, Results, Row

Paired = Mapping[tuple[str, float], tuple[float, float]]
"""(policy, ratio) -> 95 % interval of the share of the full cache, paired by clip."""


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


def render_table(results: Results, paired: Paired | None = None) -> Table:
    """Accuracy, share of full, 95 % intervals, kept entries and KV bytes of every row.

    Args:
        results: the evaluation.
        paired: intervals of the share of full, shown behind it where given.
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
        share = paired.get((row.policy, row.ratio)) if paired else None
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
    """Accuracy by question group: one table a ratio between 0 and 1, the full cache and the controls first."""
    return [_group_table(ratio, rows) for ratio, rows in results.by_ratio()]


def _group_table(ratio: float, rows: Sequence[Row]) -> Table:
    table = _empty_table(f"accuracy in % by question group, ratio {ratio:g}", ("group", "n"), rows)
    for name in dict.fromkeys(name for row in rows for name in row.groups if name != UNPARSED):
        scores = [row.groups.get(name) for row in rows]
        count = max(score.n for score in scores if score is not None)
        cells = ["-" if s is None or s.accuracy is None else f"{100 * s.accuracy:.1f}" for s in scores]
        table.add_row(name, str(count), *cells)
    return table


def render_metric_tables(results: Results) -> list[Table]:
    """Scores of all answers together, a table as those of the groups; without policies, of full cache and controls."""
    tables = []
    for ratio, rows in results.by_ratio() or [(1.0, results.references)]:
        names = metric_names(rows)
        if names:
            table = _empty_table(f"scores of all answers together, ratio {ratio:g}", ("score",), rows)
            for name in names:
                values = [row.metrics.get(name) for row in rows]
                table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
            tables.append(table)
    return tables


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The scores that rows have, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


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
