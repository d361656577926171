"""Short calibrations of the packaged AV-LLM that tests begin, break off and go on with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from acckv.method.weights import CalibratedWeights
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.export import ExportCompressor
from lightning_modules.calibration.module import CalibrationModule


class StopAfter(Callback):
    """Ends a run early, as an interruption would, without changing its schedule."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def clip_data(folder: Path, **options: Any) -> AVDataModule:
    """Six generated clips to train on and two to validate on, two a batch."""
    sizes = {"train_clips": 6, "validation_clips": 2, "batch_size": 2}
    return AVDataModule(**{**sizes, "cache_dir": str(folder), **options})


def quiet_trainer(folder: Path, **settings: Any) -> Trainer:
    """A Trainer on the CPU that shows and logs nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{**quiet, "accelerator": "cpu", "num_sanity_val_steps": 0, "default_root_dir": folder, **settings})


@contextmanager
def configured(**options: Any) -> Iterator[CalibrationModule]:
    """A module with its model, outside a Trainer."""
    module = CalibrationModule(**options)
    module.configure_model()
    try:
        yield module
    finally:
        module.teardown("fit")


def fit(
    cache: Path,
    folder: Path,
    steps: int = 4,
    stop: int | None = None,
    resume: Path | None = None,
    also: Sequence[Callback] = (),
    validate: int = 0,
    **options: Any,
) -> CalibrationModule:
    torch.manual_seed(0)
    module = CalibrationModule(**options)
    checkpoint = ModelCheckpoint(dirpath=folder, filename="step-{step}", every_n_train_steps=2, save_top_k=-1)
    end = ExportCompressor(str(folder / "export"), new_tokens=4) if stop is None else StopAfter(stop)
    trainer = quiet_trainer(
        folder,
        max_steps=steps,
        max_epochs=1,  # as in configs/calib.yaml; the loader is then built before a checkpoint is restored
        callbacks=[checkpoint, end, *also],
        limit_val_batches=validate,
        gradient_clip_val=1.0,
    )
    data = clip_data(cache, when=options.get("when", "context"), questions_per_clip=2)
    trainer.fit(module, data, ckpt_path=resume)
    return module


def trained(module: CalibrationModule) -> dict[str, torch.Tensor]:
    values = {f"compressor.{name}": value for name, value in module.compressor.state_dict().items()}
    lora = module.exported().lora
    return values | (lora.tensors if lora is not None else {})


def moved_weights(module: CalibrationModule) -> set[str]:
    """Names of the weights that are not where they start."""
    start = CalibratedWeights(*module.weights.shape).state_dict()
    return {name for name, value in module.weights.state_dict().items() if not torch.equal(value, start[name])}
