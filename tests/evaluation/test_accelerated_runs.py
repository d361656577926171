"""`train.py` and `evaluate.py` on the pretend accelerator: they run, learn and answer there as they do on the CPU."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from acckv.data.synthetic.clips import write_clips
from acckv.evaluation.results import Results
from acckv.models import load_model
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.progress import CalibrationBar
from lightning_modules.cli.train import main
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from tests.evaluation.runs import run
from tests.learned import trained
from tests.support.simulated_accelerator import SimulatedAccelerator
from tests.support.simulated_training import simulated_training

pytestmark = pytest.mark.usefixtures("matrix_attention")

#: Options of a training, beside those that all have.
VARIANTS: dict[str, list[str]] = {
    "all_at_once": [
        "--model.preset=paper",
        "--model.feature_loss=hidden",
        "--model.gradient_checkpointing=true",
        "--model.low_ratio_share=0.5",
        "--model.ratio_min=0.1",
        "--data.cache=prefill",
    ],
    "context": ["--model.divergence=reverse"],
    "prompt": ["--model.when=prompt"],
    "scope_all": ["--model.lora_scope=all"],
    "low_ratio": ["--model.low_ratio_share=0.5", "--model.ratio_min=0.1"],
    "paper": ["--model.preset=paper", "--model.gradient_checkpointing=true"],
    "hidden": ["--model.feature_loss=hidden"],
    "bf16": ["--model.dtype=bfloat16"],
    "bf16_mixed": ["--trainer.precision=bf16-mixed"],
}


#: What is compared of the log.
MEASURES = {"loss", "kl", "val/kl@0.2"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


def train(monkeypatch: pytest.MonkeyPatch, accelerator: str, clips: Path, root: Path, *options: str) -> Path:
    """Two steps of `train.py`; the folder of the run."""
    arguments = {
        "config": "configs/calib.yaml",
        "data.train_clips": 2,
        "data.validation_clips": 1,
        "data.batch_size": 2,
        "data.questions_per_clip": 1,
        "data.cache_dir": clips,
        "evaluation.clips": 0,
        "export.new_tokens": 1,
        "report.every_n_steps": 2,
        "report.ratios": "[0.1]",
        "model.lora_targets": "[q_proj,v_proj]",
        "model.validation_ratios": "[0.2]",
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": accelerator,
        "trainer.default_root_dir": root / accelerator,
    }
    given = [f"--{name}={value}" for name, value in arguments.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", *given, *options])
    main()
    return root / accelerator


def measured(run: Path) -> list[tuple[str, float]]:
    """All losses of the steps and of the validation that a run has logged."""
    with next((run / "logs").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return [(name, float(row[name])) for row in rows for name in sorted(row) if row[name] and name in MEASURES]


def learned(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "export"
    return load_file(folder / "adapter" / "adapter_model.safetensors") | load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "variant",
    [name if name == "all_at_once" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_train(variant: str, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, the export, and the report measure the same as on the CPU, up to how sums are rounded."""
    expected = train(monkeypatch, "cpu", clips, tmp_path, *VARIANTS[variant])
    with simulated_training(monkeypatch) as accelerator:
        found = train(monkeypatch, "sim", clips, tmp_path, *VARIANTS[variant])
    assert accelerator.launches > 1000
    # The device's autocast takes other operations to half precision than the CPU's.
    close = 0.1 if "bf16" in variant else 1e-3
    for (name, one), (same, other) in zip(measured(found), measured(expected), strict=True):
        assert name == same and one == pytest.approx(other, rel=close, abs=1e-4), name
    assert learned(found).keys() == learned(expected).keys()


class SyncsByStep(Callback):
    """Host synchronisations between the begin of each step and that of the next."""

    def __init__(self, accelerator: SimulatedAccelerator) -> None:
        self.accelerator = accelerator
        self.seen: list[Counter[str]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.seen.append(self.accelerator.syncs.copy())

    def steps(self) -> list[Counter[str]]:
        return [after - before for before, after in pairwise(self.seen)]


def test_no_step_waits_for_the_device_to_log(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads a number between the steps that are logged but a bar, once a second."""
    data = AVDataModule(train_clips=2, validation_clips=1, batch_size=2, questions_per_clip=1, cache_dir=str(clips))
    module = CalibrationModule(lora_targets=("q_proj",), compression={"n_probe_queries": 0})
    with simulated_training(monkeypatch, "/lightning") as accelerator:
        monkeypatch.setattr("lightning_modules.calibration.progress.time.monotonic", lambda: 0.0)
        counted = SyncsByStep(accelerator)
        Trainer(
            accelerator="sim",
            devices=1,
            max_steps=4,
            limit_val_batches=0,
            logger=CSVLogger(tmp_path),
            log_every_n_steps=100,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[counted],
            use_distributed_sampler=False,
        ).fit(module, data)
    assert isinstance(module.trainer.progress_bar_callback, CalibrationBar)
    assert float(module.last_step["loss"]) > 0
    assert len(counted.steps()) == 3
    assert not counted.steps()[1] and not counted.steps()[2]


def evaluated(accelerator: str, questions: Path, export: Path, output: Path) -> Results:
    data = EvaluationData(question_file=str(questions), video_root=str(questions.parent / "videos"))
    options = EvaluationOptions(
        compressor=str(export),
        policies="keydiff,acckv-calibrated",
        ratios=[0.2],
        output=str(output / accelerator),
        word_tokens=2,
        description_tokens=2,
        timelines=1,
        accelerator=accelerator,
        data=data,
    )
    return run(options)[0]


def test_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers, kept entries, bytes and timelines from every setting, with an export among them."""
    questions = write_clips(tmp_path / "clips", "test", 1, questions_per_clip=2, workers=1, progress=False)
    model, _ = load_model("tiny")
    export = tmp_path / "export"
    trained(model).save_pretrained(export)
    expected = evaluated("cpu", questions, export, tmp_path)
    with simulated_training(monkeypatch) as accelerator:
        found = evaluated("sim", questions, export, tmp_path)
    assert accelerator.launches > 1000
    assert found.rows == expected.rows
    for name in ("predictions.jsonl", "timelines.safetensors"):
        assert (tmp_path / "sim" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()
