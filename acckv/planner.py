"""From what a prompt's attention showed to what each layer keeps: score, budget, select, merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from acckv.config import CompressionConfig, check_ratio
from acckv.method.budgets import allocate, share_out, split_layer, total_budget
from acckv.method.modality import ModalityMap
from acckv.method.plan import (
    AlignmentRule,
    LayerPlan,
    LayerScore,
    LogGates,
    MergeRule,
    hard_topk,
    plan_layer,
    soft_topk,
)
from acckv.method.scoring import Observation
from acckv.method.weights import CalibratedWeights, LayerWeights
from acckv.policies import Policy, build_policy


class Planner:
    """One compressor setting as a function of observations; it knows no model, cache, LoRA or file.

    Args:
        config: the options.
        weights: the learned ones, or None for the training-free policy of the config.
        policy: in place of the one that the config names.
    """

    def __init__(
        self, config: CompressionConfig, weights: CalibratedWeights | None = None, policy: Policy | None = None
    ) -> None:
        self.config, self.weights = config, weights
        self.policy = build_policy(config, weights) if policy is None else policy

    def head(self, index: int) -> Planner:
        """The planner of a KV head that holds other entries than the rest, as if its layer had no other head.

        It scores and plans; the budgets of the layers are those of the whole.
        """
        return self if self.weights is None else Planner(self.config, self.weights.head(index))

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
        """int64 ``[B]``: entries that all layers together keep of a prompt."""
        counts = labels.counts()
        if self.policy.keeps_all:
            return total_budget(1.0, None, layers, counts)
        absolute = self.config.budget if ratio is None else None
        return total_budget(self.ratio_of(labels, layers, ratio), absolute, layers, counts)

    def layer_budgets(
        self,
        scores: Sequence[LayerScore | None],
        labels: ModalityMap,
        total: Tensor,
        available: Tensor,
        ratio: float,
    ) -> Tensor:
        """Entries that each layer keeps of both modalities together.

        Args:
            scores: one a layer; None where the policy needs none (it is not `cross_layer`).
            total: int64 ``[B]``: entries that all layers together keep.
            available: int64 ``[B, L]``: entries that compete in each layer.

        Returns:
            int64 ``[B, L]``, on the CPU, that sums to `total`.
        """
        return share_out(total, self._layer_shares(scores, labels, total, ratio), available)

    def _layer_shares(
        self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor, ratio: float
    ) -> Tensor:
        """Relative budget of each layer ``[L]`` or ``[B, L]``, learned or the policy's."""
        if self.weights is not None:
            return self.weights.layer_shares(ratio, self.config.layer_floor)
        return self.policy.layer_shares(scores, labels, total)

    def _modality_shares(self, layer: int, score: LayerScore, ratio: float) -> Tensor | None:
        """The split of a layer's budget ``[B, 2]`` or ``[B, K, 2]``, as measured and as learned.

        None stands for one top-k over both modalities.
        """
        if score.modality_shares is None or self.weights is None:
            return score.modality_shares
        return self.weights.modality_shares(layer, score.modality_shares, ratio)

    def split(self, layer: int, score: LayerScore, budget: Tensor, labels: ModalityMap, ratio: float) -> Tensor:
        """A layer's whole budget by modality, on the CPU.

        Returns:
            int64 ``[B, 2]`` or ``[B, K, 2]``, or ``[B, 1]`` where the policy takes one top-k over both.
        """
        shares = self._modality_shares(layer, score, ratio)
        return budget[:, None] if shares is None else split_layer(budget, shares, labels.counts())

    def _soft_budgets(self, scores: list[LayerScore], labels: ModalityMap, total: Tensor, ratio: float) -> Tensor:
        """Real numbers ``[B, L, 2]``, which training differentiates."""
        device = scores[0].score.device
        measured = [self._modality_shares(layer, score, ratio) for layer, score in enumerate(scores)]
        split = torch.stack([share.to(device) for share in measured if share is not None and share.ndim == 2], dim=1)
        layer_shares = self._layer_shares(scores, labels, total, ratio)
        return allocate(total.to(device), layer_shares.to(device), split, labels.counts().to(device))

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
        layers = len(observations)
        total, ratio = self.total(labels, layers, ratio), self.ratio_of(labels, layers, ratio)
        scores = self.scores(observations, labels)
        if temperature is not None:
            split = self._soft_budgets(scores, labels, total, ratio)
            return [
                self._plan_softly(layer, scores[layer], seen, labels, split[:, layer], temperature)
                for layer, seen in enumerate(observations)
            ]
        device = scores[0].score.device
        available = labels.counts().sum(-1, keepdim=True).expand(-1, layers)
        budgets = self.layer_budgets([score.to(device) for score in scores], labels, total, available, ratio)
        return [
            self.compress_layer(layer, seen, labels, budgets[:, layer], ratio, scores[layer])
            for layer, seen in enumerate(observations)
        ]

    def compress_layer(
        self,
        layer: int,
        observation: Observation,
        labels: ModalityMap,
        budget: Tensor,
        ratio: float,
        score: LayerScore | None = None,
    ) -> LayerPlan:
        """The plan of one layer whose budget is settled.

        Args:
            labels: on any device; the plan is on that of the layer's keys.
            budget: int64 ``[B]``, as of :meth:`layer_budgets`.
            ratio: which learned splits depend on.
            score: of the layer, where it is known already.
        """
        device = observation.keys.device
        labels = labels.to(device)
        fixed = self.policy.fixed_plan(observation, labels)
        if fixed is not None:
            return fixed
        score = (self.policy.score(layer, observation, labels) if score is None else score).on_host()
        split = self.split(layer, score, budget, labels, ratio).cpu()
        score = LayerScore(score.score.to(device), score.modality_shares)
        plan = self._select(layer, score, observation, labels, split, hard_topk, temperature=0.0)
        by_row = split.sum(-1)  # every head of a row keeps the same number
        plan = replace(plan, kept=labels.host.text.sum(-1) + (by_row if by_row.ndim == 1 else by_row[:, 0]))
        return self.policy.merge(plan, observation.keys, observation.values, labels)

    def _plan_softly(
        self,
        layer: int,
        score: LayerScore,
        observation: Observation,
        labels: ModalityMap,
        split: Tensor,
        temperature: float,
    ) -> LayerPlan:
        """The plan of one layer in training: gates between 0 and 1 that sum to the budget."""
        device = observation.keys.device
        labels, score, split = labels.to(device), score.to(device), split.to(device)
        plan = self._select(layer, score, observation, labels, split, soft_topk(temperature), temperature)
        return self.policy.merge(plan, observation.keys, observation.values, labels)

    def _select(
        self,
        layer: int,
        score: LayerScore,
        observation: Observation,
        labels: ModalityMap,
        split: Tensor,
        to_gates: LogGates,
        temperature: float,
    ) -> LayerPlan:
        weights = None if self.weights is None else self.weights.layer(layer, observation.keys.device)
        rules = self._merge_rule(weights), self._alignment_rule(weights, temperature)
        return plan_layer(score, observation, labels, split, to_gates, *rules)

    def _merge_rule(self, weights: LayerWeights | None) -> MergeRule | None:
        if self.config.policy != "acckv" or not self.config.integration:
            return None
        return MergeRule() if weights is None else MergeRule(weights.merge_bias, weights.merge_gain)

    def _alignment_rule(self, weights: LayerWeights | None, temperature: float) -> AlignmentRule | None:
        if self.config.policy != "acckv":
            return None
        threshold, drop = self.config.alignment_threshold, self.config.cross_calibration
        if weights is None:
            return AlignmentRule(threshold) if drop else None
        # Cosines span 2, standardised scores about 6: a third of the temperature is as soft for them.
        learned = threshold + weights.alignment_threshold if drop else threshold
        return AlignmentRule(learned, weights.alignment_weight, drop, softness=temperature / 3)


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
