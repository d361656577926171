"""The end of a calibration: the export, checked against what was trained, and a Trainer that exports a checkpoint."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from acckv.compressor import KVCompressor
from acckv.errors import InputError
from acckv.export import LowRatio
from acckv.io.progress import Progress
from acckv.models.batching import pad_left
from acckv.runtime.simulation import disable_checkpointing
from lightning_modules.calibration.checkpoint import TRAINING, read_checkpoint
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.dataset import CalibrationBatch
from lightning_modules.calibration.distributed import is_sharded
from lightning_modules.calibration.module import CalibrationModule

Kind = TypeVar("Kind", bound=Callback)


def callbacks_of(trainer: Any, kind: type[Kind]) -> list[Kind]:
    """The callbacks of a kind that a trainer has."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]


class EndOfCalibration(Callback):
    """A callback that does its work at the end of a training, or of an exported checkpoint; not of a `fast_dev_run`."""

    def finish(self, trainer: Trainer, module: CalibrationModule) -> None:
        """Do it."""
        raise NotImplementedError

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, CalibrationModule) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.finish(trainer, pl_module)


class ExportCompressor(EndOfCalibration):
    """At the end of training: freeze, export, load the export again and check that it answers as the live module.

    Exported is the last step, or where `checkpoint.monitor` names a metric the step that was best by it.

    Args:
        folder: folder of the export; None is `export` in the trainer's default_root_dir.
        new_tokens: tokens of the compared answers.
    """

    def __init__(self, folder: str | None = None, new_tokens: int = 24) -> None:
        self.folder = folder
        self.new_tokens = new_tokens
        self.step: int | None = None
        """Of what was exported."""

    def path(self, trainer: Trainer) -> Path:
        """Folder of the export."""
        return Path(self.folder or Path(trainer.default_root_dir) / "export")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CalibrationModule):
            return
        if not pl_module.trained_steps:
            message = "no step was trained; raise trainer.max_steps (or max_epochs, max_time), or export a checkpoint"
            raise InputError(f"{message} as it is: python train.py export --ckpt_path FILE")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.step = load_best(trainer, pl_module)
        super().on_fit_end(trainer, pl_module)

    def finish(self, trainer: Trainer, module: CalibrationModule) -> None:
        """Write the export, close the module's session, and compare what is read back with what was trained.

        Raises:
            RuntimeError: the reloaded export differs from the live module.
        """
        if not takes_part(trainer, module):
            return
        self.step = trainer.global_step if self.step is None else self.step
        folder = self.path(trainer)
        disable_checkpointing(module.live.adapter.decoder)
        if not is_sharded(module):
            module.to(trainer.strategy.root_device)  # a Trainer leaves it on the CPU
        exported = module.exported()
        ratios = module.options.ratio_min, module.options.ratio_max
        data: AVDataModule = trainer.datamodule  # type: ignore[attr-defined]
        exported.calibration = data.calibration_record(ratios, self.step)
        exported.asked = data.asked_questions()
        if trainer.is_global_zero:
            exported.save_pretrained(folder)
        if is_sharded(module):
            trainer.strategy.barrier()
        with Progress("comparing the export with what was trained", shown=trainer.is_global_zero):
            self._compare(trainer, module, exported)
        if trainer.is_global_zero:
            print(f"Exported step {self.step} to {folder}; reloaded, it answers exactly as the live module.")

    def _compare(self, trainer: Trainer, module: CalibrationModule, exported: KVCompressor) -> None:
        folder, batch = self.path(trainer), first_batch(trainer, module)
        ratios = [module.compression.ratio, *([module.options.ratio_min] if exported.low_ratio is not None else [])]
        live = [self._answers(module, module.live, batch, ratio) for ratio in ratios]
        module.teardown("fit")
        reloaded = KVCompressor.from_pretrained(folder)
        if differing := different_tensors(exported, reloaded):
            raise RuntimeError(f"{folder}: {', '.join(differing)} differ from what was trained")
        # Merged LoRA rounds otherwise than the layers that were trained.
        with reloaded(module.model, module.processor, lora_mode="separate") as session:
            again = [self._answers(module, session, batch, ratio) for ratio in ratios]
        for ratio, one, other in zip(ratios, live, again, strict=True):
            if not torch.equal(one, other):
                raise RuntimeError(f"{folder}: the reloaded export answers otherwise at {ratio:g} than the live module")

    def _answers(self, module: CalibrationModule, session: Any, batch: CalibrationBatch, ratio: float) -> torch.Tensor:
        """Tokens that a session gives to the first question about every clip at a ratio."""
        limit: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": False}
        cache = session.compress(module.teacher.prefill_in(session, batch), ratio)
        asked = [questions[drawn[0]] for questions, drawn in zip(batch.every, batch.drawn, strict=True)]
        # With `when: prompt` the context holds the question: its last token alone is read again.
        rows = [torch.tensor(question.ids[: question.first + 1]) for question in asked]
        ids, mask = pad_left(rows, 0)
        return session.answer(cache, ids, mask, **limit)


def load_best(trainer: Any, module: CalibrationModule) -> int | None:
    """Put the weights of the best checkpoint in the module, where a metric chose one (`checkpoint.monitor`).

    Returns:
        the step that they are of; None where the weights are left as they are.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        if not callback.best_model_path or not Path(callback.best_model_path).is_file():
            continue
        checkpoint = read_checkpoint(callback.best_model_path)
        step, over = checkpoint["global_step"], module.schedule.after_low_ratio_stage(trainer.global_step)
        if over and checkpoint[TRAINING]["low_ratio_ended"] is None:
            warnings.warn(
                f"the best {callback.monitor} is of step {step}, before ratios above the least were trained; "
                "the last step is exported instead",
                stacklevel=2,
            )
            return None
        module.load_learned(checkpoint)
        score: Any = callback.best_model_score
        best = "" if score is None else f", {float(score):.4g},"
        rank_zero_only(print)(f"The best {callback.monitor}{best} is of step {step}, which is exported.")
        return step
    return None


def different_tensors(one: KVCompressor, other: KVCompressor) -> list[str]:
    """Names of the learned tensors in which two compressors differ, those of the low-ratio stage and LoRA included."""
    found, expected = ({**_learned(each), **_learned(each.low_ratio, "low_ratio.")} for each in (one, other))
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]


def _learned(compressor: KVCompressor | LowRatio | None, prefix: str = "") -> dict[str, torch.Tensor]:
    if compressor is None:
        return {}
    weights = {} if compressor.weights is None else compressor.weights.state_dict()
    lora = {} if compressor.lora is None else compressor.lora.tensors
    parts = {**{f"weights.{name}": value for name, value in weights.items()}, **lora}
    return {f"{prefix}{name}": value.detach().cpu() for name, value in parts.items()}


def first_batch(trainer: Any, module: CalibrationModule) -> CalibrationBatch:
    """The first batch of the validation clips, where the module is."""
    loader = trainer.datamodule.val_dataloader()
    return trainer.datamodule.transfer_batch_to_device(next(iter(loader)), module.device, 0)


def takes_part(trainer: Trainer, module: LightningModule) -> bool:
    """Whether this process is needed for a look at the trained model: one, or all where it is split over them."""
    return trainer.is_global_zero or is_sharded(module)


class CalibrationTrainer(Trainer):
    """A Trainer that can also export a checkpoint."""

    def export(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, ckpt_path: str | None = None
    ) -> None:
        """Export a checkpoint as the end of a calibration does: validated, compared, evaluated and reported.

        Args:
            ckpt_path: the checkpoint: a file, or 'last' or 'best' (by checkpoint.monitor) of the run.

        Raises:
            InputError: there is no such checkpoint.
        """
        if ckpt_path is None:
            raise InputError("is needed: a file, or 'last' or 'best' of the run", field="ckpt_path")
        checkpoint = read_checkpoint(ckpt_path)
        for callback in callbacks_of(self, EndOfCalibration):
            if callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(copy.deepcopy(checkpoint["callbacks"][callback.state_key]))
        self.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])  # the report says at which step it is
        self.validate_loop.inference_mode = False  # LoRA layers are put on and taken off
        self.limit_val_batches = self.limit_val_batches or 1  # the hook below is of the validation
        self.callbacks.append(_ExportAfterValidation())  # type: ignore[attr-defined]
        self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path)


class _ExportAfterValidation(Callback):
    """While the model is still there."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, CalibrationModule):
            for callback in callbacks_of(trainer, EndOfCalibration):
                callback.finish(trainer, pl_module)
