"""Lines that tell how far a calibration is, where there is no terminal for a progress bar."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from acckv.io.progress import EVERY, Progress


class TrainingProgress(Callback):
    """A line at least every minute where standard output is no terminal: step, loss, kl, ratio, time left and memory.

    On a terminal there is Lightning's progress bar instead (`trainer.enable_progress_bar`), never both.

    Args:
        every_seconds: seconds between two lines at most.
    """

    def __init__(self, every_seconds: float = EVERY) -> None:
        self.every_seconds = every_seconds
        self._tasks: list[Progress] = []

    def _begin(self, trainer: Trainer, what: str, total: int | None = None, **options: Any) -> None:
        if trainer.is_global_zero and not sys.stdout.isatty():
            task = Progress(what, total, every=self.every_seconds, bar=False, **options)
            self._tasks.append(task.__enter__())

    def _end(self, ended_well: bool = True) -> None:
        if self._tasks:
            self._tasks.pop().close(ended_well)

    def _advance(self) -> None:
        if self._tasks:
            self._tasks[-1].advance()

    # ------------------------------------------------------------------ loading

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begin(trainer, "loading the model")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    # ----------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        steps = trainer.estimated_stepping_batches
        total = None if steps == float("inf") else int(steps)
        self._begin(trainer, "training", total, unit="steps", state=lambda: _state(pl_module))
        if self._tasks:
            self._tasks[-1].begin(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._tasks and trainer.global_step > self._tasks[-1].done:
            self._advance()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    # --------------------------------------------------------------- validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._end()
        if not trainer.sanity_checking:
            batches: Any = sum(trainer.num_val_batches)
            self._begin(trainer, f"validation at step {trainer.global_step}", batches, unit="batches")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        while self._tasks:
            self._end(ended_well=False)


class CalibrationBar(RichProgressBar):
    """Lightning's bar with what the last step came to, which is read from the device at most once a second."""

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[str, float] = {}
        self._read_at = -math.inf

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        now, last_step = time.monotonic(), cast(Any, pl_module).last_step
        if now - self._read_at >= 1:
            self._read, self._read_at = {name: float(value) for name, value in last_step.items()}, now
        return {**super().get_metrics(trainer, pl_module), **self._read}


def calibration_bar(trainer: Trainer) -> list[Callback]:
    """The bar in place of Lightning's own, where a trainer has that."""
    bar = trainer.progress_bar_callback
    return [CalibrationBar()] if type(bar) is RichProgressBar else []


def _state(module: Any) -> str:
    """Results of the last step."""
    return ", ".join(f"{name} {float(value):.3g}" for name, value in module.last_step.items())
