"""What is wrong with the options of a calibration, before anything is loaded."""

from __future__ import annotations

from typing import Any

from acckv.errors import InputError
from acckv.method.weights import WEIGHT_GROUPS
from lightning_modules.calibration.schedule import LOW_RATIO_REACH


def check_options(options: Any) -> None:
    """Refuse what cannot be trained.

    Args:
        options: hyperparameters of :class:`~lightning_modules.calibration.module.CalibrationModule`.

    Raises:
        InputError: it names the option.
    """
    for name in ("ratio_min", "ratio_max"):
        if not 0 < options[name] <= 1:
            raise InputError(f"{options[name]} is not above 0 and at most 1", field=f"model.{name}")
    if options.ratio_min > options.ratio_max:
        raise InputError(f"{options.ratio_min} is more than ratio_max, {options.ratio_max}", field="model.ratio_min")
    for name in options.trainable:
        if name not in WEIGHT_GROUPS:
            raise InputError(f"{name!r} is not one of {', '.join(WEIGHT_GROUPS)}", field="model.trainable")
    if not options.trainable and options.lora_rank <= 0:
        raise InputError("is empty, and there is no LoRA either", field="model.trainable")
    for name in ("full_cache_probability", "low_ratio_share"):
        if not 0 <= options[name] < 1:
            raise InputError(f"{options[name]} is not at least 0 and below 1", field=f"model.{name}")
    for name in ("feature_loss_weight", "feature_loss_min_ratio"):
        if options[name] < 0:
            raise InputError(f"{options[name]} is below 0", field=f"model.{name}")
    if options.ratio_power <= 0:
        raise InputError(f"{options.ratio_power} is not above 0", field="model.ratio_power")
    if not 0 < options.temperature_end <= options.temperature_start:
        raise InputError("needs 0 < temperature_end <= temperature_start", field="model.temperature_end")
    if options.low_ratio_share:
        _check_low_ratio_stage(options)
    if not 0 < options.anneal_fraction <= 1:
        raise InputError(f"{options.anneal_fraction} is not above 0 and at most 1", field="model.anneal_fraction")


def _check_low_ratio_stage(options: Any) -> None:
    if options.temperature_after_low_ratio < options.temperature_end:
        raise InputError("is below temperature_end", field="model.temperature_after_low_ratio")
    if LOW_RATIO_REACH * options.ratio_min >= options.ratio_max:
        raise InputError(f"leaves no ratio above {LOW_RATIO_REACH:g} times ratio_min", field="model.ratio_max")
    if options.lora_scope == "all":
        raise InputError("has an adapter of its own, which cannot act on the prompt", field="model.low_ratio_share")
