"""What a calibration is worth on types of questions that it never asked.

    python -m benchmarks.held_out_types --calibrate-for task,general,mixed --steps 400 --output runs/held_out_types

By turns, every type of question that tells one subject of the generated clips is held out: the calibration asks the
others, and its export is measured on those. A calibration for `general` asks nothing, so that one serves all turns. A
run that was cut off goes on where it was. `held_out_types.json` and a table have a row for each type, ratio and choice
of `calibrate_for`, with the best training-free policy on the same questions; `all` was calibrated on every type.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning import seed_everything
from rich import box
from rich.console import Console
from rich.table import Table

from acckv.data.records import Record
from acckv.errors import InputError
from acckv.evaluation.results import CALIBRATED, REFERENCE_NAMES, RESULTS_FILE, Results, Row, read_results
from acckv.export import CONFIG
from acckv.io.files import whole_file
from benchmarks.calibration_study import plain_trainer
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.export import ExportCompressor
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.cli.errors import quiet_libraries
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation

FORMAT = 1
FILE = "held_out_types.json"
SUBJECTS = {
    "colour": ("Visual/Colour", "Audio-Visual/Colour during sound", "Visual/Description", "Audio-Visual/Description"),
    "pitch": ("Audio/Pitch", "Audio-Visual/Pitch during shape", "Audio/Description", "Audio-Visual/Description"),
    "order": ("Visual/After", "Audio/After", "Visual/Description", "Audio/Description", "Audio-Visual/Description"),
    "coincidence": (
        *("Audio-Visual/Shape during sound", "Audio-Visual/Sound during shape", "Audio-Visual/Description"),
        *("Audio-Visual/Pitch during shape", "Audio-Visual/Colour during sound"),
    ),
}
"""Subject -> the types of questions whose answers tell of it."""
OBJECTIVES = ("task", "general", "mixed", "all")


@dataclass(frozen=True)
class Line:
    """A type of question at a ratio; accuracies 0..1.

    Attributes:
        subject: whose types were held out; calibrated_for: one of `OBJECTIVES`.
        full, control: accuracy of the full cache, and with every audio and video entry evicted.
        best: the best training-free policy on this type and at this ratio; best_accuracy: what it reaches.
    """

    subject: str
    type: str
    calibrated_for: str
    ratio: float
    questions: int
    full: float
    control: float
    calibrated: float
    best: str
    best_accuracy: float


class QuestionsWithout(AVDataModule):
    """The clips of a config without the questions of some types.

    Args:
        held_out: the types; options: of the data.
    """

    def __init__(self, held_out: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.held_out = frozenset(held_out)

    def records(self, split: str) -> list[Record]:
        return [record for record in super().records(split) if record.groups[-1] not in self.held_out]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/calib.yaml"), help="of the calibrations")
    parser.add_argument("--output", type=Path, default=Path("runs/held_out_types"), help="folder of everything")
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="held out by turns, separated by commas")
    parser.add_argument("--calibrate-for", default=",".join(OBJECTIVES), help="all: every type is asked about")
    parser.add_argument("--steps", type=int, default=400, help="of a calibration")
    parser.add_argument("--train-clips", type=int, default=768, help="generated clips to calibrate on")
    parser.add_argument("--policies", default="random,keydiff,kvzip", help="training-free rivals")
    parser.add_argument("--ratios", default="0.2,0.1,0.05", help="kept shares above 0 and below 1")
    parser.add_argument("--clips", type=int, default=48, help="test clips")
    parser.add_argument("--seed", type=int, default=1, help="of the test clips")
    parser.add_argument("--cache-dir", default=None, help="of the generated clips")
    given = parser.parse_args(arguments)
    subjects, objectives = given.subjects.split(","), given.calibrate_for.split(",")
    for option, names, known in (("subjects", subjects, SUBJECTS), ("calibrate-for", objectives, OBJECTIVES)):
        for name in names:
            if name not in known:
                parser.error(f"--{option}: {name!r} is not one of {', '.join(known)}")
    quiet_libraries()
    console, lines = Console(width=160), []
    for subject in subjects:
        for objective in objectives:
            console.print(f"{subject} held out, calibrated for {objective}", highlight=False)
            lines += compare(subject, objective, measure(given, subject, calibrate(given, subject, objective)))
    with whole_file(given.output / FILE) as file:
        rows = [asdict(line) for line in lines]
        file.write_text(json.dumps({"format": FORMAT, "steps": given.steps, "rows": rows}, indent=1) + "\n")
    console.print(table(lines))


def calibrate(given: argparse.Namespace, subject: str, objective: str) -> Path:
    """The export of a calibration without a subject's questions, which is run unless it is there."""
    asks = {"general": "nothing", "all": "everything"}.get(objective, f"all but {subject}")
    folder = given.output / objective / asks.replace(" ", "-")
    if not (folder / "export" / CONFIG).is_file():
        config = yaml.safe_load(given.config.read_text(encoding="utf-8"))
        seed_everything(config["seed_everything"], verbose=False)
        trained_for = "task" if objective == "all" else objective
        data = {"train_clips": given.train_clips, "cache_dir": given.cache_dir, "calibrate_for": trained_for}
        held_out = () if objective in ("general", "all") else SUBJECTS[subject]
        trainer = plain_trainer(config, given.steps, folder, limit_val_batches=0, callbacks=[ExportCompressor()])
        module = CalibrationModule(**config["model"] | {"calibrate_for": trained_for})
        trainer.fit(module, QuestionsWithout(held_out, **config["data"] | data))
    return folder / "export"


def measure(given: argparse.Namespace, subject: str, export: Path) -> Results:
    """An export and its rivals on the questions of a subject, measured unless they are there."""
    output = export.parent / subject
    if (output / RESULTS_FILE).is_file():
        return read_results(output / RESULTS_FILE)
    data = EvaluationData(clips=given.clips, seed=given.seed, cache_dir=given.cache_dir)
    options = EvaluationOptions(
        compressor=str(export),
        policies=f"{given.policies},{CALIBRATED}",
        ratios=given.ratios,
        output=str(output),
        overwrite=True,
        data=data,
        update_card=False,
        accelerator="cpu",
    )
    asked = [record for record in data.records() if record.groups[-1] in SUBJECTS[subject]]
    return run_evaluation(options, console=Console(quiet=True), questions=(f"{data.title}, {subject}", asked))


def accuracy(row: Row, kind: str) -> float:
    """Of a row on the questions of a type.

    Raises:
        InputError: no question was of that type.
    """
    found = row.groups[kind].accuracy
    if found is None:
        raise InputError(f"none of them has a question of type {kind!r}; take more", field="clips")
    return found


def compare(subject: str, objective: str, results: Results) -> list[Line]:
    """A row for each type that was asked and each ratio: the export beside the best training-free policy."""
    rows = {(row.policy, row.ratio): row for row in results.rows}
    rivals = {policy for policy, _ in rows} - {CALIBRATED} - REFERENCE_NAMES.keys()
    lines = []
    for kind in SUBJECTS[subject]:
        for ratio in sorted({ratio for _, ratio in rows if 0 < ratio < 1}, reverse=True):
            found = {policy: accuracy(rows[policy, ratio], kind) for policy in (*rivals, CALIBRATED)}
            best = max(sorted(rivals), key=found.__getitem__)
            lines.append(
                Line(
                    subject=subject,
                    type=kind,
                    calibrated_for=objective,
                    ratio=ratio,
                    questions=rows[CALIBRATED, ratio].groups[kind].n,
                    full=accuracy(rows["full", 1.0], kind),
                    control=accuracy(rows["control", 0.0], kind),
                    calibrated=found[CALIBRATED],
                    best=best,
                    best_accuracy=found[best],
                )
            )
    return lines


def table(lines: Sequence[Line]) -> Table:
    """One row a type and ratio, in %, with a column for each choice of `calibrate_for`."""
    objectives = list(dict.fromkeys(line.calibrated_for for line in lines))
    made = Table(title="types that no calibration question was of (but for 'all'); accuracy in %", box=box.SIMPLE_HEAD)
    for name in ("held out", "type", "ratio", "full", "control", *objectives, "best training-free"):
        made.add_column(name, justify="left" if name in ("held out", "type", "best training-free") else "right")
    places = dict.fromkeys((line.subject, line.type, line.ratio) for line in lines)
    for place in places:
        found = {each.calibrated_for: each for each in lines if (each.subject, each.type, each.ratio) == place}
        first = next(iter(found.values()))
        cells = (first.full, first.control, *(found[name].calibrated for name in objectives))
        numbers = (f"{100 * value:.1f}" for value in cells)
        best = f"{100 * first.best_accuracy:.1f} {first.best}"
        made.add_row(first.subject, first.type, f"{first.ratio:g}", *numbers, best)
    return made


if __name__ == "__main__":
    main()
