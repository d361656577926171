"""The worth of an export and the course of its training: a closing evaluation, the budgets as they moved, a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from acckv.compressor import KVCompressor
from acckv.evaluation.results import CALIBRATED, Results
from acckv.io.files import write_text
from acckv.method.weights import CalibratedWeights
from acckv.policies.acckv import CalibratedAccKV
from acckv.report.calibration import KeptShares, RunFacts, render_report, write_budget_history
from acckv.report.plots import plot_budget_history, plot_budgets
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.distributed import is_sharded
from lightning_modules.calibration.export import (
    EndOfCalibration,
    ExportCompressor,
    callbacks_of,
    first_batch,
    takes_part,
)
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation

REPORT_FILE, HISTORY_FILE = "report.md", "budgets.csv"
KEPT_PLOT, HISTORY_PLOT = "kept.png", "budget_history.png"


class EvaluateExport(EndOfCalibration):
    """After the export: the table of evaluate.py on the validation clips, so that a run ends with what it is worth.

    Args:
        clips: clips at most; 0 skips it. With `data.source: folder` the right answers are the teacher's own.
        policies: names of policies, as for evaluate.py.
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

    def finish(self, trainer: Trainer, module: CalibrationModule) -> None:
        """Evaluate the export in the first process."""
        if not trainer.is_global_zero:
            return
        exports = callbacks_of(trainer, ExportCompressor)
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
            accelerator=type(trainer.accelerator).name(),
            data=EvaluationData(num_workers=data.options.num_workers, **data.options.limits()),
        )
        # An answer without words cannot be scored word by word.
        records = [record for record in data.records("validation") if record.answer.strip()]
        # Of a model that is split over processes this one has a part.
        loaded = None if is_sharded(module) else (module.model, module.processor)
        self.results = run_evaluation(
            options, "python train.py", questions=(data.source.names[1], records), model=loaded
        )


class CalibrationReport(EndOfCalibration):
    """Follow the learned budgets through training, and write `report.md` with its plots after the export.

    The history is part of the checkpoint: a resumed run goes on with it. `budgets.csv` is replaced whole each time.

    Args:
        every_n_steps: steps between two notes of the budgets.
        ratios: kept shares that they are noted and reported at.
        folder: folder of the files; None is the trainer's default_root_dir.
    """

    def __init__(
        self,
        every_n_steps: int = 20,
        ratios: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05, 0.02),
        folder: str | None = None,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.ratios = ratios
        self.folder = folder
        self.steps: list[int] = []
        self.temperatures: list[float] = []
        self.shares: list[Tensor] = []
        """Of each noted step: [ratios, layers, 2] share of (video, audio), 1 where the preset left it."""

    def path(self, trainer: Trainer) -> Path:
        """Folder of the report."""
        return Path(self.folder or trainer.default_root_dir)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "temperatures": self.temperatures,
            "ratios": list(self.ratios),
            "shares": torch.stack(self.shares) if self.shares else torch.zeros(0),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["ratios"] == list(self.ratios):
            self.steps, self.temperatures = state_dict["steps"], state_dict["temperatures"]
            self.shares = list(state_dict["shares"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, CalibrationModule) and not self.steps:
            self._note(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if isinstance(pl_module, CalibrationModule) and step % self.every_n_steps == 0 and step not in self.steps[-1:]:
            self._note(trainer, pl_module)

    @torch.no_grad()
    def _note(self, trainer: Trainer, module: CalibrationModule) -> None:
        floor = module.policy.layer_floor
        self.steps.append(trainer.global_step)
        self.temperatures.append(module.schedule.temperature(module.global_step))
        policies = [cast(CalibratedAccKV, module.compressor.planners.at(ratio).policy) for ratio in self.ratios]
        shares = [learned_shares(policy.weights, at, floor) for policy, at in zip(policies, self.ratios, strict=True)]
        self.shares.append(torch.stack(shares).cpu())
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            file = self.path(trainer) / HISTORY_FILE
            write_budget_history(file, self.steps, self.temperatures, self.ratios, self.shares)

    def finish(self, trainer: Trainer, module: CalibrationModule) -> None:
        """Write the report, where there is an export to report on."""
        export = next(iter(callbacks_of(trainer, ExportCompressor)), None)
        if export is None or not takes_part(trainer, module):
            return
        folder, step = self.path(trainer), trainer.global_step if export.step is None else export.step
        evaluation = next(iter(callbacks_of(trainer, EvaluateExport)), None)
        kept = self._kept(trainer, module, export.path(trainer))
        if not trainer.is_global_zero:
            return
        plot_budgets(folder / KEPT_PLOT, kept.entries, kept.full, "calibrated")
        plot_budget_history(folder / HISTORY_PLOT, self.steps, self.ratios, torch.stack(self.shares))
        options, schedule = module.options, module.schedule
        facts = RunFacts(
            model=str(options.base_model),
            when=module.compression.when,
            steps=trainer.global_step,
            planned=int(schedule.steps),
            exported=step,
            temperature=schedule.temperature(step),
            temperature_start=options.temperature_start,
            temperature_end=options.temperature_end,
            ratio_range=(options.ratio_min, options.ratio_max),
            low_ratio_steps=schedule.low_ratio_steps,
            low_ratio_below=options.low_ratio_below,
        )
        text = render_report(facts, kept, evaluation.results if evaluation else None, (KEPT_PLOT, HISTORY_PLOT))
        write_text(folder / REPORT_FILE, text)
        print(f"Report: {folder / REPORT_FILE}")

    @torch.no_grad()
    def _kept(self, trainer: Trainer, module: CalibrationModule, folder: Path) -> KeptShares:
        """The entries that the export keeps of the first validation batch."""
        batch = first_batch(trainer, module)
        with KVCompressor.from_pretrained(folder)(module.model, module.processor) as session:
            prefill = module.teacher.prefill_in(session, batch)
            caches = {ratio: session.compress(prefill, ratio) for ratio in sorted(self.ratios, reverse=True)}
        entries = {ratio: cache.kept_entries().double().cpu() for ratio, cache in caches.items()}
        return KeptShares(entries, next(iter(caches.values())).full_entries().double().cpu())


def learned_shares(weights: CalibratedWeights, ratio: float, floor: float) -> Tensor:
    """Times the preset's budget that each layer gives to (video, audio): [layers, 2], 1 before training."""
    even = torch.full((1, 2), 0.5, device=weights.layer_budget.device)
    layers = weights.layer_shares(ratio, floor)
    split = [weights.modality_shares(layer, even, ratio)[0] / 0.5 for layer in range(len(layers))]
    return layers[:, None] * torch.stack(split)
