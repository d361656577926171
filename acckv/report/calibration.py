"""The report of a calibration (`report.md`), and the history of its budgets (`budgets.csv`)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from acckv.evaluation.results import REFERENCE_NAMES, Results
from acckv.io.files import whole_file
from acckv.report.rendering import render
from acckv.report.table import control_warning

MODALITIES = ("video", "audio")


@dataclass(frozen=True)
class RunFacts:
    """The facts of a calibration run.

    Attributes:
        model: base model; when: "context" or "prompt".
        steps: optimiser steps done, of `planned`; exported: the one whose weights were exported.
        temperature: of the gates at that one, in standard deviations of the score; it falls from `temperature_start` to
            `temperature_end`.
        ratio_range: least and largest kept share that was trained.
        low_ratio_steps: of the planned ones, how many see the least alone, at first; 0 without such a stage.
        low_ratio_below: ratios below it keep what those steps learned.
    """

    model: str
    when: str
    steps: int
    planned: int
    exported: int
    temperature: float
    temperature_start: float
    temperature_end: float
    ratio_range: tuple[float, float]
    low_ratio_steps: int = 0
    low_ratio_below: float = 0.0


@dataclass(frozen=True)
class KeptShares:
    """Kept entries: ratio -> [layers, 2] (video, audio), mean over some clips, of [2] entries that exist."""

    entries: Mapping[float, Tensor]
    full: Tensor


def render_report(facts: RunFacts, kept: KeptShares, results: Results | None, plots: tuple[str, str]) -> str:
    """The report as Markdown.

    Args:
        results: of the closing evaluation; None says that there was none.
        plots: file names of the kept shares and of their history.
    """
    shares = {ratio: (entries / kept.full.clamp_min(1e-9)).tolist() for ratio, entries in kept.entries.items()}
    return render(
        "calibration.md.jinja",
        facts=facts,
        warnings=_warnings(facts, results),
        results=results,
        names=REFERENCE_NAMES,
        shares=shares,
        layers=len(next(iter(kept.entries.values()))),
        plots=plots,
    )


def write_budget_history(
    path: str | Path,
    steps: Sequence[int],
    temperatures: Sequence[float],
    ratios: Sequence[float],
    shares: Sequence[Tensor],
) -> None:
    """Write a CSV with a line for each step, ratio, layer and modality.

    Args:
        shares: of each step, [ratios, layers, 2] times the preset's budget.
    """
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "temperature", "ratio", "layer", "modality", "share"))
        for step, temperature, share in zip(steps, temperatures, shares, strict=True):
            for index, ratio in enumerate(ratios):
                for layer, values in enumerate(share[index].tolist()):
                    for modality, value in zip(MODALITIES, values, strict=True):
                        writer.writerow((step, f"{temperature:.6g}", f"{ratio:g}", layer, modality, f"{value:.6g}"))


def _warnings(facts: RunFacts, results: Results | None) -> list[str]:
    warnings = []
    if results is not None and (warning := control_warning(results)) is not None:
        warnings.append(warning)
    if facts.temperature > 1.01 * facts.temperature_end:
        warnings.append(
            f"warning: training ended before the gates were hard (temperature {facts.temperature:.3g}, planned "
            f"{facts.temperature_end:g}); what was trained is not quite what is shipped"
        )
    if facts.low_ratio_steps and facts.exported <= facts.low_ratio_steps:
        warnings.append(f"warning: training ended before it saw a ratio above {facts.ratio_range[0]:g}")
    return warnings
