"""From scores and budgets to gates: exact top-k at inference, its differentiable twin in training.

``N`` entries; every other axis (batch, KV heads, modalities) is broadcast. A budget is a count of entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: (score [..., N], members [..., N], budget [...]) -> log gates [..., N]
LogGates = Callable[[Tensor, Tensor, Tensor], Tensor]


def hard_topk(score: Tensor, members: Tensor, budget: Tensor) -> Tensor:
    """The selection that is shipped: log gates of 0 and -inf."""
    return torch.where(kept(score, members, budget), 0.0, -torch.inf)


def soft_topk(temperature: float) -> LogGates:
    """The selection that is trained: gates in 0 to 1 that sum to the budget and pass on gradients."""

    def gates(score: Tensor, members: Tensor, budget: Tensor) -> Tensor:
        return soft_log_gates(score, members, budget, temperature)

    return gates


def kept(score: Tensor, members: Tensor, budget: Tensor) -> Tensor:
    """The `budget` best members.

    Args:
        score: ``[..., N]``; members: bool ``[..., N]``; budget: ``[...]`` whole numbers, on any device, of no more than
            there are members.

    Returns:
        bool ``[..., N]``. Equal scores keep the earlier entry.
    """
    masked = torch.where(members, score.detach(), -torch.inf)
    # A stable order keeps the earlier of two that are equal; where an entry stands in it decides.
    order = masked.argsort(dim=-1, descending=True, stable=True)
    best = torch.arange(score.shape[-1], device=budget.device) < budget.round()[..., None]
    best = best.to(score.device).expand(order.shape)
    return torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, best)


def soft_log_gates(score: Tensor, members: Tensor, budget: Tensor, temperature: float, iterations: int = 18) -> Tensor:
    """Log of ``sigmoid((score - theta) / temperature)`` with theta solved so that the gates sum to the budget.

    Theta is found by bisection without gradients and refined by one Newton step with them, which gives the exact
    gradient of the implicit function to scores and budget.

    Args:
        score: ``[..., N]``; members: bool ``[..., N]``; budget: ``[...]``, any real number.

    Returns:
        ``[..., N]``; -inf for entries that are no members.
    """
    scaled = score / temperature
    open_to = scaled.masked_fill(~members, -torch.inf)  # the gate of -inf is exactly 0
    count = members.sum(-1).to(score.dtype)
    # A gate sum of exactly 0 or N needs an infinite theta.
    target = torch.minimum(budget.clamp_min(0.05), (count - 0.05).clamp_min(0.05))
    with torch.no_grad():
        low, high = scaled.aminmax(dim=-1)
        theta, half = (high + low) / 2, (high - low) / 2 + 20  # no gate is open, or shut, 20 beyond all scores
        for _ in range(iterations):
            half = half * 0.5
            surplus = torch.sigmoid(open_to - theta[..., None]).sum(-1) - target
            theta = theta + half * surplus.sign()
    gates = torch.sigmoid(open_to - theta[..., None])
    slope = (gates * (1 - gates)).detach().sum(-1) + 1e-4 * temperature
    theta = theta + (gates.sum(-1) - target) / slope
    return F.logsigmoid(open_to - theta[..., None])
