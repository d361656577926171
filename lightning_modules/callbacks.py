"""What happens at the end of calibration: the export, and a look at what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from acckv.compressor import KVCompressor
from lightning_modules.calibration import CalibrationModule
from lightning_modules.datamodule import CalibrationBatch
from lightning_modules.evaluation_data import EvaluationData
from lightning_modules.evaluation_run import EvaluationOptions, run_evaluation


def _dry(trainer: Any) -> bool:
    """A `fast_dev_run` leaves no files."""
    return bool(trainer.fast_dev_run)


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
        if not isinstance(pl_module, CalibrationModule) or not trainer.is_global_zero or _dry(trainer):
            return
        folder = self.path(trainer)
        pl_module.exported().save_pretrained(folder)
        batch = self._batch(trainer, pl_module)
        live = self._answers(pl_module, pl_module.live, batch)
        pl_module.teardown("fit")
        with KVCompressor.from_pretrained(folder)(pl_module.model, pl_module.processor) as session:
            reloaded = self._answers(pl_module, session, batch)
        if not torch.equal(live, reloaded):
            raise RuntimeError(f"{folder}: the reloaded export answers otherwise than the live module")
        print(f"Exported to {folder}; reloaded, it answers exactly as the live module.")

    def _batch(self, trainer: Trainer, module: CalibrationModule) -> CalibrationBatch:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        return trainer.datamodule.transfer_batch_to_device(next(iter(loader)), module.device, 0)  # type: ignore[attr-defined]

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
        prefill = session.prefill(batch.embedded, session.compressor.policy.rows, **batch.inputs)
        return session.answer(session.compress(prefill), ids, mask, **inputs)


class EvaluateExport(Callback):
    """After the export: the table of evaluate.py on a few clips, so that a run ends with what it is worth.

    Args:
        clips: how many; 0 skips it. Generated clips are of the test split, your own of the validation questions.
        ratios: kept shares.
        output: folder of the results; None is `eval` in the trainer's default_root_dir.
    """

    def __init__(self, clips: int = 12, ratios: tuple[float, ...] = (0.2, 0.05), output: str | None = None) -> None:
        self.clips = clips
        self.ratios = ratios
        self.output = output

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CalibrationModule) or not trainer.is_global_zero or _dry(trainer):
            return
        exports = [callback for callback in trainer.callbacks if isinstance(callback, ExportCompressor)]  # type: ignore[attr-defined]
        if not self.clips or not exports:
            return
        options = trainer.datamodule.options  # type: ignore[attr-defined]
        data = EvaluationData(
            question_file=options.validation_questions,
            video_root=options.video_root,
            cache_dir=options.cache_dir,
            seed=options.seed,
        )
        run_evaluation(
            EvaluationOptions(
                model=str(pl_module.options.base_model),
                compressor=str(exports[0].path(trainer)),
                ratios=list(self.ratios),
                when=pl_module.compression.when,
                limit=self.clips,
                output=self.output or str(Path(trainer.default_root_dir) / "eval"),
                dtype=pl_module.options.dtype,
                data=data,
                accelerator="gpu" if pl_module.device.type == "cuda" else "cpu",
            ),
            command=f"python evaluate.py --compressor {exports[0].path(trainer)} --limit {self.clips}",
        )
