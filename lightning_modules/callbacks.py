"""What happens at the end of calibration: the export, and a look at what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from acckv.compressor import KVCompressor
from acckv.report.results import Results
from lightning_modules.calibration import CalibrationModule
from lightning_modules.clip_dataset import CalibrationBatch
from lightning_modules.datamodule import AVDataModule
from lightning_modules.evaluation_run import CALIBRATED, EvaluationOptions, run_evaluation
from lightning_modules.sharding import is_sharded


def _dry(trainer: Any) -> bool:
    """A `fast_dev_run` leaves no files."""
    return bool(trainer.fast_dev_run)


def first_batch(trainer: Any, module: CalibrationModule) -> CalibrationBatch:
    """The first batch of the validation clips, where the module is."""
    loader = trainer.datamodule.val_dataloader()
    return trainer.datamodule.transfer_batch_to_device(next(iter(loader)), module.device, 0)


def takes_part(trainer: Trainer, module: LightningModule) -> bool:
    """Whether this process is needed for a look at the trained model: one, or all where it is split over them."""
    return trainer.is_global_zero or is_sharded(module)


class ExportCompressor(Callback):
    """At the end of training: freeze, export, load the export again and check that it answers as the live module.

    Args:
        folder: of the export; None is `export` in the trainer's default_root_dir.
        new_tokens: length of the compared answers.
    """

    def __init__(self, folder: str | None = None, new_tokens: int = 24) -> None:
        self.folder = folder
        self.new_tokens = new_tokens

    def path(self, trainer: Trainer) -> Path:
        """Folder of the export."""
        return Path(self.folder or Path(trainer.default_root_dir) / "export")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CalibrationModule) or not takes_part(trainer, pl_module) or _dry(trainer):
            return
        folder = self.path(trainer)
        if trainer.is_global_zero:
            pl_module.exported().save_pretrained(folder)
        if is_sharded(pl_module):
            trainer.strategy.barrier()
        batch = first_batch(trainer, pl_module)
        live = self._answers(pl_module, pl_module.live, batch)
        pl_module.teardown("fit")
        with KVCompressor.from_pretrained(folder)(pl_module.model, pl_module.processor) as session:
            reloaded = self._answers(pl_module, session, batch)
        if not torch.equal(live, reloaded):
            raise RuntimeError(f"{folder}: the reloaded export answers otherwise than the live module")
        if trainer.is_global_zero:
            print(f"Exported to {folder}; reloaded, it answers exactly as the live module.")

    def _answers(self, module: CalibrationModule, session: Any, batch: CalibrationBatch) -> torch.Tensor:
        """Tokens that a session gives to the first turn of every clip, at the config's ratio."""
        turns = batch.turns
        inputs: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": False}
        if module.compression.when == "prompt":
            model: Any = module.model
            return model.generate(**batch.inputs, **inputs)
        question = (turns.turn == 0) & ((turns.weight == 0) | (turns.weight.cumsum(-1) == turns.weight))
        lengths = question.sum(-1)
        width = int(lengths.max())
        ids = turns.ids.new_zeros(len(lengths), width)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths.tolist()):
            ids[row, width - length :] = turns.ids[row, :length]
            mask[row, width - length :] = 1
        prefill = batch.prefilled(session, session.compressor.policy.rows)
        return session.answer(session.compress(prefill), ids, mask, **inputs)


class EvaluateExport(Callback):
    """After the export: the table of evaluate.py on the validation clips, so that a run ends with what it is worth.

    Args:
        clips: how many at most; 0 skips it. With `data.source: folder` the right answers are the teacher's own.
        policies: names, as for evaluate.py.
        ratios: kept shares; 0, every audio and video entry evicted, is always measured too.
        output: folder of the results; None is `eval` in the trainer's default_root_dir.
    """

    def __init__(
        self,
        clips: int = 12,
        policies: tuple[str, ...] = ("random", "snapkv", "keydiff", "acckv", CALIBRATED),
        ratios: tuple[float, ...] = (0.2, 0.1, 0.05, 0.02),
        output: str | None = None,
    ) -> None:
        self.clips = clips
        self.policies = policies
        self.ratios = ratios
        self.output = output
        self.results: Results | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CalibrationModule) or not trainer.is_global_zero or _dry(trainer):
            return
        exports = [callback for callback in trainer.callbacks if isinstance(callback, ExportCompressor)]  # type: ignore[attr-defined]
        if not self.clips or not exports:
            return
        data: AVDataModule = trainer.datamodule  # type: ignore[attr-defined]
        options = EvaluationOptions(
            model=str(pl_module.options.base_model),
            compressor=str(exports[0].path(trainer)),
            policies=list(self.policies),
            ratios=[*self.ratios, 0.0],
            when=pl_module.compression.when,
            limit=self.clips,
            output=self.output or str(Path(trainer.default_root_dir) / "eval"),
            overwrite=True,
            description_tokens=max(data.options.max_new_tokens if data.options.source == "folder" else 0, 40),
            dtype=pl_module.options.dtype,
            accelerator="gpu" if trainer.strategy.root_device.type == "cuda" else "cpu",
        )
        # An answer without words cannot be scored word by word.
        records = [record for record in data.records("validation") if record.answer.strip()]
        self.results = run_evaluation(options, "python train.py", questions=(data.benchmark, records))
