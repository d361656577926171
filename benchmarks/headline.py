"""The README's picture: accuracy against the share of entries kept, from what the calibration study stored.

    python -m benchmarks.headline

reads `benchmarks/results/study.json` and writes `docs/assets/accuracy.png`; nothing is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from acckv.evaluation.results import CONTROL, CONTROLS, FULL
from acckv.io.files import whole_file
from benchmarks.study_results import RATIOS, Line
from benchmarks.study_variants import DEFAULT

RESULTS = Path(__file__).parent / "results"
#: Training-free policies with a colour of their own: the strongest, and the published AccKV.
NAMED = {"keydiff": "#0072B2", "random": "#009E73", "acckv": "#CC79A7"}


def curves(study: Path) -> tuple[list[Line], dict[str, list[float]], float, float]:
    """The calibrated line at each of `RATIOS`, accuracies of the training-free policies there, full cache, control."""
    stored = json.loads(study.read_text(encoding="utf-8"))
    lines = [Line(**row) for row in stored["rows"] if row["variant"] == DEFAULT and row["ratio"] in RATIOS]
    measured: dict[str, float] = stored["training_free"]
    names = dict.fromkeys(key.partition("@")[0] for key in measured)
    policies = {
        name: [measured[f"{name}@{ratio:g}"] for ratio in RATIOS] for name in names if name not in (FULL, *CONTROLS)
    }
    return lines, policies, measured[f"{FULL}@1"], measured[f"{CONTROL}@0"]


def plot(study: Path, output: Path) -> None:
    """Write the PNG."""
    lines, policies, full, control = curves(study)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()

    def draw(values: Sequence[float], label: str | None, **style: object) -> None:
        axes.plot(RATIOS, [100 * value for value in values], label=label, **style)  # type: ignore[arg-type]

    draw([line.accuracy for line in lines], "acckv-calibrated", color="#D55E00", marker="o", linewidth=2.5, zorder=3)
    for seed in zip(*(line.seeds for line in lines), strict=True):
        draw(seed, None, color="#D55E00", linewidth=0.8, alpha=0.5)
    for name, colour in NAMED.items():
        draw(policies[name], f"{name}, training-free", color=colour, marker="s", markersize=4)
    others = [values for name, values in policies.items() if name not in NAMED]
    for number, values in enumerate(others):
        label = None if number else f"{len(others)} other training-free policies"
        draw(values, label, color="#bbbbbb", linewidth=1, zorder=1)
    for value, text, offset in ((full, "full cache", 4), (control, "every audio and video entry evicted", -11)):
        axes.axhline(100 * value, color="grey", linestyle=":", linewidth=1)
        axes.annotate(text, (0.02, 100 * value), (0, offset), textcoords="offset points", color="grey", fontsize=8)
    axes.set(xscale="log", ylim=(0, 108), xlabel="kept share of audio and video entries", ylabel="accuracy in %")
    axes.set_xticks(RATIOS, [f"{100 * ratio:g} %" for ratio in RATIOS])
    axes.minorticks_off()
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(1.0, 0.3))
    with whole_file(output) as partial:
        figure.savefig(partial, dpi=130, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=RESULTS / "study.json", help="of benchmarks.calibration_study")
    parser.add_argument("--output", type=Path, default=Path("docs/assets/accuracy.png"), help="picture to write")
    given = parser.parse_args(arguments)
    plot(given.study, given.output)


if __name__ == "__main__":
    main()
