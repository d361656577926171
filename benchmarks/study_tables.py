"""The tables of the calibration study in docs/results.md, and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from acckv.errors import InputError
from acckv.evaluation.results import CALIBRATED, CONTROL, CONTROLS, FULL, REFERENCE_NAMES
from acckv.io.files import whole_file
from benchmarks.calibration_step import FINE_TUNING
from benchmarks.study_results import RATIOS, Line, Scores, mean_score
from benchmarks.study_variants import DEFAULT, STUDIES, TITLES

START, END = "<!-- study: written by benchmarks.calibration_study --page -->", "<!-- end of study -->"


def table(lines: Sequence[Line]) -> Table:
    """A row a variant: accuracy as a share of the full cache's, in %."""
    made = Table(title="share of the full cache's accuracy in %, 95 % interval over clips", box=box.SIMPLE_HEAD)
    for name in ("", "seeds", "steps", "minutes", *(f"{ratio:g}" for ratio in (1.0, *RATIOS, 0.0))):
        made.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name in dict.fromkeys(line.variant for line in lines):
        rows = [line for line in lines if line.variant == name]
        first = rows[0]
        cells = [
            f"{100 * r.relative:.1f} ({100 * r.relative_ci95[0]:.1f}-{100 * r.relative_ci95[1]:.1f})" for r in rows
        ]
        made.add_row(first.label, str(len(first.seeds)), str(first.steps), f"{first.training_seconds / 60:.0f}", *cells)
    return made


def markdown(
    lines: Sequence[Line], training_free: dict[str, float], costs: Sequence[dict[str, Any]], scorers: dict[str, Any]
) -> str:
    """The tables of the page's section.

    Args:
        lines: of all variants.
        training_free: "policy@ratio" -> accuracy of what is not trained, 0..1.
        costs: rows of `benchmarks.calibration_step`, for what each scope of LoRA costs; may be empty.
        scorers: what `benchmarks.scorer_study` wrote; may be empty.
    """
    default = [line for line in lines if line.variant == DEFAULT]
    text = []
    if default:
        text += ["Accuracy in %, one-word questions and descriptions together:", ""]
        text += _policies(default, training_free)
        text += [
            "",
            f"{_how(default)}, {default[0].questions:,} questions. In % of the full cache's accuracy, with 95 %",
        ]
        text += ["intervals over clips; the lead is over the best training-free policy at that ratio, in points and"]
        text += ["paired by clip:", "", *_bars(default)]
    for name, (title, references) in TITLES.items():
        variants = [*references, *(variant.name for variant in STUDIES[name])]
        chosen = [line for line in lines if line.variant in variants]
        chosen.sort(key=lambda line: variants.index(line.variant))
        if {line.variant for line in chosen} - set(references):
            text += ["", f"## {title}", "", f"In % of the full cache's accuracy. {_how(chosen)}:", ""]
            text += _variants(chosen, costs if name == "scopes" else ())
        if name == "scopes" and costs:
            text += ["", "## What a step costs", "", *_steps(costs)]
    if scorers:
        text += ["", "## What the scorer sees, and its size", ""]
        text += [
            f"KL to the full cache's answers on the validation clips, in nats a token, after {scorers['steps']} steps:",
            "",
        ]
        text += _header("", *next(iter(scorers["kl"].values())))
        text += [
            f"| {name} | " + " | ".join(f"{kl:.3f}" for kl in of.values()) + " |" for name, of in scorers["kl"].items()
        ]
    return "\n".join(text) + "\n"


def _how(lines: Sequence[Line]) -> str:
    """Seeds, steps and minutes of trainings, in words."""
    seeds, steps = {len(line.seeds) for line in lines}, sorted({line.steps for line in lines})
    each = " or ".join(f"{count} seed{'s' * (count > 1)}" for count in sorted(seeds, reverse=True))
    minutes = sorted({round(line.training_seconds / 60) for line in lines})
    span = f"{minutes[0]}" if len(minutes) == 1 else f"{minutes[0]} to {minutes[-1]}"
    return f"{each.capitalize()}, {' or '.join(f'{count:,}' for count in steps)} steps, {span} minutes each"


def _policies(default: Sequence[Line], training_free: dict[str, float]) -> list[str]:
    """A row a policy: accuracy in % at every ratio."""
    ratios = [line.ratio for line in default]
    text = _header("", *(f"{ratio:g}" for ratio in ratios))
    names = dict.fromkeys(key.split("@")[0] for key in training_free)
    for name in (name for name in names if name not in CONTROLS or name == CONTROL):
        cells = [training_free.get(f"{name}@{ratio:g}") for ratio in ratios]
        shown = ["" if cell is None else f"{100 * cell:.1f}" for cell in cells]
        text.append(f"| {REFERENCE_NAMES.get(name, name)} | " + " | ".join(shown) + " |")
    text.append(f"| **{CALIBRATED}** | " + " | ".join(f"**{100 * line.accuracy:.1f}**" for line in default) + " |")
    return text


def _bars(default: Sequence[Line]) -> list[str]:
    """A row a ratio: the default against the full cache and the best training-free policy."""
    text = _header("ratio", "of the full cache", "each seed", "best training-free", "lead")
    for line in default:
        lead = "" if line.lead is None else f"{100 * line.lead:+.1f} {_range(line.lead_ci95)}"
        rival = "" if line.best is None else f"{100 * (line.accuracy - (line.lead or 0)):.1f} {line.best}"
        seeds = ", ".join(f"{100 * seed:.1f}" for seed in line.seeds)
        share = f"{100 * line.relative:.1f} {_range(line.relative_ci95)}"
        text.append(f"| {line.ratio:g} | {share} | {seeds} | {rival} | {lead} |")
    return text


def _variants(lines: Sequence[Line], costs: Sequence[dict[str, Any]]) -> list[str]:
    """A row a variant: share of the full cache's accuracy in %; with costs, time and memory of a step too.

    Where some variants have one seed and others several, the label says how many.
    """
    mixed = len({len(line.seeds) for line in lines}) > 1
    ratios = list(dict.fromkeys(line.ratio for line in lines))
    costs = [row for row in costs if row["clip_seconds"] == min(row["clip_seconds"] for row in costs)]
    numbers = sorted({row["questions"] for row in costs})
    prices = [f"{what} ({number})" for what in ("time", "memory") for number in numbers]
    text = _header("", *(f"{ratio:g}" for ratio in ratios), *prices)
    for name in dict.fromkeys(line.variant for line in lines):
        rows = [line for line in lines if line.variant == name]
        cells = [f"{100 * row.relative:.1f}" for row in rows]
        for what in ("time", "memory"):
            found = {row["questions"]: row[what] for row in costs if row["variant"] == name}
            cells += [f"{found[number]:.2f}" for number in numbers]
        seeds = len(rows[0].seeds)
        label = rows[0].label + (f", {seeds} seeds" if mixed and seeds > 1 else "")
        text.append(f"| {label} | " + " | ".join(cells) + " |")
    if costs:
        text += ["", "Time and memory of a step are shares of a plain LoRA fine-tuning step's on the same batch"]
        text += [f"(`benchmarks.calibration_step`), with {', '.join(map(str, numbers))} questions a clip."]
    return text


def _steps(costs: Sequence[dict[str, Any]]) -> list[str]:
    """A row a kind of step, a column a kind of batch: time and memory as shares of a fine-tuning step's."""
    batches = list(dict.fromkeys((row["clip_seconds"], row["questions"], *row["tokens"]) for row in costs))
    kinds = [name for name in dict.fromkeys(row["step"] for row in costs) if name != FINE_TUNING]
    found = {(row["step"], row["clip_seconds"], row["questions"]): row for row in costs}
    text = ["Shares of a plain LoRA fine-tuning step on the same batch of encoded clips (medians, least to most)."]
    text += ["Scope 'after' unless a line says otherwise; on later visits of a clip its prefill, and what the"]
    text += ["teacher said, are kept."]
    for what, title in (("time", "Time"), ("memory", "Memory that is held for the backward pass")):
        heads = [f"{seconds} s, {count} question{'s' * (count > 1)}" for seconds, count, *_ in batches]
        text += ["", f"{title}:", "", *_header("", *heads)]
        if what == "time":
            text.append("| tokens of clip and questions | " + " | ".join(f"{n} + {t}" for *_, n, t in batches) + " |")
        for kind in kinds:
            rows = [found[kind, seconds, count] for seconds, count, *_ in batches]
            cells = [f"{row[what]:.2f}" for row in rows]
            if what == "time":
                ends = [row["time_range"] for row in rows]
                cells = [f"{cell} ({low:.2f} to {high:.2f})" for cell, (low, high) in zip(cells, ends, strict=True)]
            text.append(f"| {kind.removeprefix('calibration, ')} | " + " | ".join(cells) + " |")
    return text


def _header(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(names)} |".replace("|  |", "| |"), "|---" * len(names) + "|"]


def _range(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"({100 * ends[0]:.1f} to {100 * ends[1]:.1f})"


def write_section(page: Path, text: str, marks: tuple[str, str] = (START, END)) -> None:
    """Put tables between two marks of a file.

    Raises:
        InputError: it has no such marks.
    """
    whole = page.read_text(encoding="utf-8")
    before, start, rest = whole.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not start or not end:
        raise InputError(f"has no section between {marks[0]} and {marks[1]}", source=page)
    with whole_file(page) as file:
        file.write_text(f"{before}{start}\n\n{text}\n{end}{after}", encoding="utf-8")


def plot(path: Path, lines: Sequence[Line], rivals: dict[tuple[str, float], Scores]) -> None:
    """Write a PNG: the default against the training-free policies over ratios, and the variants beside one another."""
    variants = [name for name in dict.fromkeys(line.variant for line in lines) if name != DEFAULT]
    figure = Figure(figsize=(13 if variants else 7, max(4.5, 1.2 + 0.3 * len(variants))), layout="constrained")
    panels = figure.subplots(1, 2 if variants else 1, squeeze=False)[0]
    left = panels[0]
    policies = [name for name in dict.fromkeys(name for name, _ in rivals) if name not in (FULL, *CONTROLS)]
    for name in policies:
        left.plot(RATIOS, [100 * mean_score(rivals[name, ratio]) for ratio in RATIOS], color="#bbbbbb", linewidth=1)
    strongest = {ratio: max(policies, key=lambda name: mean_score(rivals[name, ratio])) for ratio in RATIOS}
    best = [100 * mean_score(rivals[strongest[ratio], ratio]) for ratio in RATIOS]
    left.plot(RATIOS, best, "s--", color="#0072B2", markersize=4, label="best training-free at each ratio")
    shown = [line for line in lines if line.variant == DEFAULT and line.ratio in RATIOS]
    if shown:
        for values in zip(*(line.seeds for line in shown), strict=True):
            left.plot(RATIOS, [100 * value for value in values], color="#D55E00", linewidth=0.8, alpha=0.5)
        left.plot(RATIOS, [100 * line.accuracy for line in shown], "o-", color="#D55E00", label=CALIBRATED)
    left.set_xscale("log")
    left.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    left.minorticks_off()
    left.set_xlabel("kept share of audio and video entries")
    left.set_ylabel("accuracy in %")
    left.legend(frameon=False, loc="lower right")
    if variants:
        _plot_variants(panels[1], [line for line in lines if line.variant != DEFAULT], variants)
    for axes in panels:
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _plot_variants(axes: Any, lines: Sequence[Line], variants: list[str]) -> None:
    for ratio, colour in ((0.1, "#009E73"), (0.05, "#D55E00"), (0.02, "#CC79A7")):
        rows = [line for line in lines if line.ratio == ratio]
        places = [variants.index(line.variant) for line in rows]
        values = [100 * line.relative for line in rows]
        spread = [[100 * abs(line.relative - line.relative_ci95[side]) for line in rows] for side in (0, 1)]
        axes.errorbar(values, places, xerr=spread, fmt="o", color=colour, markersize=4, label=f"ratio {ratio:g}")
    axes.set_yticks(range(len(variants)), [next(v.label for v in lines if v.variant == name) for name in variants])
    axes.invert_yaxis()
    axes.set_xlabel("share of the full cache's accuracy in %")
    axes.legend(frameon=False, loc="lower left")
