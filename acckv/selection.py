"""From scores and budgets to gates: exact top-k at inference, its differentiable twin in training.

``B`` batch, ``K`` KV heads, ``N`` entries. A budget is a count of entries, one for each row and head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hard_gates(score: Tensor, members: Tensor, budget: Tensor) -> Tensor:
    """1 for the `budget` best members of each row and head, else 0.

    Args:
        score: ``[B, K, N]``; members: bool ``[B, 1, N]``; budget: ``[B, K or 1]`` whole numbers.

    Returns:
        float ``[B, K, N]``. Equal scores keep the earlier entry.
    """
    masked = score.detach().masked_fill(~members, -torch.inf)
    wanted = budget.round().long().clamp(0, score.shape[-1]).expand(score.shape[:-1])[..., None]
    best = masked.topk(max(int(wanted.max()), 1) if score.shape[-1] else 0, dim=-1).values
    # The least score that is kept; above it all are, and of those that equal it the first ones.
    least = best.gather(-1, (wanted - 1).clamp_min(0)).masked_fill(wanted == 0, torch.inf)
    above, equal = masked > least, masked == least
    kept = above | (equal & (equal.cumsum(-1) <= wanted - above.sum(-1, keepdim=True)))
    return (kept & members).to(masked.dtype)


def soft_log_gates(score: Tensor, members: Tensor, budget: Tensor, temperature: float, iterations: int = 18) -> Tensor:
    """Log of ``sigmoid((score - theta) / temperature)`` with theta solved so that the gates sum to the budget.

    Theta is found by bisection without gradients and refined by one Newton step with them, which gives the exact
    gradient of the implicit function to scores and budget.

    Args:
        score: ``[B, K, N]``; members: bool ``[B, 1, N]``; budget: ``[B, K or 1]``, any real number.

    Returns:
        ``[B, K, N]``; -inf for entries that are no members.
    """
    count = members.sum(-1).to(score.dtype)
    # A gate sum of exactly 0 or N needs an infinite theta.
    target = torch.minimum(budget.clamp_min(0.05), (count - 0.05).clamp_min(0.05)).expand(score.shape[:-1])
    with torch.no_grad():
        present = members.any(-1)
        low = torch.where(present, score.masked_fill(~members, torch.inf).amin(-1), 0.0) - 20 * temperature
        open_to = score.masked_fill(~members, -torch.inf)  # the gate of -inf is exactly 0
        high = torch.where(present, open_to.amax(-1), 0.0) + 20 * temperature
        for _ in range(iterations):
            middle = (low + high) / 2
            too_many = torch.sigmoid((open_to - middle[..., None]) / temperature).sum(-1) > target
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        start = (low + high) / 2
        gates = torch.sigmoid((open_to - start[..., None]) / temperature)
        slope = (gates * (1 - gates)).sum(-1) / temperature + 1e-4
    theta = start + (_gate_sum(score, members, start, temperature) - target) / slope
    return F.logsigmoid((score - theta[..., None]) / temperature).masked_fill(~members, -torch.inf)


def _gate_sum(score: Tensor, members: Tensor, theta: Tensor, temperature: float) -> Tensor:
    return (torch.sigmoid((score - theta[..., None]) / temperature) * members).sum(-1)
