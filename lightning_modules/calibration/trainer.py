"""The Trainer of train.py, which can also export a checkpoint."""

from __future__ import annotations

import copy
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer

from acckv.errors import InputError
from lightning_modules.calibration.callbacks import EvaluateExport, ExportCompressor
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.report import CalibrationReport
from lightning_modules.calibration.resume import read_checkpoint


class CalibrationTrainer(Trainer):
    """A Trainer with one more door."""

    def export(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, ckpt_path: str | None = None
    ) -> None:
        """Export a checkpoint as the end of a calibration does: validated, compared, evaluated and reported.

        Args:
            model: CalibrationModule.
            datamodule: AVDataModule.
            ckpt_path: the checkpoint: a file, or 'last' or 'best' (by checkpoint.monitor) of the run.

        Raises:
            InputError: there is no such checkpoint.
        """
        if ckpt_path is None:
            raise InputError("is needed: a file, or 'last' or 'best' of the run", field="ckpt_path")
        checkpoint = read_checkpoint(ckpt_path)
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, CalibrationReport) and callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(copy.deepcopy(checkpoint["callbacks"][callback.state_key]))
        self.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])  # the report says at which step it is
        self.validate_loop.inference_mode = False  # LoRA layers are put on and taken off
        self.limit_val_batches = self.limit_val_batches or 1  # the hook below is of the validation
        callbacks.append(_ExportAfterValidation())
        self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path)


class _ExportAfterValidation(Callback):
    """While the model is still there."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CalibrationModule):
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, ExportCompressor | EvaluateExport | CalibrationReport):
                callback.finish(trainer, pl_module)
