"""Adam for what calibration learns: a learning rate for each kind of weight, and a schedule that begins anew in each
stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from acckv.weights import CalibratedWeights
from lightning_modules.stages import Stages


def scheduled_adam(weights: CalibratedWeights, adapted: Sequence[Parameter], options: Any, stages: Stages) -> Any:
    """Optimiser and schedule as Lightning takes them.

    Args:
        weights: of which those that need gradients are trained; adapted: parameters of LoRA.
        options: hyperparameters of :class:`~lightning_modules.calibration.CalibrationModule`.
    """
    rates = {
        "budget": options.lr_budget,
        "saliency": options.lr_score,
        "signal_mix": options.lr_score,
        "redundancy": options.lr_redundancy,
    }

    groups: dict[float, list[Parameter]] = {}
    for name, parameter in weights.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = next((rate for part, rate in rates.items() if part in name), options.lr_other)
        groups.setdefault(rate, []).append(parameter)
    if adapted:
        groups.setdefault(options.lr_lora, []).extend(adapted)
    optimizer = Adam([{"params": parameters, "lr": rate} for rate, parameters in groups.items()])
    scheduler = LambdaLR(optimizer, lambda step: stages.rate(step, options.warmup))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
