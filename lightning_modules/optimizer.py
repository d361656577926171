"""Adam for what calibration learns: a learning rate for each kind of weight, and a schedule for each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def for_all_ratios(step: int) -> float:
        return stages.rate(step, options.warmup)

    def for_lora(step: int) -> float:
        return for_all_ratios(step) * (options.lora_after_tight if stages.settled(step) else 1.0)

    def for_tight(step: int) -> float:
        return 0.0 if stages.settled(step) else for_all_ratios(step)

    groups: dict[tuple[float, Callable[[int], float]], list[Parameter]] = {}
    for name, parameter in weights.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = next((rate for part, rate in rates.items() if part in name), options.lr_other)
        schedule = for_tight if name.startswith("tight.") else for_all_ratios
        groups.setdefault((rate, schedule), []).append(parameter)
    if adapted:
        groups[options.lr_lora, for_lora] = list(adapted)
    optimizer = Adam([{"params": parameters, "lr": rate} for (rate, _), parameters in groups.items()])
    scheduler = LambdaLR(optimizer, [schedule for _, schedule in groups])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
