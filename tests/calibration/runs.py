"""Short calibrations of the packaged AV-LLM that tests begin, break off and go on with."""

from __future__ import annotations

from collections.abc import Sequence
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
    data = AVDataModule(
        when=options.get("when", "context"),
        train_clips=6,
        validation_clips=2,
        batch_size=2,
        questions_per_clip=2,
        cache_dir=str(cache),
    )
    checkpoint = ModelCheckpoint(dirpath=folder, filename="step-{step}", every_n_train_steps=2, save_top_k=-1)
    end = ExportCompressor(str(folder / "export"), new_tokens=4) if stop is None else StopAfter(stop)
    callbacks: list[Callback] = [checkpoint, end, *also]
    trainer = Trainer(
        max_steps=steps,
        max_epochs=1,  # as in configs/calib.yaml; the loader is then built before a checkpoint is restored
        callbacks=callbacks,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=validate,
        gradient_clip_val=1.0,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module


def trained(module: CalibrationModule) -> dict[str, torch.Tensor]:
    values = {f"compressor.{name}": value for name, value in module.compressor.state_dict().items()}
    lora = module.exported().lora
    return values | (lora.tensors if lora is not None else {})


def moved_weights(module: CalibrationModule) -> set[str]:
    """Names of the weights that are not where they start."""
    weights = module.compressor.weights
    start = CalibratedWeights(*weights.shape).state_dict()
    return {name for name, value in weights.state_dict().items() if not torch.equal(value, start[name])}
