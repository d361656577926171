"""What Lightning leaves out when a run ends by an error: the module's teardown."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class TeardownOnException(Checkpoint):
    """Tears the module down when `fit` raises or is interrupted; Lightning does so only when it ends well.

    A `Checkpoint`, since those come last: one that saves on an exception still finds the module as it was trained.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        pl_module.teardown(trainer.state.fn or "fit")
