r"""What calibration buys: the table over seeds, and what each part of it is worth.

    python -m benchmarks.calibration_study --only default --seeds 0,1,2
    python -m benchmarks.calibration_study --only ratios
    python -m benchmarks.calibration_study --only ablations,scopes,losses,selection \
        --config configs/calib.yaml --steps 400

Every variant is `configs/calib_full.yaml`, or `--config`, with a few options changed. It is trained, exported and
evaluated on the same test clips, into a folder of its own; a variant whose evaluation is there already is not run
again, so that a study can be stopped, and parts of it run side by side. Then `study.json`, `study.md` and `study.png`
are made of all that is there. Clips are encoded once for all variants of a process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer, seed_everything
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from acckv.errors import InputError
from acckv.metrics import PairedComparison
from acckv.report.files import whole_file
from acckv.report.results import CONTROLS, FULL, PREDICTIONS_FILE, REFERENCE_NAMES, RESULTS_FILE
from acckv.weights import WEIGHT_GROUPS
from benchmarks.generalisation import paired, read_scores
from lightning_modules.calibration import CalibrationModule
from lightning_modules.callbacks import ExportCompressor
from lightning_modules.datamodule import AVDataModule
from lightning_modules.doors import quiet_libraries
from lightning_modules.evaluation_data import EvaluationData
from lightning_modules.evaluation_run import CALIBRATED, POLICIES, EvaluationOptions, run_evaluation

FORMAT = 1
RATIOS = (0.5, 0.2, 0.1, 0.05, 0.02)
FILE, TEXT_FILE, PLOT, TIMES_FILE = "study.json", "study.md", "study.png", "times.json"
GROUPS = tuple(WEIGHT_GROUPS)


@dataclass(frozen=True)
class Variant:
    """A calibration that differs from the default.

    Attributes:
        name: of its folder; label: in tables; options: of the module that are changed.
    """

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)


def _up_to(group: str, **options: Any) -> dict[str, Any]:
    """Only the weights up to a group learn, and no LoRA."""
    return {"learn": GROUPS[: GROUPS.index(group) + 1], "lora_rank": 0, **options}


def _without(group: str) -> tuple[str, ...]:
    return tuple(name for name in GROUPS if name != group)


MERGING = {"overrides": {"integration": True}}
STUDIES: dict[str, tuple[Variant, ...]] = {
    "default": (Variant("default", "the default"),),
    "ablations": (
        Variant("budgets", "budgets only", _up_to("budgets")),
        Variant("gains", "+ gains", _up_to("gains")),
        Variant("probes", "+ probes", _up_to("probes")),
        Variant("scorer", "+ scorer", _up_to("scorer")),
        Variant("redundancy", "+ competition of neighbours", _up_to("redundancy")),
        Variant("merging", "+ merge weights (merging on)", _up_to("merging", **MERGING)),
        Variant("alignment", "+ alignment (merging on)", _up_to("alignment", **MERGING)),
        Variant("lora_merging", "+ LoRA (merging on)", MERGING),
        Variant("lora", "all, merging off (the default)"),
        Variant("only_scorer", "scorer and probes alone", {"learn": ("probes", "scorer"), "lora_rank": 0}),
        Variant("only_lora", "LoRA alone", {"learn": ()}),
        Variant("no_budgets", "default without learned budgets (focusing)", {"learn": _without("budgets")}),
        Variant("no_gains", "default without gains and redistribution", {"learn": _without("gains")}),
        Variant("no_alignment", "default without cross-calibration", {"learn": _without("alignment")}),
        Variant("no_scorer", "default without the scorer", {"learn": _without("scorer")}),
        Variant("no_redundancy", "default without competition", {"learn": _without("redundancy")}),
    ),
    "scopes": (
        Variant("rank0", "weights only (rank 0)", {"lora_rank": 0}),
        Variant("attention", "LoRA on attention alone", {"lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj")}),
        Variant("all", "LoRA of scope 'all'", {"lora_scope": "all"}),
    ),
    # Where a single ratio could win: from 0.1 on the default is within a point of the full cache itself.
    "ratios": tuple(
        Variant(f"at{ratio:g}", f"trained at {ratio:g} alone", {"ratio_min": ratio, "ratio_max": ratio})
        for ratio in (0.02, 0.05)
    ),
    "losses": (
        Variant("reverse", "reverse KL", {"divergence": "reverse"}),
        Variant("hidden", "KL and hidden states", {"match": "hidden"}),
        Variant("attention_output", "KL and attention outputs", {"match": "attention"}),
    ),
    "selection": (
        Variant("share_heads", "one selection for all KV heads", {"overrides": {"share_heads": True}}),
        Variant("soft", "gates end at 0.04", {"temperature_end": 0.04}),
        Variant("no_probes", "no probe queries", {"learn": _without("probes"), "probe_queries": 0}),
    ),
}
DEFAULT, SHORT = "default", "lora"
"""The default calibration, and the same for as many steps as the other variants."""
TITLES: dict[str, tuple[str, str | None]] = {
    "ablations": ("What each part is worth", None),
    "scopes": ("What LoRA adapts, and what that costs", SHORT),
    "ratios": ("One export for all ratios, or one for each", DEFAULT),
    "selection": ("Selection", SHORT),
    "losses": ("Loss", SHORT),
}
"""Study -> title of its table, and the variant that it is compared with."""
START, END = "<!-- study: written by benchmarks.calibration_study --readme -->", "<!-- end of study -->"


def plain_trainer(config: dict[str, Any], steps: int, folder: Path, **options: Any) -> Trainer:
    """A trainer of a config's kind that leaves no logs and no checkpoints."""
    return Trainer(
        accelerator=config["trainer"]["accelerator"],
        devices=1,
        max_epochs=1,
        max_steps=steps,
        gradient_clip_val=config["trainer"]["gradient_clip_val"],
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


class Study:
    """Trains and evaluates variants into one folder.

    Args:
        given: of the command line.
    """

    def __init__(self, given: argparse.Namespace, console: Console) -> None:
        self.given, self.console = given, console
        self.config: dict[str, Any] = yaml.safe_load(given.config.read_text(encoding="utf-8"))
        options = {**self.config["data"], "keep": "prefill", "cache_dir": given.cache_dir}
        self.data = AVDataModule(**options)

    def run(self, variant: Variant, seed: int) -> None:
        """Train, export and evaluate, unless it was done."""
        folder = self.given.output / variant.name / f"seed{seed}"
        if (folder / RESULTS_FILE).is_file():
            return
        self.console.print(f"{variant.label}, seed {seed}", highlight=False)
        seed_everything(seed, verbose=False)
        self.data.reorder(seed)
        given = self.config["model"] | variant.options | {"seed": seed}
        module = CalibrationModule(**given)
        steps = self.given.steps or self.config["trainer"]["max_steps"]
        trainer = plain_trainer(self.config, steps, folder, limit_val_batches=0, callbacks=[ExportCompressor()])
        start = time.monotonic()
        trainer.fit(module, self.data)
        took = time.monotonic() - start
        self.evaluate(folder, [CALIBRATED], [1.0, *RATIOS, 0.0], folder / "export")
        with whole_file(folder / TIMES_FILE) as file:
            file.write_text(json.dumps({"steps": trainer.global_step, "training_seconds": round(took)}) + "\n")

    def evaluate(self, folder: Path, policies: Sequence[str], ratios: Sequence[float], compressor: Path) -> None:
        """Evaluate on the test clips; the results come last, so that they mark the variant as done."""
        given = self.given
        run_evaluation(
            EvaluationOptions(
                compressor=str(compressor),
                policies=list(policies),
                ratios=list(ratios),
                output=str(folder),
                overwrite=True,
                data=EvaluationData(clips=given.clips, seed=given.clips_seed, cache_dir=given.cache_dir),
                update_card=False,
            ),
            console=Console(quiet=True, width=200),
        )

    def training_free(self) -> Path:
        """Every training-free policy on the same questions."""
        folder = self.given.output / "training_free"
        if not (folder / RESULTS_FILE).is_file():
            self.console.print("training-free policies")
            names = [name for name in POLICIES if name not in (FULL, CALIBRATED)]
            self.evaluate(folder, names, RATIOS, folder)
        return folder


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


Scores = dict[str, tuple[float, int]]


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
        share = _compared(mean, runs[0][FULL, 1.0])
        names = [name for name, at in rivals if at == ratio and name not in (FULL, *CONTROLS)]
        best = max(names, key=lambda name: _mean(rivals[name, ratio]), default=None)
        lead = None if best is None else _compared(mean, rivals[best, ratio])
        lines.append(
            Line(
                variant=variant.name,
                label=variant.label,
                ratio=ratio,
                questions=len(mean),
                steps=times[0]["steps"],
                training_seconds=sum(took["training_seconds"] for took in times) / len(times),
                seeds=[_mean(run) for run in each],
                accuracy=_mean(mean),
                relative=float(share.compute()["relative"]),
                relative_ci95=tuple(share.relative_interval() or (0.0, 0.0)),  # type: ignore[arg-type]
                best=best,
                lead=None if lead is None else float(lead.compute()["difference"]),
                lead_ci95=None if lead is None else tuple(lead.difference_interval()),  # type: ignore[arg-type]
            )
        )
    return lines


def _compared(ours: Scores, theirs: Scores) -> PairedComparison:
    comparison = PairedComparison()
    comparison.update(*paired(ours, theirs))
    return comparison


def _mean(scores: Scores) -> float:
    return sum(score for score, _ in scores.values()) / len(scores)


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
    """The tables of the README's section.

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
    for name, (title, reference) in TITLES.items():
        variants = [variant.name for variant in STUDIES[name]]
        chosen = [line for line in lines if line.variant in (reference, *variants)]
        chosen.sort(key=lambda line: [reference, *variants].index(line.variant))
        if {line.variant for line in chosen} - {reference}:
            text += ["", f"#### {title}", "", f"In % of the full cache's accuracy. {_how(chosen)}:", ""]
            text += _variants(chosen, costs if name == "scopes" else ())
    if scorers:
        text += ["", "#### What the scorer sees, and its size", ""]
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
    for name in dict.fromkeys(key.split("@")[0] for key in training_free):
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
    """A row a variant: share of the full cache's accuracy in %; with costs, time and memory of a step too."""
    ratios = list(dict.fromkeys(line.ratio for line in lines))
    numbers = sorted({row["questions"] for row in costs})
    prices = [f"{what} ({number})" for what in ("time", "memory") for number in numbers]
    text = _header("", *(f"{ratio:g}" for ratio in ratios), *prices)
    for name in dict.fromkeys(line.variant for line in lines):
        rows = [line for line in lines if line.variant == name]
        cells = [f"{100 * row.relative:.1f}" for row in rows]
        for what in ("time", "memory"):
            found = {row["questions"]: row[what] for row in costs if row["variant"] == name}
            cells += [f"{found[number]:.2f}" for number in numbers]
        text.append(f"| {rows[0].label} | " + " | ".join(cells) + " |")
    if costs:
        text += ["", "Time and memory of a step are shares of a plain LoRA fine-tuning step's on the same batch"]
        text += [f"(`benchmarks.calibration_step`), with {', '.join(map(str, numbers))} questions a clip."]
    return text


def _header(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(names)} |".replace("|  |", "| |"), "|---" * len(names) + "|"]


def _range(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"({100 * ends[0]:.1f} to {100 * ends[1]:.1f})"


def write_section(readme: Path, text: str) -> None:
    """Put tables between the study's marks of a file.

    Raises:
        InputError: it has no such marks.
    """
    whole = readme.read_text(encoding="utf-8")
    before, start, rest = whole.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise InputError(f"has no section between {START} and {END}", source=readme)
    with whole_file(readme) as file:
        file.write_text(f"{before}{START}\n\n{text}\n{END}{after}", encoding="utf-8")


def plot(path: Path, lines: Sequence[Line], rivals: dict[tuple[str, float], Scores]) -> None:
    """Write a PNG: the default against the training-free policies over ratios, and the variants beside one another."""
    variants = [name for name in dict.fromkeys(line.variant for line in lines) if name != DEFAULT]
    figure = Figure(figsize=(13 if variants else 7, max(4.5, 1.2 + 0.3 * len(variants))), layout="constrained")
    panels = figure.subplots(1, 2 if variants else 1, squeeze=False)[0]
    left = panels[0]
    policies = [name for name in dict.fromkeys(name for name, _ in rivals) if name not in (FULL, *CONTROLS)]
    for name in policies:
        left.plot(RATIOS, [100 * _mean(rivals[name, ratio]) for ratio in RATIOS], color="#bbbbbb", linewidth=1)
    strongest = {ratio: max(policies, key=lambda name: _mean(rivals[name, ratio])) for ratio in RATIOS}
    best = [100 * _mean(rivals[strongest[ratio], ratio]) for ratio in RATIOS]
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of all variants")
    parser.add_argument("--config", type=Path, default=Path("configs/calib_full.yaml"), help="the default calibration")
    parser.add_argument(
        "--only", default=",".join(STUDIES), help=f"of {', '.join(STUDIES)}, separated by commas; or none"
    )
    parser.add_argument("--seeds", default="0", help="seeds of each variant, separated by commas")
    parser.add_argument("--steps", type=int, help="of training; the default config's, if not given")
    parser.add_argument("--clips", type=int, default=96, help="test clips, 11 questions each")
    parser.add_argument("--clips-seed", type=int, default=1, help="of the test clips")
    parser.add_argument("--cache-dir", default=None, help="of the generated clips")
    parser.add_argument(
        "--costs", type=Path, help="what benchmarks.calibration_step wrote, for a table of LoRA's scopes"
    )
    parser.add_argument("--scorers", type=Path, help="file of benchmarks.scorer_study, for a table of them")
    parser.add_argument("--readme", type=Path, help="file whose section between the study's marks is replaced")
    given = parser.parse_args(arguments)
    quiet_libraries()
    console = Console(width=170)
    names = [name for name in given.only.split(",") if name and name != "none"]
    for name in names:
        if name not in STUDIES:
            parser.error(f"--only: {name!r} is not one of {', '.join(STUDIES)}")
    study = Study(given, console)
    for seed in (int(part) for part in given.seeds.split(",")):
        for name in names:
            for variant in STUDIES[name]:
                study.run(variant, seed)
    rivals = read_scores(study.training_free() / PREDICTIONS_FILE)
    lines = [line for group in STUDIES.values() for v in group for line in lines_of(given.output, v, rivals)]
    costs = json.loads(given.costs.read_text(encoding="utf-8"))["rows"] if given.costs else []
    scorers = json.loads(given.scorers.read_text(encoding="utf-8")) if given.scorers else {}
    training_free = {f"{name}@{ratio:g}": _mean(scores) for (name, ratio), scores in rivals.items()}
    values = {"format": FORMAT, "training_free": training_free, "rows": [asdict(line) for line in lines]}
    with whole_file(given.output / FILE) as file:
        file.write_text(json.dumps(values, indent=1) + "\n")
    text = markdown(lines, training_free, costs, scorers)
    with whole_file(given.output / TEXT_FILE) as file:
        file.write_text(text, encoding="utf-8")
    if given.readme:
        write_section(given.readme, text)
    plot(given.output / PLOT, lines, rivals)
    console.print(table(lines))


if __name__ == "__main__":
    main()
