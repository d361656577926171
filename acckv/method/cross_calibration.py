"""AccKV steps 3 and 4: intra-modal integration and cross-calibration.

Written on gates in 0 to 1, so that the hard selection of inference (0 or 1) and the soft one of training are the same
code. ``B`` batch, ``K`` KV heads, ``N`` prompt entries, ``D`` head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def integrate(keys: Tensor, values: Tensor, gates: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average what a modality loses into one merged entry (docs/method.md, step 3); modalities are never mixed.

    Args:
        keys, values: ``[B, K, N, D]``; gates: ``[B, K, N]``, 1 where kept; members: bool ``[B, 2, N]``.

    Returns:
        merged keys and values ``[B, K, 2, D]`` and their mass ``[B, K, 2]``, the number of entries averaged.
    """
    lost = (1 - gates)[:, :, None, :] * members[:, None]
    mass = lost.sum(-1)
    weights = (lost / mass.clamp_min(1e-6)[..., None]).expand(-1, keys.shape[1], -1, -1)
    merged_keys = (weights @ keys.to(weights.dtype)).to(keys.dtype)
    merged_values = (weights @ values.to(weights.dtype)).to(values.dtype)
    return merged_keys, merged_values, mass.expand(-1, keys.shape[1], -1)


def alignment(keys: Tensor, scale: Tensor, kept: Tensor, count: Tensor) -> Tensor:
    """Mean cosine similarity ``c(j)`` of each key to the kept high-priority keys (docs/method.md, step 4).

    It equals the dot product with the mean of the normalised kept keys, so it costs N x D and not N x N.

    Args:
        keys: ``[B, K, N, D]``; scale: one over their lengths, ``[B, K, N]``.
        kept: gates ``[B, K or 1, N]`` of the kept high-priority entries.
        count: their sum ``[B, K or 1]``, on any device.

    Returns:
        ``[B, K, N]`` in -1 to 1; 0 where nothing was kept.
    """
    keys = keys.float()
    share = count.clamp_min(1e-6).reciprocal().to(keys.device)
    centre = (kept * scale).unsqueeze(2) @ keys * share[..., None, None]
    return (keys @ centre.transpose(-1, -2))[..., 0] * scale


def rebalance(budgets: Tensor, aligned: Tensor, high: Tensor, counts: Tensor) -> Tensor:
    """Hand what the threshold freed to the high-priority modality, then to whatever has room.

    Args:
        budgets: ``[B, K, 2]`` before cross-calibration; aligned: ``[B, K]`` low-priority entries over the threshold;
        high: bool ``[B, 1, 2]``, true at the high-priority modality; counts: ``[B, 1, 2]`` entries that exist.

    Returns:
        ``[B, K, 2]`` with the same sum.
    """
    zero = torch.zeros_like(budgets)
    high_budget, low_budget = (torch.where(side, budgets, zero).sum(-1) for side in (high, ~high))
    room = torch.where(high, counts, zero).sum(-1)
    kept_low = torch.minimum(low_budget, aligned)
    new_high = torch.minimum(room, high_budget + low_budget - kept_low)
    new_low = high_budget + low_budget - new_high
    return torch.where(high, new_high[..., None], new_low[..., None])
