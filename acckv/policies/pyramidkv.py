"""PyramidKV (arXiv 2406.02069): SnapKV's score, more entries in low layers than in high ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.policies.registry import register_policy
from acckv.policies.snapkv import SnapKV


@register_policy("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Layer budgets on a straight line from the first layer to the last, which gets 1/beta of the average.

    Where the first layer's share of the line exceeds what exists, it keeps everything and the last layer is raised, so
    that the line stays straight and its sum the same (as in the official code).

    Deviation from arXiv 2406.02069: the window that the paper always keeps is text here, which is kept anyway and
    counts in no budget.
    """

    beta: float = field(
        default=20.0,
        metadata={"help": "The average layer's budget over the last layer's; 1 to 1000.", "low": 1, "high": 1000},
    )

    def layer_shares(
        self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor, ratio: float
    ) -> Tensor:
        available = labels.counts().sum(-1).float()
        average = total.float() / len(scores)
        first = torch.minimum(2 * average - average / self.beta, available)
        last = 2 * average - first
        depth = torch.linspace(0, 1, len(scores), device=total.device)
        return torch.lerp(first[:, None], last[:, None], depth)
