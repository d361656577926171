"""What happens at the end of calibration: the export, and a look at what it is worth."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from acckv.compressor import KVCompressor
from acckv.errors import InputError
from acckv.evaluation.results import CALIBRATED, Results
from acckv.export import LowRatio
from acckv.io.progress import Progress
from acckv.runtime.simulation import disable_checkpointing
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.dataset import CalibrationBatch
from lightning_modules.calibration.fsdp import is_sharded
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.resume import TRAINING, read_checkpoint
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation


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

    Exported is the last step, or where `checkpoint.monitor` names a metric the step that was best by it.

    Args:
        folder: of the export; None is `export` in the trainer's default_root_dir.
        new_tokens: length of the compared answers.
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
        if not _dry(trainer):
            self.step = load_best(trainer, pl_module)
            self.finish(trainer, pl_module)

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
        """Tokens that a session gives to the first turn of every clip at a ratio."""
        turns = batch.turns
        inputs: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": False}
        prefill = batch.prefilled(session, session.planners.policy.rows)
        cache = session.compress(prefill, ratio)
        if module.compression.when == "prompt":
            # The context holds the question: what is compared is read from what was kept of it.
            first = turns.ids.gather(1, (turns.weight > 0).long().argmax(-1, keepdim=True))
            return session.answer(cache, first, **inputs)
        question = (turns.turn == 0) & ((turns.weight == 0) | (turns.weight.cumsum(-1) == turns.weight))
        lengths = question.sum(-1)
        width = int(lengths.max())
        ids = turns.ids.new_zeros(len(lengths), width)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths.tolist()):
            ids[row, width - length :] = turns.ids[row, :length]
            mask[row, width - length :] = 1
        return session.answer(cache, ids, mask, **inputs)


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
        step = checkpoint["global_step"]
        if module.stages.settled(trainer.global_step) and checkpoint[TRAINING]["settled_at"] is None:
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
        if isinstance(pl_module, CalibrationModule) and not _dry(trainer):
            self.finish(trainer, pl_module)

    def finish(self, trainer: Trainer, module: CalibrationModule) -> None:
        """Evaluate the export in the first process."""
        if not trainer.is_global_zero:
            return
        exports = [callback for callback in trainer.callbacks if isinstance(callback, ExportCompressor)]  # type: ignore[attr-defined]
        if not self.clips or not exports:
            return
        data: AVDataModule = trainer.datamodule  # type: ignore[attr-defined]
        options = EvaluationOptions(
            model=str(module.options.base_model),
            compressor=str(exports[0].path(trainer)),
            policies=list(self.policies),
            ratios=[*self.ratios, 0.0],
            when=module.compression.when,
            limit=self.clips,
            output=self.output or str(Path(trainer.default_root_dir) / "eval"),
            overwrite=True,
            dtype=module.options.dtype,
            accelerator=type(trainer.accelerator).name(),  # type: ignore[attr-defined]
            data=EvaluationData(num_workers=data.options.num_workers, **data.media.limits()),
        )
        # An answer without words cannot be scored word by word.
        records = [record for record in data.records("validation") if record.answer.strip()]
        # Of a model that is split over processes this one has a part.
        loaded = None if is_sharded(module) else (module.model, module.processor)
        self.results = run_evaluation(options, "python train.py", questions=(data.benchmark, records), model=loaded)
