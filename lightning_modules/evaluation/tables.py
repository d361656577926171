"""From what was answered to tables and files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from acckv.benchmarks import Mode
from acckv.benchmarks.answers import UNPARSED
from acckv.benchmarks.corpus import CIDER, corpus_scores
from acckv.benchmarks.judging import Judge
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.evaluation.journal import Batch, failed_clips
from acckv.evaluation.results import (
    CONTROLS,
    FULL,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    Results,
    write_predictions,
    write_results,
)
from acckv.evaluation.scores import CellScores, prediction
from acckv.evaluation.setup import Setup
from acckv.io.files import whole_file
from acckv.report.plots import plot_budgets, plot_pareto
from acckv.report.table import control_warning, render_group_tables, render_metric_tables, render_table
from lightning_modules.evaluation.options import CALIBRATED

PARETO_FILE, BUDGETS_FILE, FAILURES_FILE = "pareto.png", "budgets.png", "failures.json"
_SHOWN = 5  # broken clips that are named below the tables
_TABLE_WIDTH = 120  # the group tables need this much; a narrower terminal wraps them


@dataclass(frozen=True)
class Outcome:
    """What came of an evaluation.

    Attributes:
        results: the rows.
        scores: of each row.
        predictions: lines of `predictions.jsonl`.
        failures: file of each clip that could not be read, with the reason.
        judge: that scored the answers.
    """

    results: Results
    scores: dict[tuple[str, float], CellScores]
    predictions: list[dict[str, Any]]
    failures: list[dict[str, str]]
    judge: Judge


def evaluate_batches(setup: Setup, batches: Iterable[Batch], mode: Mode) -> Outcome:
    """Score what was answered, in the order of the batches.

    Raises:
        InputError: not one clip could be read.
    """
    batches = list(batches)
    judge = Judge(setup.benchmark, frozenset(setup.vocabulary), mode)
    groups = judge.all_groups(record for clip in setup.clips for record in clip)
    seed = setup.settings["seed"]
    scores = {cell: CellScores(groups, judge, seed) for cell in setup.cells}
    failed = failed_clips(batches)
    failures = [{"clip": str(setup.clips[clip][0].video), "error": error} for clip, error in failed.items()]
    predictions = []
    asked: list[Record] = []
    texts: dict[tuple[str, float], list[str]] = {cell: [] for cell in scores}
    for part in (part for batch in batches for part in batch.parts):
        records = [(clip, setup.clips[clip][place]) for clip, place in part.questions]
        asked += [record for _, record in records]
        full_scores = None
        for (policy, ratio), cell, answers in zip(scores, scores.values(), part.cells, strict=True):
            judged = cell.add(records, answers, full_scores)
            texts[policy, ratio] += answers.texts
            if full_scores is None:
                full_scores = torch.tensor([one.score for one in judged])
            for (clip, record), text, cut, one in zip(records, answers.texts, answers.cut, judged, strict=True):
                predictions.append(prediction(policy, ratio, clip, record, judge.groups(record), text, cut, one))
    if not predictions:
        why = f"; the first: {failures[0]['error']}" if failures else ""
        raise InputError(f"not one of {len(failures)} clips could be read{why}")
    results = Results(
        setup.model,
        setup.settings["benchmark"],
        setup.settings["when"],
        seed,
        [cell.row(*name, corpus_scores(asked, texts[name], mode)) for name, cell in scores.items()],
        score=mode,
        clips=len({line["clip"] for line in predictions}),
        failed_clips=len(failed),
        failed_questions=sum(len(setup.clips[clip]) for clip in failed),
    )
    return Outcome(results, scores, predictions, failures, judge)


def print_tables(console: Console, outcome: Outcome) -> None:
    """Accuracy by question group, the table of all rows, and what is to be known about it."""
    console = console if console.width >= _TABLE_WIDTH else Console(file=console.file, width=_TABLE_WIDTH)
    results = outcome.results
    for table in render_group_tables(results):
        console.print(table)
    intervals = {cell: scores.relative_interval() for cell, scores in outcome.scores.items()}
    console.print(render_table(results, {cell: pair for cell, pair in intervals.items() if pair is not None}))
    for table in render_metric_tables(results):
        console.print(table)
    for line in [*_leads(outcome), *_parsing(outcome), *_cut(outcome), *_left_out(outcome)]:
        console.print(line, highlight=False)
    for line in _failures(outcome):
        console.print(line, style="bold red", highlight=False, soft_wrap=True)
    warning = control_warning(results)
    if warning is not None:
        console.print(warning, style="bold red", highlight=False, soft_wrap=True)


def write_files(output: Path, outcome: Outcome) -> None:
    """Predictions, failures, plots and, last, the results."""
    write_predictions(output / PREDICTIONS_FILE, outcome.predictions)
    with whole_file(output / FAILURES_FILE) as temporary:
        temporary.write_text(json.dumps(outcome.failures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plot_pareto(output / PARETO_FILE, outcome.results)
    measured = {cell: scores for cell, scores in outcome.scores.items() if 0 < cell[1] < 1}
    if measured:
        names = [policy for policy, _ in measured]
        shown = CALIBRATED if CALIBRATED in names else names[-1]
        budgets = {ratio: scores.kept_entries() for (policy, ratio), scores in measured.items() if policy == shown}
        plot_budgets(output / BUDGETS_FILE, budgets, next(iter(outcome.scores.values())).full_entries(), shown)
    write_results(output / RESULTS_FILE, outcome.results)


def _leads(outcome: Outcome) -> list[str]:
    """The calibrated compressor against the best training-free policy at each ratio, paired by clip."""
    lines = []
    for (policy, ratio), scores in outcome.scores.items():
        others = {
            name: other
            for (name, r), other in outcome.scores.items()
            if r == ratio and name not in (CALIBRATED, FULL, *CONTROLS)
        }
        if policy != CALIBRATED or not 0 < ratio < 1 or not others:
            continue
        best = max(others, key=lambda name: float(others[name].accuracy.compute()["accuracy"]))
        difference, (low, high) = scores.against(others[best])
        lines.append(
            f"ratio {ratio:g}: {CALIBRATED} against {best}, the best training-free policy: "
            f"{100 * difference:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
        )
    return lines


def _parsing(outcome: Outcome) -> list[str]:
    """The largest share of answers that the parser could make nothing of."""
    asked = next(iter(outcome.judge.parsers))
    shares = {
        f"{row.policy} at {row.ratio:g}": row.groups[UNPARSED].n / row.groups[asked].n
        for row in outcome.results.rows
        if UNPARSED in row.groups and row.groups[asked].n
    }
    if not shares:
        return []
    most = max(shares, key=lambda name: shares[name])
    what = "answers without a known word" if outcome.judge.benchmark is None else "answers that could not be parsed"
    return [f"{what} (counted as wrong): most {shares[most]:.1%}, {most}"]


def _cut(outcome: Outcome) -> list[str]:
    """The largest share of answers that the limit of tokens ended."""
    rows = [row for row in outcome.results.rows if row.n]
    most = max(rows, key=lambda row: row.cut / row.n, default=None)
    if most is None or not most.cut:
        return []
    share, options = f"{most.cut / most.n:.1%}, {most.policy} at {most.ratio:g}", "--word_tokens, --description_tokens"
    return [f"answers that the limit of tokens ended ({options}): most {share}; in predictions.jsonl they are cut"]


def _left_out(outcome: Outcome) -> list[str]:
    """That CIDEr is missing beside the other scores of captions."""
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
    lines += [f"  {failure['error']}" for failure in failures[:_SHOWN]]
    return lines + ([f"  and {len(failures) - _SHOWN} more"] if len(failures) > _SHOWN else [])
