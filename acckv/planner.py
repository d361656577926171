"""From what a prompt's attention showed to what each layer keeps: score, budget, select, merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from acckv.config import CompressionConfig, HeadBudgets, check_ratio
from acckv.errors import InputError
from acckv.method.budgets import allocate, share_out, split_heads, split_layer, total_budget
from acckv.method.heads import join_heads, join_scores, one_head
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerInputs, LayerPlan, LayerScore
from acckv.method.scoring import Observation
from acckv.method.topk import soft_topk
from acckv.policies import Policy


class Planner:
    """One compressor setting as a function of observations; it knows no model, cache, LoRA or file.

    Args:
        config: when is compressed, and how much is kept.
        policy: how entries are scored and budgets are shared, with its learned weights if it has any.

    Raises:
        InputError: the heads' budgets are to be as learned, and the policy has learned none.
    """

    def __init__(self, config: CompressionConfig, policy: Policy) -> None:
        if config.head_budgets == "learned" and not policy.learns_heads:
            raise InputError(
                f"is 'learned', which {policy.name} has no weights for; set it to joint or equal", field="head_budgets"
            )
        self.config, self.policy = config, policy

    def keeps_all(self, ratio: float | None = None) -> bool:
        """Whether nothing would ever be evicted.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        check_ratio(ratio)
        ratio = self.config.ratio if ratio is None else ratio
        if self.policy.keeps_all is not None:
            return self.policy.keeps_all
        return ratio >= 1 and self.config.budget is None

    def scores(self, observations: list[Observation], labels: ModalityMap) -> list[LayerScore]:
        """The scores of every layer's entries (docs/method.md, steps 1 and 2)."""
        return self.policy.scores(observations, labels)

    # ------------------------------------------------------------------ budgets

    @property
    def head_budgets(self) -> HeadBudgets:
        """The config's, but equal where all heads have one score."""
        ranks_apart = self.policy.ranks_by_head and not self.policy.share_heads
        return self.config.head_budgets if ranks_apart else "equal"

    def heads(self, *kv_heads: int) -> int:
        """KV heads of a layer that have budgets of their own: all of them, or 1 where each keeps as many.

        Budgets of more than one are counts of (head, entry) pairs.

        Args:
            kv_heads: of each layer, or of any.

        Raises:
            InputError: heads have budgets of their own, and layers have different numbers of them.
        """
        if self.head_budgets == "equal":
            return 1
        if len(set(kv_heads)) > 1:
            raise InputError("needs as many KV heads in every layer; set it to equal", field="head_budgets")
        return kv_heads[0]

    def ratio_of(self, labels: ModalityMap, layers: int, ratio: float | None = None) -> float:
        """The ratio that is asked for, or the one that the config's absolute budget comes to.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        check_ratio(ratio)
        if ratio is not None or self.config.budget is None:
            return self.config.ratio if ratio is None else ratio
        counts = labels.counts()
        return effective_ratio(total_budget(1.0, self.config.budget, layers, counts), counts, layers)

    def total(self, labels: ModalityMap, layers: int, ratio: float | None = None) -> Tensor:
        """int64 ``[B]``: entries that all layers together keep of a prompt.

        Args:
            layers: L, or L * K for (head, entry) pairs.
        """
        absolute = self.config.budget if ratio is None else None
        ratio = self.config.ratio if ratio is None else ratio
        if self.policy.keeps_all:
            ratio, absolute = 1.0, None
        return total_budget(ratio, absolute, layers, labels.counts())

    def layer_budgets(
        self,
        scores: Sequence[LayerScore | None],
        labels: ModalityMap,
        total: Tensor,
        available: Tensor,
        ratio: float,
        heads: int = 1,
    ) -> Tensor:
        """Entries that each layer keeps of both modalities together; (head, entry) pairs of more than one of `heads`.

        Args:
            scores: one a layer; None where the policy needs none (it is not `cross_layer`).
            total: int64 ``[B]``: entries that all layers together keep.
            available: int64 ``[B, L]``: entries that compete in each layer.

        Returns:
            int64 ``[B, L]``, on the CPU, that sums to `total`.
        """
        of_a_head = total if heads == 1 else total.double() / heads
        return share_out(total, self.policy.layer_shares(scores, labels, of_a_head, ratio), available)

    def split(
        self, layer: int, score: LayerScore, budget: Tensor, labels: Sequence[ModalityMap], ratio: float
    ) -> Tensor:
        """A layer's whole budget by modality, and by KV head where heads have budgets or labels of their own.

        Args:
            score: on the device of `labels`, its shares on the CPU.
            budget: int64 ``[B]``, as of :meth:`layer_budgets`.
            labels: of all heads together, or one a head.

        Returns:
            int64 ``[B, 2]`` or ``[B, K, 2]``, on the CPU; the last axis is 1 where one top-k goes over both modalities.
        """
        shares, counts = score.modality_shares, torch.stack([one.counts() for one in labels], dim=1)
        if shares is not None:
            shares = self.policy.modality_shares(layer, shares, ratio)
        heads = self.heads(score.score.shape[1])
        if heads > 1 and self.head_budgets == "learned" and shares is not None:
            by_part = self.policy.head_shares(layer, shares, ratio).flatten(1)
            return share_out(budget, by_part, counts.expand(-1, heads, -1).flatten(1)).unflatten(1, (heads, 2))
        if heads > 1:
            return self._joint(score.score, budget, shares, counts, labels)
        if shares is None:
            return budget[:, None] if len(labels) == 1 else budget[:, None, None].expand(-1, len(labels), -1)
        return split_layer(budget, shares, counts)

    def _joint(
        self, score: Tensor, budget: Tensor, shares: Tensor | None, counts: Tensor, labels: Sequence[ModalityMap]
    ) -> Tensor:
        """int64 ``[B, K, 2 or 1]``: a layer's (head, entry) pairs where one top-k goes over its heads.

        Args:
            shares: ``[B, 2]`` or ``[B, K, 2]``, of which the mean over heads counts; None for one top-k over both
                modalities; counts: ``[B, 1 or K, 2]``.
        """
        by_modality = budget[:, None]
        if shares is not None:
            existing = counts.expand(-1, score.shape[1], -1).sum(1)
            by_modality = split_layer(budget, shares.reshape(len(budget), -1, 2).mean(1), existing)
        return split_heads(score, _members(labels, shares is not None), by_modality).long().cpu()

    def _soft_budgets(
        self, scores: list[LayerScore], labels: ModalityMap, total: Tensor, ratio: float, heads: int
    ) -> Tensor:
        """Real numbers, which training differentiates: ``[B, L, 2]``, of all heads where heads have budgets of their
        own, or ``[B, L, K, 2]`` where those are learned."""
        device, learned = scores[0].score.device, heads > 1 and self.head_budgets == "learned"
        split = [
            self.policy.modality_shares(layer, score.modality_shares, ratio).to(device)
            for layer, score in enumerate(scores)
            if score.modality_shares is not None
        ]
        counts = heads * labels.counts()
        if learned:
            split = [self.policy.head_shares(layer, shares, ratio).flatten(1) for layer, shares in enumerate(split)]
            counts = labels.counts().repeat(1, heads)
        layer_shares = self.policy.layer_shares(scores, labels, total, ratio).to(device)
        budgets = allocate(total.to(device), layer_shares, torch.stack(split, dim=1), counts.to(device))
        return budgets.unflatten(-1, (heads, 2)) if learned else budgets

    # -------------------------------------------------------------------- plans

    def plan(
        self,
        observations: list[Observation],
        labels: ModalityMap,
        ratio: float | None = None,
        temperature: float | None = None,
    ) -> list[LayerPlan]:
        """The plans of all layers together, since they share one budget.

        Args:
            observations: one a layer.
            ratio: replaces the config's.
            temperature: None for the hard selection that is shipped, above 0 for its differentiable twin.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        layers, heads = len(observations), self.heads(*(seen.keys.shape[1] for seen in observations))
        total, ratio = self.total(labels, layers * heads, ratio), self.ratio_of(labels, layers, ratio)
        scores = self.scores(observations, labels)
        if temperature is not None:
            split, plans = self._soft_budgets(scores, labels, total, ratio, heads), []
            for layer, seen in enumerate(observations):
                device = seen.keys.device
                score, budget, own = scores[layer].to(device), split[:, layer].to(device), labels.to(device)
                if budget.ndim == 2 and heads > 1:
                    budget = split_heads(score.score, _members([own], True), budget, soft_topk(temperature))
                plans.append(self.policy.plan(LayerInputs(layer, score, seen, own, budget, temperature)))
            return plans
        device = scores[0].score.device
        available = heads * labels.counts().sum(-1, keepdim=True).expand(-1, layers)
        budgets = self.layer_budgets([score.to(device) for score in scores], labels, total, available, ratio, heads)
        return [
            self.compress_layer(layer, seen, [labels], budgets[:, layer], ratio, scores[layer])
            for layer, seen in enumerate(observations)
        ]

    def compress_layer(
        self,
        layer: int,
        observation: Observation,
        labels: Sequence[ModalityMap],
        budget: Tensor,
        ratio: float,
        score: LayerScore | None = None,
        policies: Sequence[Policy] = (),
    ) -> LayerPlan:
        """The plan of one layer whose budget is settled.

        Args:
            labels: of all heads together, or one a KV head where they hold different entries; on any device, the plan
                is on that of the layer's keys.
            budget: int64 ``[B]``, as of :meth:`layer_budgets`.
            ratio: which learned splits depend on.
            score: of the layer, where it is known already.
            policies: of each head that is planned as if the layer had no other; as many as `labels`, where those are
                more than one.
        """
        device, kv_heads = observation.keys.device, observation.keys.shape[1]
        labels = [one.to(device) for one in labels]
        if len(labels) == 1:
            score = (self.policy.score(layer, observation, labels[0]) if score is None else score).on_host()
            by_head = score.score.to(device).expand(-1, max(score.score.shape[1], self.heads(kv_heads)), -1)
            score = LayerScore(by_head, score.modality_shares)
            split = self.split(layer, score, budget, labels, ratio).cpu()
            return self.policy.plan(LayerInputs(layer, score, observation, labels[0], split))
        alone = [one_head(observation, head, one.host.real) for head, one in enumerate(labels)]
        heads = list(zip(policies, alone, labels, strict=True))
        scores = [policy.score(layer, seen, own).on_host() for policy, seen, own in heads]
        split = self.split(layer, join_scores(scores), budget, labels, ratio)
        return join_heads(
            [
                policy.plan(LayerInputs(layer, scores[head], seen, own, split[:, head]))
                for head, (policy, seen, own) in enumerate(heads)
            ]
        )


def _members(labels: Sequence[ModalityMap], by_modality: bool) -> Tensor:
    """bool ``[B, 1 or K, M, N]``: the entries of each modality, or of both as one, of all heads or each."""
    return torch.stack([one.by_modality if by_modality else one.media[:, None] for one in labels], dim=1)


def effective_ratio(total: Tensor, counts: Tensor, layers: int) -> float:
    """The ratio that an absolute budget comes to; learned budgets depend on it.

    Args:
        total: int64 ``[B]`` entries over all layers; counts: int64 ``[B, 2]`` entries that exist in one.
    """
    return min(float(total.sum()) / max(float(counts.sum()) * layers, 1.0), 1.0)


class Planners:
    """The planners of a compressor: the default one, and that of the lowest ratios where those have their own.

    Args:
        below: ratios below it are planned by `low_ratio`.
    """

    def __init__(self, default: Planner, low_ratio: Planner | None = None, below: float = 0.0) -> None:
        self.default, self.low_ratio, self.below = default, low_ratio, below

    @property
    def config(self) -> CompressionConfig:
        return self.default.config

    @property
    def policy(self) -> Policy:
        return self.default.policy

    def keeps_all(self, ratio: float | None = None) -> bool:
        """Whether nothing would ever be evicted.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        return self.default.keeps_all(ratio)

    def is_low(self, ratio: float) -> bool:
        """Whether a ratio has a planner of its own."""
        return self.low_ratio is not None and ratio < self.below

    def at(self, ratio: float) -> Planner:
        """The planner for `ratio`: the low-ratio one below `below`, else the default."""
        return self.low_ratio if self.low_ratio is not None and self.is_low(ratio) else self.default
