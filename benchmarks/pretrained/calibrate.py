"""Calibrations of the decoder on clips of chosen kinds, by train.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from acckv.data.calibration_record import Objective
from acckv.errors import InputError
from acckv.export import CONFIG
from benchmarks.pretrained.clips import write_clips
from benchmarks.pretrained.kinds import SIZES
from benchmarks.pretrained.table import Measurement

TRAIN = Path(__file__).parents[2] / "train.py"
SETTINGS = Path(__file__).with_name("calibration.yaml")
COUNTS = {"train": 240, "validation": 16}
"""Clips of each split, dealt out to the kinds."""


def calibrate(given: Measurement, kinds: Sequence[str], objective: Objective, steps: int) -> Path:
    """The export of a calibration, which is run unless it is there; one that was cut off goes on from its checkpoint.

    Raises:
        InputError: train.py fails; what it says stands above.
    """
    name = f"{objective}-{'+'.join(kinds)}-{given.length}-{steps}"
    folder = given.output / "calibrations" / name
    if not (folder / "export" / CONFIG).exists():
        clips = given.output / "clips" / f"training-{'+'.join(kinds)}-{given.length}"
        write_clips(clips, kinds, COUNTS, SIZES[given.length], given.model, given.processor.tokenizer)
        options = {
            "config": SETTINGS,
            "model.base_model": given.decoder,
            "model.calibrate_for": objective,
            "data.precomputed": clips,
            "trainer.max_steps": steps,
            "trainer.default_root_dir": folder,
        }
        last = folder / "checkpoints" / "last.ckpt"
        if last.exists():
            options["ckpt_path"] = last
        command = [sys.executable, str(TRAIN), "fit", *(f"--{option}={value}" for option, value in options.items())]
        if subprocess.run(command).returncode:
            raise InputError("the calibration ended with an error", source=folder)
    return folder / "export"
