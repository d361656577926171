"""The settings of a Trainer that a calibration can run under."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision

from acckv.errors import InputError

#: Precision of all weights that a Trainer may be asked for -> dtype of those that are frozen.
FROZEN = {"bf16-true": "bfloat16", "16-true": "float16"}


def freeze_precision(config: Any, given: Collection[str]) -> None:
    """Let a half precision of all weights be that of the frozen model; what is learned stays float32.

    Args:
        config: options of train.py, changed in place; given: names of the model's that were given.

    Raises:
        InputError: another dtype was given.
    """
    asked = config.trainer.precision
    if asked not in FROZEN:
        return
    dtype = FROZEN[asked]
    if "dtype" in given and config.model.dtype != dtype:
        raise InputError(f"is {asked}, and model.dtype is {config.model.dtype}; give one", field="trainer.precision")
    config.trainer.precision, config.model.dtype, config.data.dtype = "32-true", dtype, dtype
    warnings.warn(
        f"trainer.precision {asked}: the frozen model is in {dtype} (model.dtype); what is learned stays float32",
        stacklevel=2,
    )


def check_trainer(trainer: Any) -> None:
    """Refuse settings under which something else would be trained than was asked for; before anything is loaded.

    Raises:
        InputError: it names the setting and what to set instead.
    """
    for name, neutral in (("overfit_batches", 0.0), ("limit_train_batches", 1.0)):
        value = getattr(trainer, name)
        # 1 is one batch, 1.0 are all
        if not trainer.fast_dev_run and (value != neutral or type(value) is not float):
            message = "would end the training before its schedule does; set trainer.max_steps or data.train_clips"
            raise InputError(message, field=f"trainer.{name}")
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision):
        raise InputError(
            f"is {plugin.precision}, which would round what is learned; take 32-true, and {FROZEN[plugin.precision]} "
            "as the model's dtype: the frozen model alone is in half precision then",
            field="trainer.precision",
        )
    if isinstance(plugin, DoublePrecision):
        raise InputError(
            "is 64-true; take 32-true, bf16-mixed, 16-mixed, bf16-true or 16-true", field="trainer.precision"
        )
