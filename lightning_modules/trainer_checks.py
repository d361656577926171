"""What of a Trainer's settings a calibration can be trained under."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision

from acckv.errors import InputError


def check_trainer(trainer: Any) -> None:
    """Refuse what would train something else than was asked for. Ask before anything is loaded.

    Raises:
        InputError: it names the setting and what to set instead.
    """
    if not trainer.fast_dev_run:
        for name, neutral in (("limit_train_batches", 1.0), ("overfit_batches", 0.0)):
            if getattr(trainer, name) != neutral:
                raise InputError(
                    "would end the training before its schedule does; set trainer.max_steps or data.train_clips",
                    field=f"trainer.{name}",
                )
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision):
        raise InputError(
            f"is {plugin.precision}, which would round what is learned; the frozen model alone is in half precision "
            f"with {'bfloat16' if plugin.precision == 'bf16-true' else 'float16'} as model.dtype and 32-true here",
            field="trainer.precision",
        )
    if isinstance(plugin, DoublePrecision):
        raise InputError(
            "is 64-true; take 32-true, bf16-mixed, 16-mixed, bf16-true or 16-true", field="trainer.precision"
        )
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None and trainer.strategy.root_device.type == "cpu":
        raise InputError("is 16-mixed, which needs a GPU; take bf16-mixed", field="trainer.precision")
