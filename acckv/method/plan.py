"""One layer through AccKV: focus -> select -> integrate -> align, hard or soft.

Inference and the training simulation both call :func:`plan_layer`; they differ in how a budget becomes gates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from acckv.method.cross_calibration import alignment, integrate, rebalance
from acckv.method.modality import ModalityMap
from acckv.method.scoring import Observation
from acckv.method.topk import LogGates, hard_topk, soft_topk


@dataclass(frozen=True)
class LayerScore:
    """The scores of one layer's entries, and the split of its budget.

    Args:
        score: ``[B, K or 1, N]``, comparable inside a modality (inside the layer, where `modality_shares` is None).
        modality_shares: split of the layer's budget, ``[B, 2]`` or by KV head ``[B, K or 1, 2]``; None for one top-k
            over both modalities.
    """

    score: Tensor
    modality_shares: Tensor | None

    def on_host(self) -> LayerScore:
        """The same with its shares on the CPU, where whole budgets are made."""
        return LayerScore(self.score, None if self.modality_shares is None else self.modality_shares.detach().cpu())

    def to(self, device: torch.device) -> LayerScore:
        """The same on a device."""
        shares = None if self.modality_shares is None else self.modality_shares.to(device)
        return LayerScore(self.score.to(device), shares)


@dataclass(frozen=True)
class LayerInputs:
    """All that one layer's plan is made from.

    Args:
        layer: its number; score: of its entries, its shares on the CPU where the budgets are whole.
        budgets: ``[B, 2]`` or by head ``[B, K, 2]`` entries to keep of each modality, merged ones included; the last
            axis is 1 for one top-k over both. Whole ones are on the CPU.
        temperature: None for the hard selection that is shipped, above 0 for its differentiable twin.
    """

    layer: int
    score: LayerScore
    observation: Observation
    labels: ModalityMap
    budgets: Tensor
    temperature: float | None = None


@dataclass(frozen=True)
class AlignmentRule:
    """AccKV step 4 in one layer: drop below `threshold` where `drop`, and add ``weight * c`` to the score.

    `softness` is the temperature of the threshold: 0 at inference, above it in training.
    """

    threshold: Tensor | float
    weight: Tensor | float = 0.0
    drop: bool = True
    softness: float = 0.0


@dataclass(frozen=True)
class MergeRule:
    """AccKV step 3 in one layer: log mass (added to attention logits) and relative gain of a merged value.

    ``bias`` and ``gain`` are 0 for plain averaging, else ``[K, 2]``.
    """

    bias: Tensor | float = 0.0
    gain: Tensor | float = 0.0


@dataclass(frozen=True)
class MergedInto:
    """Kept entries into which others were merged, with what they are afterwards.

    Args:
        index: int64 ``[B, K, P]``, indices in the prompt, each at most once in a row and head.
        keys, values: ``[B, K, P, D]``.
    """

    index: Tensor
    keys: Tensor
    values: Tensor

    def place(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, K, N or more, D]`` with these entries in their places."""
        index = self.index[..., None]
        return (
            keys.scatter(2, index.expand(self.keys.shape), self.keys.to(keys.dtype)),
            values.scatter(2, index.expand(self.values.shape), self.values.to(values.dtype)),
        )


@dataclass(frozen=True)
class LayerPlan:
    """The fate of one layer's prompt entries, merged entries appended: ``M = N + merged``.

    Args:
        log_gates: ``[B, K or 1, M]``; added to the attention logits of later queries. 0 kept, -inf evicted.
        merged_keys, merged_values: the merged entries ``[B, K, M - N, D]``.
        merged_bias: ``[B, K, M - N]`` log mass of the merged entries.
        merged_into: kept prompt entries that changed, or None.
        kept: int64 ``[B]``, on the CPU: entries that every head of a row keeps, merged ones included, or ``[B, K]``
            where heads keep different numbers; None where only the gates tell.
    """

    log_gates: Tensor
    merged_keys: Tensor
    merged_values: Tensor
    merged_bias: Tensor
    merged_into: MergedInto | None = None
    kept: Tensor | None = None

    def apply(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values with the merged entries after the prompt, and the bias of both on attention logits.

        Args:
            keys, values: ``[B, K, N + later, D]``.

        Returns:
            keys and values ``[B, K, M + later, D]``, bias ``[B, K or 1, M]``.
        """
        if self.merged_into is not None:
            keys, values = self.merged_into.place(keys, values)
        merged = self.merged_keys.shape[2]
        if not merged:
            return keys, values, self.log_gates
        length = self.log_gates.shape[-1] - merged
        keys = torch.cat([keys[:, :, :length], self.merged_keys.to(keys.dtype), keys[:, :, length:]], dim=2)
        values = torch.cat([values[:, :, :length], self.merged_values.to(values.dtype), values[:, :, length:]], dim=2)
        gates = self.log_gates.expand(-1, keys.shape[1], -1)
        return keys, values, torch.cat([gates[..., :length], gates[..., length:] + self.merged_bias], dim=-1)


def plan_layer(given: LayerInputs, merge: MergeRule | None = None, align: AlignmentRule | None = None) -> LayerPlan:
    """Decide for every entry of one layer.

    Args:
        merge, align: None where the step is off.
    """
    if given.temperature is not None:
        return _plan(given, soft_topk(given.temperature), merge, align)
    plan, budgets = _plan(given, hard_topk, merge, align), given.budgets
    text = given.labels.host.text.sum(-1, keepdim=True)
    return replace(plan, kept=alike((budgets if budgets.ndim == 3 else budgets[:, None]).sum(-1) + text))


def alike(kept: Tensor) -> Tensor:
    """Entries kept by each head, ``[B, K]``; ``[B]`` where all heads of a row keep equally many."""
    return kept[:, 0] if bool((kept == kept[:, :1]).all()) else kept


def _plan(given: LayerInputs, to_gates: LogGates, merge: MergeRule | None, align: AlignmentRule | None) -> LayerPlan:
    observation, labels, budgets, shares = given.observation, given.labels, given.budgets, given.score.modality_shares
    score, keys, values = given.score.score, observation.keys, observation.values
    members = labels.by_modality
    always = labels.text_gates
    if shares is None:
        by_row = budgets if budgets.ndim == 2 else budgets[..., 0]
        log_gates = torch.maximum(always, to_gates(score, labels.media[:, None], by_row))
        return _without_merging(log_gates, keys, values)

    by_head = budgets if budgets.ndim == 3 else budgets[:, None, :]
    split = by_head.to(score.dtype).expand(-1, score.shape[1], -1)
    counts = labels.counts()[:, None].to(split.device)
    if align is not None:
        score, split = _align(score, keys, observation.key_scale, labels, split, shares, to_gates, align)
        counts = counts.to(split.device)
    # A merged entry takes the place of one kept entry; it needs two places and something to average.
    merging = (split >= 2) & (split < counts) if merge is not None else torch.zeros_like(split, dtype=torch.bool)
    real = split - merging.to(split.dtype)
    by_modality = to_gates(score[:, None], members[:, :, None], real.permute(0, 2, 1))
    log_gates = torch.maximum(always, by_modality.amax(1))
    if merge is None:
        return _without_merging(log_gates, keys, values)

    merged_keys, merged_values, _ = integrate(keys, values, log_gates.exp(), members)
    gain = merge.gain[None, :, :, None] if isinstance(merge.gain, Tensor) else merge.gain
    bias = merged_keys.new_zeros(merged_keys.shape[:3], dtype=log_gates.dtype) + merge.bias
    present = torch.zeros_like(split).masked_fill(~merging, -torch.inf).to(log_gates.device)
    return LayerPlan(
        torch.cat([log_gates, present.expand(*log_gates.shape[:2], 2)], dim=-1),
        merged_keys,
        (merged_values * (1 + gain)).to(values.dtype),
        bias,
    )


def _without_merging(log_gates: Tensor, keys: Tensor, values: Tensor) -> LayerPlan:
    return LayerPlan(log_gates, keys[:, :, :0], values[:, :, :0], log_gates.new_empty(*keys.shape[:2], 0))


def _align(
    score: Tensor,
    keys: Tensor,
    scale: Tensor,
    labels: ModalityMap,
    split: Tensor,
    shares: Tensor,
    to_gates: LogGates,
    rule: AlignmentRule,
) -> tuple[Tensor, Tensor]:
    """docs/method.md, step 4: the scores and budgets after low-priority entries met the kept high-priority keys."""
    first = shares.detach().argmax(-1).cpu()
    high = torch.nn.functional.one_hot(first, 2).bool()[:, None].to(split.device)
    high_members, low_members = (labels.of_modality(tuple(side.tolist()))[:, None] for side in (first, 1 - first))
    high_budget = (split * high).sum(-1)
    kept_high = to_gates(score, high_members, high_budget).exp()
    similarity = alignment(keys, scale, kept_high, kept_high.sum(-1) if rule.softness > 0 else high_budget)
    if score.shape[1] == 1:
        similarity = similarity.mean(dim=1, keepdim=True)
    score = torch.addcmul(score, similarity, low_members * rule.weight)
    if not rule.drop:
        return score, split
    if rule.softness > 0:
        passes = torch.sigmoid((similarity - rule.threshold) / rule.softness)
    else:
        passes = (similarity >= rule.threshold).to(score.dtype)
    split, high, counts = (part.to(score.device) for part in (split, high, labels.counts()[:, None]))
    split = rebalance(split, (passes * low_members).sum(-1), high, counts)
    # Below every aligned entry of its modality, its own order kept: only what nothing else can fill is left to it.
    span = score.detach().amax(-1, keepdim=True) - score.detach().amin(-1, keepdim=True) + 1
    return score - span * (1 - passes) * low_members, split
