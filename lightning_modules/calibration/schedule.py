"""The schedule of a calibration (its stages, and the ratio, temperature and learning rate of a step), and its Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from acckv.errors import InputError
from acckv.method.weights import CalibratedWeights
from lightning_modules.calibration.config import CalibrationConfig

#: Option with the peak learning rate, by a part of a weight's name; `lr_other` for all others.
RATES = {
    "budget": "lr_budget",
    "saliency": "lr_score",
    "signal_mix": "lr_score",
    "scorer": "lr_scorer",
    "redundancy": "lr_redundancy",
}


@dataclass(frozen=True)
class Schedule:
    """Two stages: a stretch at the least ratio alone, where there is one, then all ratios.

    Args:
        options: of the calibration.
        steps: of the whole training; infinite where it has no end.
        low_ratio_ended: the step with which all ratios began, where they have; it stays, however long a training gets.

    Raises:
        InputError: a share is asked of a training without an end.
    """

    options: CalibrationConfig
    steps: float
    low_ratio_ended: int | None = None

    def __post_init__(self) -> None:
        if self.options.low_ratio_share and math.isinf(self.steps):
            message = "is a share of a training that has no end; set trainer.max_steps"
            raise InputError(message, field="model.low_ratio_share")

    @property
    def low_ratio_steps(self) -> int:
        """Steps of the low-ratio stage; 0 without one."""
        if self.low_ratio_ended is not None:
            return self.low_ratio_ended
        return round(self.options.low_ratio_share * self.steps) if self.options.low_ratio_share else 0

    def in_low_ratio_stage(self, step: int) -> bool:
        """Whether a step sees the least ratio alone."""
        return step < self.low_ratio_steps

    def after_low_ratio_stage(self, step: int) -> bool:
        """Whether there was a low-ratio stage, which is over."""
        return bool(self.low_ratio_steps) and step >= self.low_ratio_steps

    def ends_low_ratio_stage(self, step: int) -> bool:
        """Whether it is the first step after a low-ratio stage."""
        return bool(self.low_ratio_steps) and step == self.low_ratio_steps

    def progress(self, step: int) -> float:
        """Share of a step's stage that is done, 0 to 1."""
        done, of = self._in_stage(step)
        return min(done / of, 1.0)

    def ratio(self, step: int) -> float:
        """The kept share of a step, a function of its number alone: 1, or between the bounds, in the low-ratio stage
        the least one."""
        options = self.options
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        low, high = math.log(options.low_ratio_below or options.ratio_min), math.log(options.ratio_max)
        place, kind = torch.rand(2, generator=generator, device="cpu").tolist()
        if kind < options.full_cache_probability:
            return 1.0
        if self.in_low_ratio_stage(step):
            return options.ratio_min
        return math.exp(low + (high - low) * place**options.ratio_power)

    def repeats_context(self, step: int) -> bool:
        """Whether a step feeds the context in again, in place of questions: of every run of steps, the share asked
        for."""
        share = self.options.repeated_share
        return math.floor((step + 1) * share) > math.floor(step * share)

    def temperature(self, step: int) -> float:
        """Of the gates: it falls geometrically over the first part of each stage."""
        options, after = self.options, self.after_low_ratio_stage(step)
        start = options.temperature_after_low_ratio if after else options.temperature_start
        cooled = min(self.progress(step) / options.anneal_fraction, 1.0)
        return start * (options.temperature_end / start) ** cooled

    def rate(self, step: int) -> float:
        """Learning rate over its peak: in each stage a linear warm-up, then a cosine to 5 %."""
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.progress(step)))
        return min(1.0, (self._in_stage(step)[0] + 1) / max(self.options.warmup, 1)) * decay

    def _in_stage(self, step: int) -> tuple[int, float]:
        """Steps since a step's stage began, and the steps of that stage, at least 1."""
        if self.in_low_ratio_stage(step):
            return step, self.low_ratio_steps
        return step - self.low_ratio_steps, max(self.steps - self.low_ratio_steps, 1)


def scheduled_adam(
    weights: CalibratedWeights, lora: Sequence[Parameter], options: CalibrationConfig, rate: Callable[[int], float]
) -> Any:
    """Optimiser and learning-rate schedule as Lightning takes them.

    Args:
        weights: of which those that need gradients are trained; lora: trained parameters of LoRA.
        rate: learning rate over its peak at a step; asked at each one, since a restored checkpoint may change it.
    """
    # One group for each rate, whatever its value: a checkpoint restores groups by their order.
    groups: dict[str, list[Parameter]] = {}
    for name, parameter in weights.named_parameters():
        if parameter.requires_grad:
            group = next((rate for part, rate in RATES.items() if part in name), "lr_other")
            groups.setdefault(group, []).append(parameter)
    if lora:
        groups["lr_lora"] = list(lora)
    optimizer = Adam(
        [{"params": parameters, "lr": getattr(options, name), "option": name} for name, parameters in groups.items()]
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}


def restart_rates(scheduler: LambdaLR, options: CalibrationConfig) -> None:
    """Let the learning rates of the options hold in a training that goes on, whose state brought its old ones."""
    scheduler.base_lrs = [getattr(options, group["option"]) for group in scheduler.optimizer.param_groups]
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, scheduler.optimizer.param_groups, strict=True)
    for peak, share, group in rates:
        group["initial_lr"], group["lr"] = peak, peak * share(scheduler.last_epoch)
