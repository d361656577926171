"""Adam for what calibration learns: a learning rate for each kind of weight, and a schedule that begins anew in each
stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from acckv.method.weights import CalibratedWeights
from lightning_modules.calibration.schedule import Stages

#: Option with the peak learning rate, by a part of a weight's name; `lr_other` for all others.
RATES = {"budget": "lr_budget", "saliency": "lr_score", "signal_mix": "lr_score", "redundancy": "lr_redundancy"}


def scheduled_adam(
    weights: CalibratedWeights, adapted: Sequence[Parameter], options: Any, stages: Callable[[], Stages]
) -> Any:
    """Optimiser and schedule as Lightning takes them.

    Args:
        weights: of which those that need gradients are trained; adapted: parameters of LoRA.
        options: hyperparameters of :class:`~lightning_modules.calibration.module.CalibrationModule`.
        stages: of the training, asked at each step: a restored checkpoint may change them.
    """
    # One group for each rate, whatever its value: a checkpoint restores groups by their places.
    groups: dict[str, list[Parameter]] = {}
    for name, parameter in weights.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(next((rate for part, rate in RATES.items() if part in name), "lr_other"), []).append(
                parameter
            )
    if adapted:
        groups["lr_lora"] = list(adapted)
    optimizer = Adam(
        [{"params": parameters, "lr": options[rate], "option": rate} for rate, parameters in groups.items()]
    )
    scheduler = LambdaLR(optimizer, lambda step: stages().rate(step, options.warmup))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def restart_rates(scheduler: LambdaLR, options: Any) -> None:
    """Let the learning rates of the options hold in a training that goes on, whose state brought its old ones."""
    scheduler.base_lrs = [options[group["option"]] for group in scheduler.optimizer.param_groups]
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, scheduler.optimizer.param_groups, strict=True)
    for peak, share, group in rates:
        group["initial_lr"], group["lr"] = peak, peak * share(scheduler.last_epoch)
