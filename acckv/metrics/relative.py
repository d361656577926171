"""A policy against another (usually the full cache) on the same questions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acckv.metrics.gathered import GatheredMetric
from acckv.metrics.intervals import RESAMPLES, Interval, bootstrap_difference, bootstrap_ratio


class PairedComparison(GatheredMetric):
    """Share of and difference to a reference's accuracy, with intervals that are paired by clip.

    Args:
        resamples: bootstrap draws for the intervals.
        seed: of the bootstrap.
    """

    scores: list[Tensor]
    reference: list[Tensor]
    clips: list[Tensor]

    def __init__(self, *, resamples: int = RESAMPLES, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.resamples = resamples
        self.seed = seed
        self.add_gathered("scores", torch.zeros(0))
        self.add_gathered("reference", torch.zeros(0))
        self.add_gathered("clips", torch.zeros(0, dtype=torch.long))

    def update(self, scores: Tensor, reference: Tensor, clips: Tensor) -> None:
        """Add items.

        Args:
            scores: [items] float in 0..1, the policy measured.
            reference: [items] float in 0..1, the reference on the same items in the same order.
            clips: [items] integer label of the clip an item asks about.

        Raises:
            ValueError: lengths that differ.
        """
        if scores.dim() != 1 or reference.shape != scores.shape or clips.shape != scores.shape:
            raise ValueError(
                "scores, reference and clips must be equally long, got "
                f"{tuple(scores.shape)}, {tuple(reference.shape)}, {tuple(clips.shape)}"
            )
        self.scores.append(scores.float())
        self.reference.append(reference.float())
        self.clips.append(clips.long())

    def compute(self) -> dict[str, Tensor]:
        """`{"relative": share of the reference's accuracy (nan where that is 0), "difference": in accuracy}`."""
        scores, reference, _ = self._items()
        mean, base = scores.mean(), reference.mean()
        relative = mean / base if bool(base > 0) else torch.full_like(mean, float("nan"))
        return {"relative": relative, "difference": mean - base}

    def relative_interval(self) -> Interval | None:
        """95 % interval of the share, None where the reference is 0 on every item."""
        scores, reference, clips = self._items()
        if float(reference.sum()) <= 0:
            return None
        return bootstrap_ratio(scores, reference, clips, resamples=self.resamples, seed=self.seed)

    def difference_interval(self) -> Interval:
        """95 % interval of the difference in accuracy."""
        scores, reference, clips = self._items()
        return bootstrap_difference(scores, reference, clips, resamples=self.resamples, seed=self.seed)

    def _items(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gathered("scores"), self.gathered("reference"), self.gathered("clips")
