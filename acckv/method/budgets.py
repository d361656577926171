"""AccKV step 2, adaptive focusing: how many entries each layer, modality and KV head keeps, exactly.

Budgets are counts of entries that every KV head of a layer keeps; where heads keep different numbers, counts of (head,
entry) pairs. ``L`` layers, ``B`` batch rows, ``K`` KV heads, last axis (video, audio).
"""

from __future__ import annotations

import torch
from torch import Tensor

from acckv.method.topk import LogGates, hard_topk


def focus(score: Tensor, members: Tensor) -> Tensor:
    """Share of attention that each modality of one layer gets: ``W_v`` and ``W_a = 1 - W_v`` (docs/method.md, step 2).

    Args:
        score: ``[B, K, N]`` heavy-hitter score from text rows; members: bool ``[B, 2, N]``.

    Returns:
        ``[B, 2]``; a modality without entries gets 0.
    """
    count = members.sum(-1)
    total = torch.einsum("bkn,bmn->bm", score, members.to(score.dtype)) / score.shape[1]
    mean = total / count.clamp_min(1)
    return mean / mean.sum(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)


def water_fill(total: Tensor, shares: Tensor, capacity: Tensor) -> Tensor:
    """Split `total` in proportion to `shares`, no part above its capacity, the excess handed on to the others.

    Args:
        total: ``[...]`` to be given out; shares: ``[..., P]`` of at least 0; capacity: ``[..., P]``.

    Returns:
        ``[..., P]`` that sums to ``min(total, capacity.sum())``; differentiable in total and shares.
    """
    total = torch.minimum(total, capacity.sum(-1))
    # A share of exactly nothing still takes what no other part has room for.
    shares = shares.clamp_min(1e-12)
    full = torch.zeros_like(capacity, dtype=torch.bool)
    for _ in range(capacity.shape[-1]):
        rest = (total - (capacity * full).sum(-1)).clamp_min(0)
        open_shares = shares * ~full
        amount = rest[..., None] * open_shares / open_shares.sum(-1, keepdim=True).clamp_min(1e-30)
        over = ~full & (amount >= capacity)
        if not bool(over.any()):
            break
        full = full | over
    return torch.where(full, capacity, torch.minimum(amount, capacity))


def round_exactly(amounts: Tensor, total: Tensor, capacity: Tensor) -> Tensor:
    """Whole numbers near `amounts` that sum to exactly `total`: largest remainders first.

    Args:
        amounts: ``[B, P]`` of at least 0; total: int64 ``[B]``; capacity: int64 ``[B, P]``.

    Returns:
        int64 ``[B, P]``, no part above its capacity, rows summing to ``min(total, capacity.sum())``.
    """
    total = torch.minimum(total, capacity.sum(-1))
    # A sum such as 2.9999998 is a 3 that lost its last bit.
    counts = torch.minimum((amounts.double() + 1e-6).floor().long(), capacity)
    excess = counts.sum(-1) - total
    for row in (excess > 0).nonzero().flatten().tolist():  # rounding up of the line above, never more than a few
        for _ in range(int(excess[row])):
            counts[row, counts[row].argmax()] -= 1
    while True:
        missing = total - counts.sum(-1)
        if not bool((missing > 0).any()):
            return counts
        room = capacity - counts
        remainder = (amounts.double() - counts).masked_fill(room <= 0, -torch.inf)
        order = remainder.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        counts = counts + ((rank < missing[:, None]) & (room > 0)).long()


def total_budget(ratio: float, budget: int | None, layers: int, counts: Tensor) -> Tensor:
    """Entries that all layers together may keep: ``floor(ratio * L * n_av)``, or `budget` a layer.

    Args:
        layers: L, or L * K for (head, entry) pairs; counts: int64 ``[B, 2]``: video and audio entries of each row.

    Returns:
        int64 ``[B]``.
    """
    available = counts.sum(-1) * layers
    if budget is not None:
        return torch.minimum(torch.full_like(available, budget * layers), available)
    return (available.double() * ratio + 1e-9).floor().long()


def share_out(total: Tensor, layer_shares: Tensor, capacity: Tensor) -> Tensor:
    """Whole budget of every layer, on the CPU. Where the shares read no score, it is known before the first layer has
    run.

    Args:
        total: int64 ``[B]`` entries over all layers; layer_shares: ``[L]`` or ``[B, L]`` relative budgets;
        capacity: int64 ``[B, L]`` entries that exist.

    Returns:
        int64 ``[B, L]`` that sums to ``min(total, capacity.sum())``.
    """
    total, capacity, shares = total.cpu(), capacity.cpu(), layer_shares.detach().float().cpu()
    amounts = water_fill(total.float(), shares.expand(capacity.shape), capacity.float())
    return round_exactly(amounts, total, capacity)


def split_layer(budget: Tensor, modality_shares: Tensor, counts: Tensor) -> Tensor:
    """Whole budget of each modality inside one layer, on the CPU; in every KV head by that head's own shares where it
    has some.

    Args:
        budget: int64 ``[B]`` entries that every head keeps; modality_shares: ``[B, 2]`` or ``[B, K, 2]``;
        counts: int64 ``[B, 2]``, or ``[B, 1 or K, 2]``, entries that exist.

    Returns:
        int64 of the shape of `modality_shares`; the last axis sums to ``min(budget, counts.sum())``.
    """
    shares = modality_shares.reshape(len(budget), -1, 2)
    capacity = counts.reshape(len(budget), -1, 2).expand(shares.shape)
    by_head = share_out(budget.repeat_interleave(shares.shape[1]), shares.flatten(0, 1), capacity.flatten(0, 1))
    return by_head.view(modality_shares.shape)


def split_heads(score: Tensor, members: Tensor, budget: Tensor, to_gates: LogGates = hard_topk) -> Tensor:
    """Entries that each KV head of a layer keeps of each modality where one top-k goes over all its heads.

    The best entries of every head, as many as that, are what the joint top-k keeps.

    Args:
        score: ``[B, K, N]``; members: bool ``[B, 1 or K, M, N]``, of M modalities, or of both as one;
        budget: ``[B, M]`` (head, entry) pairs; to_gates: the selection, hard or soft.

    Returns:
        ``[B, K, M]``, with `budget` as its sum over heads.
    """
    heads = score.shape[1]
    among = members.expand(-1, heads, -1, -1).transpose(1, 2).flatten(2)
    gates = to_gates(score.flatten(1)[:, None], among, budget).exp()
    return gates.unflatten(-1, (heads, -1)).sum(-1).transpose(1, 2)


def allocate(total: Tensor, layer_shares: Tensor, modality_shares: Tensor, counts: Tensor) -> Tensor:
    """Budget of every layer and modality, not yet whole numbers.

    Args:
        total: ``[B]`` entries over all layers.
        layer_shares: ``[L]`` or ``[B, L]`` relative budget of each layer.
        modality_shares: ``[B, L, P]`` split inside each layer over modalities, or over heads and modalities.
        counts: ``[B, P]`` entries that exist.

    Returns:
        float ``[B, L, P]`` that sums to `total` over its last two axes; differentiable in both shares.
    """
    layers = layer_shares.shape[-1]
    capacity = counts.to(modality_shares.dtype)
    layer_capacity = capacity.sum(-1, keepdim=True).expand(-1, layers)
    by_layer = water_fill(total, layer_shares, layer_capacity)
    return water_fill(by_layer, modality_shares, capacity[:, None, :].expand(-1, layers, -1))
