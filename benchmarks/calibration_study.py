r"""What calibration buys: the table over seeds, and what each part of it is worth.

    python -m benchmarks.calibration_study --only default --seeds 0,1,2
    python -m benchmarks.calibration_study --only ratios
    python -m benchmarks.calibration_study --only ablations,scopes,losses,selection \
        --config configs/calib.yaml --steps 400

Every variant is `configs/calib_full.yaml`, or `--config`, with a few options changed. It is trained, exported and
evaluated on the same test clips, into a folder of its own; a variant whose evaluation is there already is not run
again, so that a study can be stopped, and parts of it run side by side. Then `study.json`, `study.md` and `study.png`
are made of all that is there, and of the lines of an earlier `study.json` for what was not run (`--earlier`). Clips
are encoded once for all variants of a process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer, seed_everything
from rich.console import Console

from acckv.evaluation.results import CALIBRATED, PREDICTIONS_FILE, RESULTS_FILE
from acckv.io.files import whole_file
from acckv.policies import POLICIES
from benchmarks.generalisation import read_scores
from benchmarks.study_results import RATIOS, TIMES_FILE, lines_of, mean_score, with_earlier
from benchmarks.study_tables import markdown, plot, table, write_section
from benchmarks.study_variants import STUDIES, Variant
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.export import ExportCompressor
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.cli.errors import quiet_libraries
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation

FORMAT = 1
FILE, TEXT_FILE, PLOT = "study.json", "study.md", "study.png"


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
        options = {**self.config["data"], "cache": "prefill", "cache_dir": given.cache_dir}
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
        steps = self.given.steps or variant.steps or self.config["trainer"]["max_steps"]
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
            names = [name for name, policy in POLICIES.items() if not policy.keeps_all]
            self.evaluate(folder, names, RATIOS, folder)
        return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of all variants")
    parser.add_argument("--config", type=Path, default=Path("configs/calib_full.yaml"), help="the default calibration")
    parser.add_argument(
        "--only", default=",".join(STUDIES), help=f"of {', '.join(STUDIES)}, separated by commas; or none"
    )
    parser.add_argument("--seeds", default="0", help="seeds of each variant, separated by commas")
    parser.add_argument("--steps", type=int, help="of training; those of the variant or the config, if not given")
    parser.add_argument("--clips", type=int, default=96, help="test clips, 11 questions each")
    parser.add_argument("--clips-seed", type=int, default=1, help="of the test clips")
    parser.add_argument("--cache-dir", default=None, help="of the generated clips")
    parser.add_argument("--earlier", type=Path, help="study.json whose lines stand for variants that were not run here")
    parser.add_argument(
        "--costs", type=Path, help="what benchmarks.calibration_step wrote, for a table of LoRA's scopes"
    )
    parser.add_argument("--scorers", type=Path, help="file of benchmarks.scorer_study, for a table of them")
    parser.add_argument("--page", type=Path, help="file whose section between the study's marks is replaced")
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
    variants = [variant for group in STUDIES.values() for variant in group]
    lines = [line for variant in variants for line in lines_of(given.output, variant, rivals)]
    if given.earlier:
        lines = with_earlier(lines, given.earlier, variants)
    costs = json.loads(given.costs.read_text(encoding="utf-8"))["rows"] if given.costs else []
    scorers = json.loads(given.scorers.read_text(encoding="utf-8")) if given.scorers else {}
    training_free = {f"{name}@{ratio:g}": mean_score(scores) for (name, ratio), scores in rivals.items()}
    values = {"format": FORMAT, "training_free": training_free, "rows": [asdict(line) for line in lines]}
    with whole_file(given.output / FILE) as file:
        file.write_text(json.dumps(values, indent=1) + "\n")
    text = markdown(lines, training_free, costs, scorers)
    with whole_file(given.output / TEXT_FILE) as file:
        file.write_text(text, encoding="utf-8")
    if given.page:
        write_section(given.page, text)
    plot(given.output / PLOT, lines, rivals)
    console.print(table(lines))


if __name__ == "__main__":
    main()
