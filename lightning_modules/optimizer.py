"""Adam for what calibration learns: a learning rate for each kind of weight, and one schedule for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from acckv.weights import CalibratedWeights


def scheduled_adam(weights: CalibratedWeights, adapted: Sequence[Parameter], options: Any, steps: float) -> Any:
    """Optimiser and schedule as Lightning takes them: a linear warm-up, then a cosine to 5 % of each rate.

    Args:
        weights: of which those that need gradients are trained; adapted: parameters of LoRA.
        options: hyperparameters of :class:`~lightning_modules.calibration.CalibrationModule`.
        steps: of the whole training; infinite where it has no end, and the rates then stay.
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

    def scale(step: int) -> float:
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
        return min(1.0, (step + 1) / max(options.warmup, 1)) * decay

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, scale), "interval": "step"}}
