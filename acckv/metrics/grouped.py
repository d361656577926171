"""Accuracy over all questions and by group, with what an interval needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from acckv.metrics.gathered import GatheredMetric
from acckv.metrics.intervals import RESAMPLES, Interval, bootstrap_mean


class GroupedAccuracy(GatheredMetric):
    """Mean item score over all items and over each named group, per item kept for intervals.

    An item's score is 1 or 0 for a one-word answer and the share of right words for a description. An item may be in
    any number of groups.

    Args:
        groups: names of the groups, in the order of the columns of `members`.
        resamples: bootstrap draws for the interval.
        seed: of the bootstrap.
    """

    scores: list[Tensor]
    clips: list[Tensor]
    members: list[Tensor]

    def __init__(self, groups: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if len(set(groups)) != len(groups):
            raise ValueError(f"group names must differ, got {list(groups)}")
        self.groups = tuple(groups)
        self.resamples = resamples
        self.seed = seed
        self.add_gathered("scores", torch.zeros(0))
        self.add_gathered("clips", torch.zeros(0, dtype=torch.long))
        self.add_gathered("members", torch.zeros(0, len(self.groups), dtype=torch.bool))

    def update(self, scores: Tensor, clips: Tensor, members: Tensor) -> None:
        """Add items.

        Args:
            scores: [items] float in 0..1.
            clips: [items] integer label of the clip an item asks about.
            members: [items, groups] bool, whether the item is in the group.

        Raises:
            ValueError: a shape that does not fit the others, or a score outside 0..1.
        """
        if scores.dim() != 1 or clips.shape != scores.shape or members.shape != (len(scores), len(self.groups)):
            raise ValueError(
                f"expected scores [n], clips [n], members [n, {len(self.groups)}], got "
                f"{tuple(scores.shape)}, {tuple(clips.shape)}, {tuple(members.shape)}"
            )
        if scores.numel() and not bool(((scores >= 0) & (scores <= 1)).all()):
            raise ValueError("item scores must be between 0 and 1")
        self.scores.append(scores.float())
        self.clips.append(clips.long())
        self.members.append(members.bool())

    def compute(self) -> dict[str, Tensor]:
        """`{"accuracy": mean score, "n": items}` and, for each group, `<name>/accuracy` and `<name>/n`.

        The accuracy of an empty group is nan.
        """
        scores, _, members = self.items()
        result = {"accuracy": scores.mean(), "n": torch.tensor(len(scores))}
        for column, name in enumerate(self.groups):
            inside = members[:, column]
            result[f"{name}/accuracy"] = scores[inside].mean()
            result[f"{name}/n"] = inside.sum()
        return result

    def interval(self) -> Interval:
        """95 % interval of the accuracy over all items; clips are drawn with replacement."""
        scores, clips, _ = self.items()
        return bootstrap_mean(scores, clips, resamples=self.resamples, seed=self.seed)

    def items(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [n], clips [n] and members [n, groups] of every item so far, in the order of the updates."""
        return self.gathered("scores"), self.gathered("clips"), self.gathered("members")
