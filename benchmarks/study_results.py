"""What came of the variants of the calibration study, over seeds and beside the training-free policies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from acckv.evaluation.results import CALIBRATED, CONTROLS, FULL, PREDICTIONS_FILE, RESULTS_FILE
from acckv.metrics.intervals import bootstrap_difference, bootstrap_ratio
from benchmarks.generalisation import paired, read_scores
from benchmarks.study_variants import Variant

RATIOS = (0.5, 0.2, 0.1, 0.05, 0.02)
TIMES_FILE = "times.json"

Scores = dict[str, tuple[float, int]]
"""Question -> score, clip."""


@dataclass(frozen=True)
class Line:
    """A variant at a ratio, mean over its seeds; 95 % intervals over clips, whose scores are means over seeds.

    Attributes:
        seeds: accuracy of each; accuracy: their mean; relative: as a share of the full cache's.
        best: the best training-free policy at this ratio; lead: over it, paired by clip. None at ratio 1 and 0.
        training_seconds: mean over seeds.
    """

    variant: str
    label: str
    ratio: float
    questions: int
    steps: int
    training_seconds: float
    seeds: list[float]
    accuracy: float
    relative: float
    relative_ci95: tuple[float, float]
    best: str | None
    lead: float | None
    lead_ci95: tuple[float, float] | None


def lines_of(output: Path, variant: Variant, rivals: dict[tuple[str, float], Scores]) -> list[Line]:
    """Every ratio of a variant, over the seeds that are there."""
    folders = sorted(path.parent for path in (output / variant.name).glob(f"seed*/{RESULTS_FILE}"))
    if not folders:
        return []
    runs = [read_scores(folder / PREDICTIONS_FILE) for folder in folders]
    times = [json.loads((folder / TIMES_FILE).read_text()) for folder in folders]
    lines = []
    for ratio in (1.0, *RATIOS, 0.0):
        each = [run[CALIBRATED, ratio] for run in runs]
        mean = {key: (sum(run[key][0] for run in each) / len(each), clip) for key, (_, clip) in each[0].items()}
        ours, full, clips = paired(mean, runs[0][FULL, 1.0])
        names = [name for name, at in rivals if at == ratio and name not in (FULL, *CONTROLS)]
        best = max(names, key=lambda name: mean_score(rivals[name, ratio]), default=None)
        theirs = None if best is None else paired(mean, rivals[best, ratio])[1]
        lines.append(
            Line(
                variant=variant.name,
                label=variant.label,
                ratio=ratio,
                questions=len(mean),
                steps=times[0]["steps"],
                training_seconds=sum(took["training_seconds"] for took in times) / len(times),
                seeds=[mean_score(run) for run in each],
                accuracy=mean_score(mean),
                relative=float(ours.mean() / full.mean()),
                relative_ci95=bootstrap_ratio(ours, full, clips) if full.any() else (0.0, 0.0),
                best=best,
                lead=None if theirs is None else float(ours.mean() - theirs.mean()),
                lead_ci95=None if theirs is None else bootstrap_difference(ours, theirs, clips),
            )
        )
    return lines


def with_earlier(lines: Sequence[Line], file: Path, variants: Sequence[Variant]) -> list[Line]:
    """Lines, and for variants that have none those of an earlier study's file; in the order of the variants.

    Args:
        variants: all that there are today.
    """
    found = {line.variant for line in lines}
    rows = [Line(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    labels = {variant.name: variant.label for variant in variants}
    known = [replace(row, label=labels[row.variant]) for row in rows if row.variant in labels.keys() - found]
    names = list(labels)
    return sorted([*lines, *known], key=lambda line: names.index(line.variant))


def mean_score(scores: Scores) -> float:
    """Accuracy, 0..1."""
    return sum(score for score, _ in scores.values()) / len(scores)
