"""Accuracy over all questions and by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class GroupedAccuracy(Metric):
    """Mean item score over all items and over each named group.

    An item's score is 1 or 0 for a one-word answer and the share of right words for a description. An item may be in
    any number of groups.

    Args:
        groups: names of the groups, in the order of the columns of `members`.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, groups: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if len(set(groups)) != len(groups):
            raise ValueError(f"group names must differ, got {list(groups)}")
        self.groups = tuple(groups)
        # of all, then of each group
        self.add_state("sums", torch.zeros(1 + len(groups)), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(1 + len(groups), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, members: Tensor) -> None:
        """Add items.

        Args:
            scores: [items] float in 0..1.
            members: [items, groups] bool, whether the item is in the group.

        Raises:
            ValueError: a shape that does not fit the other, or a score outside 0..1.
        """
        if scores.dim() != 1 or members.shape != (len(scores), len(self.groups)):
            expected = f"scores [n], members [n, {len(self.groups)}]"
            raise ValueError(f"expected {expected}, got {tuple(scores.shape)}, {tuple(members.shape)}")
        if scores.numel() and not bool(((scores >= 0) & (scores <= 1)).all()):
            raise ValueError("item scores must be between 0 and 1")
        inside = torch.cat([members.new_ones(len(scores), 1), members], dim=1).bool()
        self.sums += torch.stack([scores[column].float().sum() for column in inside.T])
        self.counts += inside.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """`{"accuracy": mean score, "n": items}` and, for each group, `<name>/accuracy` and `<name>/n`.

        The accuracy of an empty group is nan.
        """
        result: dict[str, Tensor] = {}
        prefixes = ("", *(f"{name}/" for name in self.groups))
        for prefix, mean, count in zip(prefixes, self.sums / self.counts, self.counts, strict=True):
            result |= {f"{prefix}accuracy": mean, f"{prefix}n": count}
        return result
