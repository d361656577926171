"""The stages of a calibration: a stretch at the lowest ratio alone may come before all ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass

from acckv.errors import InputError

#: What the low-ratio stage learned holds below this many times the lowest ratio.
LOW_RATIO_REACH = 1.5


@dataclass(frozen=True)
class Stages:
    """Where a training stands.

    Args:
        low_ratio_share: share of the steps in the low-ratio stage; 0 for none.
        steps: of the whole training; infinite where it has no end.
        settled_at: the step with which all ratios began, where they have; it stays, however long a training gets.

    Raises:
        InputError: a share is asked of a training without an end.
    """

    low_ratio_share: float
    steps: float
    settled_at: int | None = None

    def __post_init__(self) -> None:
        if self.low_ratio_share and math.isinf(self.steps):
            raise InputError(
                "is a share of a training that has no end; set trainer.max_steps", field="model.low_ratio_share"
            )

    @property
    def first_wide(self) -> int:
        """The step with which all ratios begin."""
        if self.settled_at is not None:
            return self.settled_at
        return round(self.low_ratio_share * self.steps) if self.low_ratio_share else 0

    def is_low_ratio(self, step: int) -> bool:
        """Whether a step sees the lowest ratio alone."""
        return step < self.first_wide

    def settled(self, step: int) -> bool:
        """Whether there was a low-ratio stage, which is over."""
        return bool(self.first_wide) and step >= self.first_wide

    def widens(self, step: int) -> bool:
        """Whether it is the first step after a low-ratio stage."""
        return self.settled(step) and step == self.first_wide

    def place(self, step: int) -> tuple[int, float]:
        """Steps since a step's stage began, and the steps of that stage, at least 1."""
        if self.is_low_ratio(step):
            return step, self.first_wide
        return step - self.first_wide, max(self.steps - self.first_wide, 1)

    def progress(self, step: int) -> float:
        """Share of a step's stage that is done, 0 to 1."""
        done, of = self.place(step)
        return min(done / of, 1.0)

    def rate(self, step: int, warmup: int) -> float:
        """Learning rate over its peak: in each stage a linear warm-up, then a cosine to 5 %."""
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.progress(step)))
        return min(1.0, (self.place(step)[0] + 1) / max(warmup, 1)) * decay
