"""What a compressor is worth on clips unlike those of its training.

    python -m benchmarks.generalisation --compressor runs/calib/export --output runs/generalisation

Every variant of the generated clips (see `data.variant` of evaluate.py) is evaluated like any other benchmark, into a
folder of its own. Beside them come `generalisation.json`, a table, and `generalisation.png`: at each ratio the
compressor against the full cache, the best training-free policy and the control, on the same questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from acckv.data.synthetic.clips import VARIANTS
from acckv.evaluation.results import CALIBRATED, PREDICTIONS_FILE, Results
from acckv.io.files import whole_file
from acckv.metrics.intervals import bootstrap_difference
from lightning_modules.cli.errors import quiet_libraries
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation

FORMAT = 1
FILE, PLOT = "generalisation.json", "generalisation.png"
TRAINING_FREE = ("random", "h2o", "snapkv", "keydiff", "acckv")


@dataclass(frozen=True)
class Line:
    """A variant at a ratio; accuracies 0..1 with 95 % intervals over clips.

    Attributes:
        full, control: accuracy of the full cache, and with every audio and video entry evicted.
        calibrated: accuracy of the compressor; relative: as a share of the full cache's, None where that is 0.
        best: the best training-free policy at this ratio; best_accuracy: what it reaches.
        lead: accuracy of the compressor minus that, paired by clip.
    """

    variant: str
    ratio: float
    questions: int
    full: float
    full_ci95: tuple[float, float]
    control: float
    calibrated: float
    calibrated_ci95: tuple[float, float]
    relative: float | None
    best: str
    best_accuracy: float
    best_ci95: tuple[float, float]
    lead: float
    lead_ci95: tuple[float, float]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressor", default="runs/calib/export", help="export of a calibration")
    parser.add_argument("--model", default="tiny", help="tiny, a folder or a hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/generalisation"), help="folder of the results")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    parser.add_argument("--policies", default=",".join(TRAINING_FREE), help="training-free rivals")
    parser.add_argument("--ratios", default="0.2,0.1,0.05,0.02", help="kept shares above 0 and below 1")
    parser.add_argument("--clips", type=int, default=64, help="clips of each variant")
    parser.add_argument("--seed", type=int, default=1, help="of the clips")
    parser.add_argument("--batch-size", type=int, default=8, help="clips that are prefilled together")
    parser.add_argument("--cache-dir", default=None, help="of the generated clips")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="of the Trainer")
    given = parser.parse_args(arguments)
    names = given.variants.split(",")
    for name in names:
        if name not in VARIANTS:
            parser.error(f"--variants: {name!r} is not one of {', '.join(VARIANTS)}")
    if not given.policies:
        parser.error("--policies: at least one is needed")
    quiet_libraries()
    console, lines = Console(), []
    for name in names:
        options = EvaluationOptions(
            model=given.model,
            compressor=given.compressor,
            policies=f"{given.policies},{CALIBRATED}",
            ratios=given.ratios,
            output=str(given.output / name),
            overwrite=True,
            batch_size=given.batch_size,
            data=EvaluationData(variant=name, clips=given.clips, seed=given.seed, cache_dir=given.cache_dir),
            description_tokens=64,
            update_card=False,
            accelerator=given.accelerator,
        )
        results = run_evaluation(options, console=console)
        lines += compare(name, results, given.output / name / PREDICTIONS_FILE)
    values = {"format": FORMAT, "compressor": given.compressor, "clips": given.clips, "seed": given.seed}
    with whole_file(given.output / FILE) as file:
        file.write_text(json.dumps({**values, "rows": [asdict(line) for line in lines]}, indent=1) + "\n")
    plot(given.output / PLOT, lines)
    console.print(table(lines))


def compare(variant: str, results: Results, predictions: Path) -> list[Line]:
    """The compressor beside the full cache and the best training-free policy, at each ratio of an evaluation."""
    scores = read_scores(predictions)
    full, control = results.full, results.control
    if full is None or control is None:
        raise ValueError("an evaluation holds the full cache and the control")
    lines = []
    for row in results.rows:
        if row.policy != CALIBRATED or not 0 < row.ratio < 1:
            continue
        rivals = [r for r in results.rows if r.ratio == row.ratio and r.policy not in (CALIBRATED, "full", "control")]
        best = max(rivals, key=lambda rival: rival.accuracy)
        ours, theirs, clips = paired(scores[CALIBRATED, row.ratio], scores[best.policy, row.ratio])
        lines.append(
            Line(
                variant=variant,
                ratio=row.ratio,
                questions=row.n,
                full=full.accuracy,
                full_ci95=full.ci95,
                control=control.accuracy,
                calibrated=row.accuracy,
                calibrated_ci95=row.ci95,
                relative=row.relative,
                best=best.policy,
                best_accuracy=best.accuracy,
                best_ci95=best.ci95,
                lead=float(ours.mean() - theirs.mean()),
                lead_ci95=bootstrap_difference(ours, theirs, clips, seed=results.seed),
            )
        )
    return lines


def read_scores(predictions: Path) -> dict[tuple[str, float], dict[str, tuple[float, int]]]:
    """(policy, ratio) -> question -> (score, clip)."""
    scores: dict[tuple[str, float], dict[str, tuple[float, int]]] = {}
    for text in predictions.read_text(encoding="utf-8").splitlines():
        line: dict[str, Any] = json.loads(text)
        scores.setdefault((line["policy"], line["ratio"]), {})[line["id"]] = (line["score"], line["clip"])
    return scores


def paired(
    ours: dict[str, tuple[float, int]], theirs: dict[str, tuple[float, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of both and clips, [questions] each, in one order."""
    rows = [(score, theirs[question][0], clip) for question, (score, clip) in ours.items()]
    first, second, clips = zip(*rows, strict=True)
    return torch.tensor(first), torch.tensor(second), torch.tensor(clips)


def table(lines: Sequence[Line]) -> Table:
    """One row a variant and ratio, in %."""
    made = Table(title="accuracy in %; 95 % intervals over clips, the lead's paired", box=box.SIMPLE_HEAD)
    for name in ("variant", "ratio", "full", "control", "calibrated", "of full", "best training-free", "lead"):
        made.add_column(name, justify="left" if name in ("variant", "best training-free") else "right", no_wrap=True)
    for line in lines:
        low, high = line.lead_ci95
        made.add_row(
            line.variant,
            f"{line.ratio:g}",
            f"{100 * line.full:.1f}",
            f"{100 * line.control:.1f}",
            f"{100 * line.calibrated:.1f}",
            "-" if line.relative is None else f"{100 * line.relative:.1f}",
            f"{100 * line.best_accuracy:.1f} {line.best}",
            f"{100 * line.lead:+.1f} \\[{100 * low:+.1f}, {100 * high:+.1f}]",
        )
    return made


def plot(path: Path, lines: Sequence[Line]) -> None:
    """Write a PNG: a panel a ratio, a row a variant, points with intervals."""
    ratios = sorted({line.ratio for line in lines}, reverse=True)
    variants = list(dict.fromkeys(line.variant for line in lines))
    figure = Figure(figsize=(1.6 + 2.9 * len(ratios), 1.4 + 0.5 * len(variants)), layout="constrained")
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for axes, ratio in zip(panels, ratios, strict=True):
        for line in (line for line in lines if line.ratio == ratio):
            place = variants.index(line.variant)
            for value, bounds, colour, marker, shift, label in (
                (line.full, line.full_ci95, "#222222", "|", 0.0, "full cache"),
                (line.calibrated, line.calibrated_ci95, "#D55E00", "o", 0.12, CALIBRATED),
                (line.best_accuracy, line.best_ci95, "#0072B2", "s", -0.12, "best training-free"),
                (line.control, (line.control, line.control), "#999999", "x", 0.0, "all evicted"),
            ):
                axes.errorbar(
                    100 * value,
                    place + shift,
                    xerr=[[100 * max(0.0, value - bounds[0])], [100 * max(0.0, bounds[1] - value)]],
                    color=colour,
                    marker=marker,
                    markersize=5,
                    elinewidth=0.9,
                    label=label if place == 0 else None,
                )
        axes.set_title(f"ratio {ratio:g}", fontsize=10)
        axes.set_xlim(0, 102)
        axes.set_xlabel("accuracy in %", fontsize=9)
        axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(variants)), variants)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    main()
