"""A calibration that is stopped (Ctrl-C, a batch system, an error) leaves a checkpoint and an untouched model."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_modules.interrupted import was_interrupted


class StopBetweenSteps(Checkpoint):
    """Ends a training that is asked to stop between two optimiser steps, with a checkpoint, and says how to go on.

    A second Ctrl-C stops at once, in the middle of a step, which no checkpoint can hold. However `fit` ends, the module
    is torn down (Lightning does so only when it ends well), and `last.ckpt` is of the last step.

    A `Checkpoint`, since those come last: one that saves on an exception still finds the module as it was trained.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._step = 0

    # ------------------------------------------------------------- being asked

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._asked, self._step = False, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("Stopping after this step; Ctrl-C again stops at once.", file=sys.stderr, flush=True)

    def _stop_asking(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    # --------------------------------------------------------------- stopping

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step > self._step:  # not between batches that are accumulated
            self._step = trainer.global_step
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training or trainer.validating:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Any) -> None:
        asked = self._asked or trainer.received_sigterm
        if trainer.world_size > 1:  # all stop at the same step
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked or trainer.fast_dev_run:
            return
        self._save(trainer)
        if not trainer.received_sigterm:  # for that Lightning has an exception of its own
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_asking()
        kept = keeper(trainer)
        if kept is not None and kept.save_last:  # it was saved every so many steps
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        file = last_checkpoint(trainer)
        if file is not None:
            trainer.save_checkpoint(file)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_asking()
        stopped = was_interrupted(exception) or trainer.received_sigterm
        if stopped and trainer.is_global_zero and trainer.state.fn == "fit":
            print(f"Stopped at step {trainer.global_step}. {how_to_go_on(last_checkpoint(trainer))}", file=sys.stderr)
        pl_module.teardown(trainer.state.fn or "fit")


def keeper(trainer: Any) -> ModelCheckpoint | None:
    """The callback that keeps the checkpoints of a run."""
    return next((each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)), None)


def last_checkpoint(trainer: Any) -> Path | None:
    """`last.ckpt` of a run, whether it is there or not; None where it keeps no checkpoints."""
    callback = keeper(trainer)
    if callback is None or callback.dirpath is None or trainer.fast_dev_run:
        return None
    return Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"


def how_to_go_on(file: Path | None) -> str:
    """Advice about a run that was stopped."""
    if file is None or not file.is_file():
        return "It has no checkpoint yet."
    return (
        f"Checkpoint: {file}. To go on: python train.py --ckpt_path {file}; "
        f"to export it: python train.py export --ckpt_path {file}"
    )
